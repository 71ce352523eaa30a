"""How much memory this process has held, as the operating system or the device counts it."""

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
    if Path(
        "/proc/self/status"
    ).exists():  # Linux: ru_maxrss would count what the parent held when it started this process
        return resident("VmHWM")
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def resident(name: str) -> int:
    """Bytes of a line of /proc/self/status: "VmRSS" is resident now, "VmHWM" was at most."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(re.search(rf"^{name}:\s+(\d+) kB", status, re.MULTILINE)[1])
