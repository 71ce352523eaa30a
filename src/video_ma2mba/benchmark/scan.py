"""The scan, a block, a model of a few layers, and a decode step: this library's against transformers' Mamba2.

    video-ma2mba bench scan                                         # every row: many minutes on a CPU
    video-ma2mba bench scan --rows block --sizes 370m --dtypes float32 --tokens 1024 8192
    video-ma2mba bench scan --rows decode                           # within a minute

Both get the same weights and inputs in the same process, one after the other in turns; theirs at the chunk size at
which it is fastest. Seconds of the CPU stand beside those of the clock: where other programs share the machine, they
are the fairer figure. A decode step is one token through `--layers` layers, beside the time of its products of a matrix
and a vector alone, below which no implementation comes.

Peak bytes are told by two that know nothing of each other, above what the inputs take: torch's CPU allocator, whose
every allocation and release the profiler reports; and the operating system, as the resident size of the process at its
peak. On a GPU they are the allocator's, and `--rows core` compares what lies between the projections of a mixer with
mamba_ssm's fused function, which has no convolution state.
"""

import argparse
import itertools
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from ..loading import choose_device, natural, seed_number, whole
from ..modeling.segment_sizes import SCAN_CHUNK, SEGMENT
from ..planning.measured import peak_bytes, restart_peak
from .machine import allocated_peak_bytes, clock, describe, resident_peak_bytes, timing
from .peers import ROWS, SIZES, Pair, make_pair

PASSES = ("forward", "forward_backward")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--rows", nargs="+", choices=[*ROWS, "core"], default=list(ROWS), help="core: on a GPU")
    parser.add_argument("--sizes", nargs="+", choices=["tiny", *SIZES], default=list(SIZES), help="of the backbone")
    parser.add_argument("--dtypes", nargs="+", choices=["float32", "bfloat16"], default=["float32", "bfloat16"])
    parser.add_argument("--passes", nargs="+", choices=PASSES, default=list(PASSES))
    parser.add_argument("--tokens", type=natural, nargs="+", default=[2048])
    parser.add_argument("--layers", type=natural, default=2, help="of the rows model and decode (default: %(default)s)")
    parser.add_argument(
        "--their-chunks", type=natural, nargs="+", default=[64, 128, 256], help="chunk sizes of theirs to choose among"
    )
    parser.add_argument("--repeats", type=natural, default=5, help="timed runs of each, after one that is not timed")
    parser.add_argument("--threads", type=whole(1, 4096), help="CPU threads; torch's choice if left out")
    parser.add_argument("--seed", type=seed_number, default=0)


def run(args: argparse.Namespace) -> dict[str, Any]:
    device = choose_device(args.device).type
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    rows = []
    for row, size, dtype, tokens in itertools.product(args.rows, args.sizes, args.dtypes, args.tokens):
        if row == "decode" and tokens != args.tokens[0]:
            continue  # one token is one token
        passes = [name for name in args.passes if row != "decode" or name == "forward"]
        pair = make_pair(
            row, size, getattr(torch, dtype), tokens, args.layers, args.their_chunks, args.device, args.seed
        )
        for name in passes:
            where = {"row": row, "size": size, "dtype": dtype, "pass": name, "tokens": 1 if row == "decode" else tokens}
            rows.append(where | measure(pair, name, args.repeats, device))
    return {
        "benchmark": "scan",
        "settings": {"segment": SEGMENT, "scan_chunk": SCAN_CHUNK, "layers": args.layers, "repeats": args.repeats},
        "rows": rows,
        "machine": describe(device),
    }


def measure(pair: Pair, name: str, repeats: int, device: str) -> dict[str, Any]:
    """One row: seconds and bytes of both, and how far their results are apart."""
    step = partial(_forward if name == "forward" else _forward_backward, pair)
    # first of all, as a decode step moves the states on; it warms up as well
    of_ours, of_theirs = step(pair.ours), {chunk: step(theirs) for chunk, theirs in pair.theirs.items()}
    tried = {chunk: clock(partial(step, theirs), device).cpu_seconds for chunk, theirs in pair.theirs.items()}
    chunk = min(tried, key=lambda one: tried[one])
    differences = _differences(pair.names, of_ours, of_theirs[chunk])
    del of_ours, of_theirs
    subjects = {"ours": pair.ours, pair.peer: pair.theirs[chunk]}
    if pair.floor is not None:
        subjects["floor"] = pair.floor
    times: dict[str, list[float]] = {key: [] for key in subjects}
    cpu_times: dict[str, list[float]] = {key: [] for key in subjects}
    for _ in range(repeats):
        for key, function in subjects.items():
            seconds, cpu_seconds = clock(partial(step, function), device)[:2]  # results are let go of
            times[key].append(seconds)
            cpu_times[key].append(cpu_seconds)
    measured: dict[str, dict[str, Any]] = {
        key: {
            **timing("median_s", times[key]),
            **timing("median_cpu_s", cpu_times[key]),
            "times_s": times[key],
            **({} if key == "floor" else _peaks(partial(step, function), device)),
        }
        for key, function in subjects.items()
    }
    ours, theirs = measured["ours"], measured[pair.peer]
    compared = {
        "their_chunk": chunk,
        "times_faster": theirs["median_s"] / ours["median_s"],
        "times_less_cpu": theirs["median_cpu_s"] / ours["median_cpu_s"],
        "memory_ratio": ours["peak_bytes"] / max(theirs["peak_bytes"], 1),
        "largest_difference": differences,
    }
    if pair.floor is not None:
        compared["over_floor"] = ours["median_cpu_s"] / measured["floor"]["median_cpu_s"]
    return measured | compared


def _peaks(function: Callable[[], Any], device: str) -> dict[str, int]:
    if device == "cuda":
        before = restart_peak(torch.device(device))
        function()
        return {"peak_bytes": peak_bytes(torch.device(device)) - before}
    return {"peak_bytes": allocated_peak_bytes(function), "resident_peak_bytes": resident_peak_bytes(function)}


def _forward(pair: Pair, function: Callable) -> tuple[torch.Tensor, ...]:
    with torch.no_grad():
        return tuple(function(*pair.inputs))


def _forward_backward(pair: Pair, function: Callable) -> tuple[torch.Tensor, ...]:
    """The outputs, and the gradients of the inputs; those of weights are computed too, and let go of."""
    outputs = function(*pair.inputs)
    draw = torch.Generator(outputs[0].device).manual_seed(0)
    cotangents = [
        torch.randn(out.shape, generator=draw, device=out.device, dtype=torch.float32).to(out.dtype) for out in outputs
    ]
    torch.autograd.backward(outputs, cotangents)
    gradients = [tensor.grad for tensor in pair.inputs]
    for tensor in pair.inputs:
        tensor.grad = None
    return *(out.detach() for out in outputs), *(grad for grad in gradients if grad is not None)


def _differences(names: list[str], ours: tuple, theirs: tuple) -> dict[str, float]:
    """For each result and gradient, the largest difference over the largest element."""
    return {
        name: float((mine - other).abs().max() / other.abs().max())
        for name, mine, other in zip(names, ours, theirs, strict=False)
    }
