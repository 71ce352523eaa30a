"""Start a module of the tests in several processes."""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def launch(module, *arguments, processes=2, timeout_s=300, **environment):
    """`python -m torch.distributed.run ... -m module arguments`: the `CompletedProcess`, its output as text."""
    command = [sys.executable, "-P", "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    fixed = {
        "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu", "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": str(ROOT),
    }  # fmt: skip
    command += ["-m", module, *map(str, arguments)]
    with subprocess.Popen(
        command, env={**os.environ, **fixed, **environment}, cwd=ROOT, text=True, stdout=subprocess.PIPE,
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
