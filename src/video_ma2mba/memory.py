"""How much memory a process has held, as the operating system or the device counts it."""

import ctypes
import gc
import json
import os
import re
import resource
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

# One thread, for the same sums in the same order. And glibc is to give freed tensors back at once, as it would those of
# a large model: its own thresholds, which it would else raise as it goes. Then resident is what is in use.
_MEASURED = {"OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "131072", "MALLOC_TRIM_THRESHOLD_": "131072"}


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


def in_measured_process(module: str, *arguments: object) -> Any:
    """The last line, JSON, that `python -m module arguments` prints, where resident memory is what is in use."""
    command = [sys.executable, "-m", module, *map(str, arguments)]
    done = subprocess.run(command, env={**os.environ, **_MEASURED}, capture_output=True, text=True)
    if done.returncode != 0:
        raise OSError(f"{' '.join(command[2:])} failed:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def _resident(name: str) -> int:
    """Bytes of a line of /proc/self/status: "VmRSS" is resident now, "VmHWM" was at most."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(re.findall(rf"^{name}:\s+(\d+) kB", status, re.MULTILINE)[0])
