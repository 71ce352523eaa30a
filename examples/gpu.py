"""Test and measure on a GPU machine that has no network, and write one JSON.

    make gpu                              # needs torch with CUDA, triton, transformers, peft, accelerate and pytest
    make gpu WHEELS=DIR                   # wheels to unpack first: mamba-ssm, causal-conv1d, einops, av, ...
    make gpu DEVICE=cpu OUT=cpu.json      # the same steps at a tiny size, to see that they run

Nothing is installed: this repository and the wheels are laid out in a temporary folder that the steps import from.
Each step is a process of its own with a time limit; one that fails is written down with its last words, and the others
go on.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LENGTHS = [str(2**n) for n in range(12, 19)]
LONGEST = [str(2**n) for n in range(19, 22)]
TRAIN = ["bench", "train", "--model", "3.1b", "--device", "cuda"]

# name: arguments of `video-ma2mba`, and seconds it may take
ON_CUDA = {
    "backends": (["bench", "backends"], 120),
    "scan": (["bench", "scan", "--device", "cuda", "--tokens", "8192", "--heads", "80"], 300),
    "train_ratios": ([*TRAIN, "--lengths", "4096", "8192", "16384", "--repeats", "3"], 600),
    "train_lengths": ([*TRAIN, "--lengths", *LENGTHS, "--repeats", "1", "--once"], 1200),
    "train_longest": (
        [*TRAIN, "--lengths", *LONGEST, "--methods", "sequence_major + offload", "--repeats", "1", "--once"], 1200,
    ),
    "generate": (
        ["bench", "generate", "--model", "3.1b", "--device", "cuda", "--contexts", str(2**10), str(2**20)], 600,
    ),
    "memory": (["bench", "memory", "--device", "cuda"], 600),
}  # fmt: skip
ON_CPU = {
    "backends": (["bench", "backends"], 120),
    "scan": (["bench", "scan", "--tokens", "256", "--heads", "4", "--repeats", "1"], 120),
    "train": (["bench", "train", "--lengths", "256", "--repeats", "1"], 300),
    "generate": (["bench", "generate", "--contexts", "64", "512", "--new-tokens", "5"], 120),
    "memory": (["bench", "memory", "--device", "cpu", "--lengths", "1024"], 300),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--wheels", type=Path, help="a folder of wheels that the Python lacks")
    parser.add_argument("--output", type=Path, default=Path("gpu.json"))
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        lay_out(Path(folder), args.wheels)
        environment = {**os.environ, "PYTHONPATH": folder, "HF_HUB_OFFLINE": "1"}
        report = {"device": args.device, "steps": {}}
        tests = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "tests/modeling", "--rootdir", str(ROOT)]
        if args.device == "cuda":
            tests.insert(-2, "tests/kernels")
        report["steps"]["tests"] = run_step("tests", tests, 900, environment)
        for name, (command, limit_s) in (ON_CUDA if args.device == "cuda" else ON_CPU).items():
            command = [sys.executable, "-m", "video_ma2mba.cli", *command]
            report["steps"][name] = run_step(name, command, limit_s, environment)
            write(args.output, report)
    failed = [name for name, step in report["steps"].items() if not step["ok"]]
    print(f"{args.output}: {len(report['steps']) - len(failed)} steps done, failed: {', '.join(failed) or 'none'}")
    sys.exit(bool(failed))


def lay_out(folder: Path, wheels: Path | None) -> None:
    """Make `import video_ma2mba` and what is in the wheels work from `folder`."""
    package = folder / "video_ma2mba"
    package.mkdir()
    for part in (*(ROOT / "src" / "video_ma2mba").iterdir(), ROOT / "modeling", ROOT / "processing"):
        (package / part.name).symlink_to(part)
    for wheel in sorted(wheels.glob("*.whl")) if wheels else ():
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(folder)


def run_step(name: str, command: list[str], limit_s: int, environment: dict[str, str]) -> dict:
    """Run one process. Its result is the JSON it prints, or else the end of what it printed."""
    print(f"{name} ...", flush=True)
    start = time.perf_counter()
    try:
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=limit_s)
        ok, text, errors = done.returncode == 0, done.stdout, done.stderr
    except subprocess.TimeoutExpired as error:
        ok, text, errors = False, (error.stdout or b"").decode(), f"took more than {limit_s} s"
    step = {"command": " ".join(command[1:]), "ok": ok, "seconds": round(time.perf_counter() - start, 1)}
    try:
        step["result"] = json.loads(text)
    except json.JSONDecodeError:
        step["output"] = text[-3000:]
    if not ok:
        step["errors"] = errors[-3000:]
    print(f"{name}: {'done' if ok else 'FAILED'} in {step['seconds']} s", flush=True)
    return step


def write(path: Path, report: dict) -> None:
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    partial.replace(path)


if __name__ == "__main__":
    main()
