"""Frames that vLLM is to see, decoded once into a file: to its engine travels where they lie.

vLLM hands all items of a prompt to its engine before the first of them is looked at, and holds them until the answer
ends; as pixels, two hours would be 2.4 GB in each process. So an item is a name and a span, and these frames are read
when they are encoded.

    TMPDIR/video-ma2mba-<user>/<name>   (frames, 3, side, side) uint8, named by the hash of what they were taken from

All servers of a user on a machine share that folder. It is bounded: what was not looked at for longest goes first, but
nothing that a request still needs, which `Hold` keeps locked, and nothing that was just asked for.
"""

import errno
import fcntl
import math
import os
import stat
import tempfile
import time
import uuid
import weakref
from collections.abc import Iterable
from contextlib import suppress
from functools import cache
from pathlib import Path

import numpy as np
import torch

MAX_BYTES = 32 * 2**30  # of the folder
ON_THE_WAY_S = 600.0  # so long a request may take from here to the engine, which then holds what it needs
FULL = (errno.ENOSPC, errno.EDQUOT)


@cache
def frame_folder() -> "FrameFolder":
    """The one of this process."""
    return FrameFolder()


class FrameFolder:
    """The folder of this user.

    Raises:
        OSError: something that is not a folder of this user alone lies in its place.
    """

    def __init__(self) -> None:
        self.path = Path(tempfile.gettempdir()) / f"video-ma2mba-{os.getuid()}"
        with suppress(FileExistsError):
            self.path.mkdir(mode=0o700)
        status = self.path.lstat()
        if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid() or status.st_mode & 0o077:
            raise OSError(f"{self.path}: this must be a folder that its user alone may enter; remove it, or set TMPDIR")
        self._held: weakref.WeakValueDictionary[str, Hold] = weakref.WeakValueDictionary()

    def keep(self, name: str, frames: Iterable[np.ndarray]) -> int:
        """Write frames under a name unless they are there; how many bytes they are.

        Args:
            frames: each of one size, uint8; begun only if they are needed.
        """
        path = self.path / name
        with suppress(FileNotFoundError):
            os.utime(path)
            return path.stat().st_size
        coming = self.path / f"coming-{uuid.uuid4().hex}"
        try:
            with open(coming, "xb") as file:
                for frame in frames:
                    file.write(np.ascontiguousarray(frame).data)
            size = coming.stat().st_size
            coming.replace(path)
        except OSError as error:
            if error.errno in FULL:
                raise ValueError(f"there is no room for the frames of this video in {self.path.parent}") from error
            raise
        finally:
            coming.unlink(missing_ok=True)
        self._make_room()
        return size

    def read(self, name: str, start: int, stop: int, side: int) -> torch.Tensor:
        """(stop - start, 3, side, side) uint8.

        Raises:
            FileNotFoundError: they are not there.
        """
        shape = (stop - start, 3, side, side)
        path, size = self.path / name, math.prod(shape[1:])
        frames = np.fromfile(path, np.uint8, count=shape[0] * size, offset=start * size)
        os.utime(path)
        return torch.from_numpy(frames.reshape(shape))

    def hold(self, name: str) -> "Hold":
        """Keep frames where they are for as long as somebody has what this gives.

        Raises:
            ValueError: they are gone.
        """
        held = self._held.get(name)
        if held is None:
            held = self._held[name] = Hold(self.path / name)
        return held

    def _make_room(self) -> None:
        found = []
        for path in self.path.iterdir():
            with suppress(FileNotFoundError):
                found.append((path.stat().st_mtime, path.stat().st_size, path))
        left = sum(size for _, size, _ in found)
        for used, size, path in sorted(found):
            if left <= MAX_BYTES or time.time() - used < ON_THE_WAY_S:
                return
            with suppress(OSError), open(path, "rb") as file:  # locked: somebody needs them
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                path.unlink()
                left -= size


def place(name: str, start: int, stop: int, side: int) -> np.ndarray:
    """What travels: where some frames of a video lie, as int64."""
    return np.array([start, stop, side, *name.encode()])


def placed(where: torch.Tensor) -> tuple[str, int, int, int]:
    """What `place` was given."""
    start, stop, side, *letters = where.tolist()
    return bytes(letters).decode(), start, stop, side


class Hold:
    """A lock on a file; the system gives it up for a process that is killed."""

    def __init__(self, path: Path):
        try:
            self._file = open(path, "rb")  # noqa: SIM115 - for as long as this lives
            fcntl.flock(self._file, fcntl.LOCK_SH)
        except FileNotFoundError:
            raise ValueError("the frames of the video are gone; send it again") from None
        if os.fstat(self._file.fileno()).st_nlink == 0:  # removed between the two lines
            raise ValueError("the frames of the video are gone; send it again")
