"""One long sample over several processes, looked at from inside: started by `fork`, or by hand to see the figures.

    .venv-distributed/bin/python -m torch.distributed.run --standalone --nproc-per-node 2 -m tests.distributed.spans \\
        layer_major sequence_major
"""

import json
import sys
import weakref

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from video_ma2mba.modeling.sequence_parallel import SequenceGroup, cut_span, set_sequence_group

from ..tiny import tiny_model

LAYERS, CHUNK = 4, 16
PLACEHOLDERS = {"pixel_values": 46, "pixel_values_videos": 47}


def long_batch(tokens):
    draw = torch.Generator().manual_seed(3)
    ids = torch.randint(2, 40, (1, tokens), generator=draw)
    labels = torch.full_like(ids, -100)
    labels[:, -9:] = ids[:, -9:]  # the answer lies on the last rank alone
    return {"input_ids": ids, "labels": labels}


class LiveBytes(TorchDispatchMode):
    """Counts the storages that operations make, for as long as anybody holds them; weights were there before."""

    def __init__(self):
        super().__init__()
        self.live, self.peak, self.known = 0, 0, set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(tensor, torch.Tensor):
                self.count(tensor.untyped_storage())
        return out

    def count(self, storage):
        key, num_bytes = storage._cdata, storage.nbytes()
        if key not in self.known:
            self.known.add(key)
            self.live += num_bytes
            self.peak = max(self.peak, self.live)
            weakref.finalize(storage, self.forget, key, num_bytes)

    def forget(self, key, num_bytes):
        self.known.discard(key)
        self.live -= num_bytes


def peak_bytes(model, batch):
    """The most that forward and backward hold at a time, beyond weights."""
    model.zero_grad()
    with LiveBytes() as counted:
        model(**batch).loss.backward()
    return counted.peak


def looked_at(order, tokens=1024):
    """The trace of a step by all ranks, and the most that each held; and one process does, alone or with a share."""
    model = tiny_model(text={"num_hidden_layers": LAYERS}).train()
    model.gradient_checkpointing_enable(order=order, layer_interval=1, sequence_interval=CHUNK)
    whole, trace = long_batch(tokens), []
    neighbours = SequenceGroup(trace=trace)
    # the first rank measures what one process holds alone, the last one what it holds with a share
    before = None
    if neighbours.rank in (0, neighbours.size - 1):
        before = peak_bytes(model, whole if neighbours.rank == 0 else long_batch(tokens // neighbours.size))
    set_sequence_group(model, neighbours)
    span, _ = cut_span(whole, neighbours.rank, neighbours.size, 4, PLACEHOLDERS)
    span["num_items_in_batch"] = 9
    mine = peak_bytes(model, span)  # which warms up, too
    trace.clear()
    dist.barrier()
    model(**span).loss.backward()
    everyones = [None] * neighbours.size
    dist.all_gather_object(everyones, (trace, mine, before))
    traces, peaks, befores = zip(*everyones, strict=True)
    trace = [entry for of_one in traces for entry in of_one]
    held = {"alone_bytes": befores[0], "share_bytes": befores[-1], "ranks_bytes": list(peaks)}
    return {"order": order, **held, **idle(trace), "trace": trace}


def idle(trace):
    """The part of a step in which ranks wait, by the clock; and how much of it a pipeline of equal turns would."""
    if not trace:
        return {}
    ranks, blocks = {rank for rank, *_ in trace}, {block for _, _, block, *_ in trace}
    busy_s = sum(end - start for *_, start, end in trace)
    whole_s = 0
    for what in ("forward", "backward"):
        times = [(start, end) for _, kind, _, start, end in trace if kind == what]
        whole_s += max(end for _, end in times) - min(start for start, _ in times)
    turns = len(blocks) + len(ranks) - 1
    return {"idle": 1 - busy_s / whole_s / len(ranks), "idle_of_equal_turns": (len(ranks) - 1) / turns}


def main(orders):
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    for order in orders:
        found = looked_at(order)
        if dist.get_rank() == 0:
            print("SPANS " + json.dumps(found), flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1:])
