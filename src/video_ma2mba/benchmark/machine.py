"""The machine and the versions behind a figure."""

import ctypes
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h
# One thread, for the same sums in the same order. And glibc is to give freed tensors back at once, as it would those of
# a large model: its own thresholds, which it would else raise as it goes. Then resident is what is in use.
_MEASURED = {"OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "131072", "MALLOC_TRIM_THRESHOLD_": "131072"}


def describe(device: str) -> dict[str, Any]:
    import torch
    import transformers

    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


class Clocked(NamedTuple):
    """What some work took, by the clock and of the CPU, and what came of it."""

    seconds: float
    cpu_seconds: float
    result: Any


def clock(work: Callable[[], Any], device: str) -> Clocked:
    """Do some work, and wait until all that it began on the device is done."""
    import torch

    if device == "cuda":
        torch.cuda.synchronize()
    start, cpu_start = time.perf_counter(), time.process_time()
    result = work()
    if device == "cuda":
        torch.cuda.synchronize()
    return Clocked(time.perf_counter() - start, time.process_time() - cpu_start, result)


def timing(name: str, seconds: Sequence[float]) -> dict[str, float]:
    """Of repeated runs: `name`, the median, and NAME_p20 and NAME_p80, which a fifth of them lie below and above."""
    ordered = sorted(seconds)
    low, high = (ordered[round(part * (len(ordered) - 1))] for part in (0.2, 0.8))
    return {name: statistics.median(ordered), f"{name}_p20": low, f"{name}_p80": high}


def allocated_peak_bytes(function: Callable[[], Any]) -> int:
    """Most bytes that torch's CPU allocator held at once during `function`, above what it held before."""
    import torch

    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        function()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    if peak == 0:
        raise RuntimeError(f"torch {torch.__version__} reports no allocations to its profiler")
    return peak


def resident_peak_bytes(function: Callable[[], Any]) -> int:
    """Most bytes of this process that were resident during `function`, above those before, as Linux counts them.

    glibc is told to take large blocks from the system and to give them back at once, or what it keeps would hide some.
    """
    import torch

    from ..planning.measured import peak_bytes, restart_peak

    libc = ctypes.CDLL(None)
    for option in (M_MMAP_THRESHOLD, M_TRIM_THRESHOLD):
        libc.mallopt(option, 128 * 1024)
    device = torch.device("cpu")
    function()  # what libraries keep for the next call is there from now on
    before = restart_peak(device)
    function()
    return max(peak_bytes(device) - before, 0)


def said_by(*command: object, **environment: str) -> Any:
    """The last line, JSON, that `python *command` prints."""
    words = [sys.executable, *map(str, command)]
    done = subprocess.run(words, env={**os.environ, **environment}, capture_output=True, text=True)
    if done.returncode != 0:
        raise OSError(f"{' '.join(words[2:])} failed:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def in_measured_process(module: str, *arguments: object) -> Any:
    """`said_by` of a module, where resident memory is what is in use."""
    return said_by("-m", module, *arguments, **_MEASURED)


@contextmanager
def one_thread() -> Iterator[None]:
    """Inside, torch computes on one thread."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
