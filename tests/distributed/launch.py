"""Start a module of the tests in several processes: by torch's launcher, or forked, which spares each its imports."""

import json
import os
import subprocess
import sys
from pathlib import Path

from .. import forked

ROOT = Path(__file__).resolve().parents[2]
FIXED = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu", "HF_HUB_OFFLINE": "1"}


def fork(module, *arguments, processes=2, timeout_s=300):
    """`launch`, where it is not asked who ends the processes of one that failed."""
    codes, out, err = forked.run(forked.MODULE, [module, *arguments], processes, timeout_s, ROOT, **FIXED)
    return subprocess.CompletedProcess([module, *arguments], max(map(abs, codes)), out, err)


def launch(module, *arguments, processes=2, timeout_s=300):
    """`python -m torch.distributed.run ... -m module arguments`: the `CompletedProcess`, its output as text."""
    command = [sys.executable, "-P", "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    command += ["-m", module, *map(str, arguments)]
    with subprocess.Popen(
        command, env={**os.environ, **FIXED, "PYTHONPATH": str(ROOT)}, cwd=ROOT, text=True, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as started:  # fmt: skip
        try:
            out, err = started.communicate(timeout=timeout_s)
        except subprocess.TimeoutExpired:
            started.terminate()  # it ends those that it started, which a kill would leave behind
            out, err = started.communicate()
            err += f"\nstill running after {timeout_s} s"
    return subprocess.CompletedProcess(command, started.returncode, out, err)


def lines(done, mark):
    """The JSON behind `mark` on the lines of an output."""
    return [json.loads(line.partition(" ")[2]) for line in done.stdout.splitlines() if line.startswith(mark + " ")]
