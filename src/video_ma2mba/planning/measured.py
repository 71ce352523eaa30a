"""How much memory a process has held, as the operating system or the device counts it."""

import ctypes
import gc
import re
import resource
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def peak_bytes(device: "torch.device") -> int:
    """The most so far: allocated by torch on a CUDA device, resident on the CPU."""
    import torch

    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    # Linux: ru_maxrss would count what the parent held when it started this process
    if Path("/proc/self/status").exists():
        return _resident("VmHWM")
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def restart_peak(device: "torch.device") -> int:
    """Let `peak_bytes` count anew (Linux); returns what is held now."""
    import torch

    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device)
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    return _resident("VmRSS")


def _resident(name: str) -> int:
    """Bytes of a line of /proc/self/status: "VmRSS" is resident now, "VmHWM" was at most."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(re.findall(rf"^{name}:\s+(\d+) kB", status, re.MULTILINE)[0])
