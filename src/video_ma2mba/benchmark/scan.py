"""Forward and backward of the Mamba-2 scan in plain torch: this library's against that of the installed transformers.

Ours is what a mixer runs: `ssd_scan` over segments that are computed again in the backward pass. Theirs is
`mamba2_chunk_scan` under autograd. Both get the same inputs in the same process, one after the other in turns.

Peak bytes are those of torch's CPU allocator above what the inputs take, temporaries inside operators included, as its
memory profiler reports every allocation and release. They are exact and the same in every run; the resident size of the
process is neither, because freed memory stays with it.

Seconds of the CPU stand beside those of the clock: where other programs share the machine, they are the fairer figure.
"""

import argparse
import inspect
import statistics
import time
from functools import partial
from typing import Any

import torch
from torch.nn import functional as F
from transformers.models.mamba2 import modeling_mamba2

from ..loading import choose_device
from ..modeling.recompute import recompute_segments
from ..modeling.segment_sizes import SCAN_CHUNK, SEGMENT
from ..modeling.ssd import ssd_scan
from .machine import allocated_peak_bytes, describe

NAMES = ("x", "dt", "A", "B", "C", "D", "state")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="cuda: a mixer's core on the kernels")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--state", type=int, default=128, help="state size")
    parser.add_argument(
        "--their-chunk", type=int, default=256, help="chunk size of theirs; 256 is Mamba2Config's default"
    )
    parser.add_argument("--repeats", type=int, default=5, help="timed runs of each, after one that is not timed")
    parser.add_argument("--threads", type=int, help="CPU threads; torch's choice if left out")
    parser.add_argument("--seed", type=int, default=0)


def run(args: argparse.Namespace) -> dict[str, Any]:
    for name in ("batch", "tokens", "heads", "head_dim", "state", "their_chunk", "repeats"):
        if getattr(args, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')} must be at least 1, got {getattr(args, name)}")
    if choose_device(args.device).type == "cuda":
        from . import mixer

        return mixer.measure(args)
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    inputs, cotangents = _inputs(args)
    scans = {"ours": _ours, "transformers": _theirs(args.their_chunk)}
    results = {name: _forward_backward(scan, inputs, cotangents) for name, scan in scans.items()}  # warms up as well
    times: dict[str, list[float]] = {name: [] for name in scans}
    cpu_times: dict[str, list[float]] = {name: [] for name in scans}
    for _ in range(args.repeats):
        for name, scan in scans.items():
            start, cpu_start = time.perf_counter(), time.process_time()
            _forward_backward(scan, inputs, cotangents)
            times[name].append(time.perf_counter() - start)
            cpu_times[name].append(time.process_time() - cpu_start)
    measured: dict[str, dict[str, Any]] = {
        name: {
            "median_s": statistics.median(times[name]),
            "median_cpu_s": statistics.median(cpu_times[name]),
            "times_s": times[name],
            "peak_bytes": allocated_peak_bytes(partial(_forward_backward, scan, inputs, cotangents)),
        }
        for name, scan in scans.items()
    }
    ours, theirs = measured["ours"], measured["transformers"]
    return {
        "benchmark": "scan",
        "what": "forward and backward, float32, CPU",
        "shape": {name: getattr(args, name) for name in ("batch", "tokens", "heads", "head_dim", "state")},
        "settings": {"segment": SEGMENT, "scan_chunk": SCAN_CHUNK, "their_chunk": args.their_chunk},
        **measured,
        "times_faster": theirs["median_s"] / ours["median_s"],
        "times_less_cpu": theirs["median_cpu_s"] / ours["median_cpu_s"],
        "memory_ratio": ours["peak_bytes"] / theirs["peak_bytes"],
        "largest_difference": _differences(results["ours"], results["transformers"]),
        "machine": describe("cpu"),
    }


def _inputs(args):
    """Leaves that want gradients, in the sizes a trained model has them, and cotangents for y and the final state."""
    draw = torch.Generator().manual_seed(args.seed)

    def normal(*shape):
        return torch.randn(shape, generator=draw)

    b, t, h, p, n = args.batch, args.tokens, args.heads, args.head_dim, args.state
    inputs = [
        normal(b, t, h, p),
        F.softplus(normal(b, t, h) - 3),
        -torch.exp(normal(h)),
        normal(b, t, 1, n),
        normal(b, t, 1, n),
        normal(h),
        normal(b, h, p, n),
    ]
    return [tensor.requires_grad_() for tensor in inputs], (normal(b, t, h, p), normal(b, h, p, n))


def _ours(x, dt, A, B, C, D, state):
    def segment(sequence, states, params):
        (x, dt, B, C), (A, D) = sequence, params
        y, new_state = ssd_scan(x, dt, A, B, C, D, *states)
        return y, (new_state,)

    y, (state,), _ = recompute_segments(segment, SEGMENT, (x, dt, B, C), (state,), (A, D))
    return y, state


def _theirs(chunk_size):
    scan = inspect.unwrap(modeling_mamba2.mamba2_chunk_scan)

    def run_theirs(x, dt, A, B, C, D, state):
        return scan(x, dt, A, B, C, chunk_size, D=D, initial_states=state, return_final_states=True)

    return run_theirs


def _forward_backward(scan, inputs, cotangents):
    outputs = scan(*inputs)
    return *(out.detach() for out in outputs), *torch.autograd.grad(outputs, inputs, cotangents)


def _differences(ours, theirs) -> dict[str, float]:
    """For each result and gradient, the largest difference over the largest element."""
    names = ("y", "final_state", *(f"grad_{name}" for name in NAMES))
    return {
        name: float((mine - other).abs().max() / other.abs().max())
        for name, mine, other in zip(names, ours, theirs, strict=True)
    }
