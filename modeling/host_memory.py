"""Host memory that lives as long as the process and is lent out: pinned where there is a GPU.

Pinning takes seconds for what a long sequence needs, and torch's own pinned blocks are rounded up to powers of two. So
a run asks once for what its plan says, and the next run gets the same memory again: it is free as soon as no tensor in
it is alive.
"""

import math
import mmap

import torch
from torch.multiprocessing.reductions import StorageWeakRef

ALIGNMENT = 64  # bytes, between tensors


class HostMemory:
    """Pieces of host memory, each lent to one borrower at a time."""

    def __init__(self):
        self._pieces = []  # (memory, reference to the storage by which it is lent)

    def lend(self, num_bytes):
        """(num_bytes,) uint8. Another call gets the same memory once all tensors made of it are gone."""
        free = [piece for piece in self._pieces if piece[1].expired()]
        fits = sorted((piece for piece in free if len(piece[0]) >= num_bytes), key=lambda piece: len(piece[0]))
        # what is too small for this borrower makes room, so that rows of growing length do not pile up
        for piece in fits[:1] if fits else free:
            self._pieces.remove(piece)
            if not fits:
                release(piece[0])
        memory = fits[0][0] if fits else allocate(num_bytes)
        lent = torch.frombuffer(memory, dtype=torch.uint8)
        self._pieces.append((memory, StorageWeakRef(lent.untyped_storage())))
        return lent[:num_bytes]

    @property
    def num_bytes(self):
        return sum(len(memory) for memory, _ in self._pieces)


HOST_MEMORY = HostMemory()


class Borrowed:
    """Tensors one after another from `HOST_MEMORY`.

    Args:
        num_bytes: of all of them, as planned; what goes beyond is borrowed besides.
    """

    def __init__(self, num_bytes):
        self.planned, self.left = num_bytes, None

    def empty(self, shape, dtype):
        size = math.prod(shape) * dtype.itemsize
        if size == 0:
            return torch.empty(shape, dtype=dtype)
        padded = -(-size // ALIGNMENT) * ALIGNMENT
        if self.left is None or len(self.left) < padded:
            self.left, self.planned = HOST_MEMORY.lend(max(padded, self.planned)), 0
        piece, self.left = self.left[:size], self.left[padded:]
        return piece.view(dtype).view(shape)


def allocate(num_bytes):
    """Memory of this size, to the page; pinned where there is a GPU."""
    memory = mmap.mmap(-1, max(num_bytes, 1))
    if torch.cuda.is_available():
        address = torch.frombuffer(memory, dtype=torch.uint8).data_ptr()
        torch.cuda.check_error(int(torch.cuda.cudart().cudaHostRegister(address, len(memory), 0)))
    return memory


def release(memory):
    """Unpin what `allocate` gave."""
    if torch.cuda.is_available():
        address = torch.frombuffer(memory, dtype=torch.uint8).data_ptr()
        torch.cuda.check_error(int(torch.cuda.cudart().cudaHostUnregister(address)))
