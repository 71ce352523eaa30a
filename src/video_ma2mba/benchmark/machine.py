"""The machine and the versions behind a figure."""

import platform
from collections.abc import Callable
from typing import Any


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
