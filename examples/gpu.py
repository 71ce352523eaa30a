"""Test and measure on a GPU machine that has no network, and write one JSON and one table.

    make gpu                              # needs torch with CUDA, triton, transformers, peft, accelerate and pytest
    make gpu WHEELS=DIR                   # wheels to unpack first: mamba-ssm, causal-conv1d, einops, av, ...
    make gpu PART=1                       # one of three parts of at most nine minutes, the most important first
    make gpu DEVICE=cpu OUT=cpu.json      # the same steps at a tiny size, to see that they run

Nothing is installed: this repository and the wheels are laid out in a temporary folder that the steps import from.
Each step is a process of its own with a time limit; one that fails is written down with its last words and with what it
had measured so far, and the others go on. What is done already, as OUT says, is not done again; `--again` forgets it.
Where the tests failed, or have not run, the table has no figures and says why, and the JSON keeps them; the exit code
is 1, as after any step that fails.
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
TRAIN = ["bench", "train", "--model", "3.1b", "--device", "cuda"]
ONCE = ["--repeats", "1", "--once"]
DEVICE = ["--model", "3.1b", "--device", "cuda"]
PART_S = 540

# parts: name: arguments of `video-ma2mba`, or of pytest, and seconds it may take
ON_CUDA = [
    {
        "tests": (["pytest", "tests/modeling", "tests/kernels"], 150),
        "backends": (["bench", "backends"], 30),
        "train_ratios": (
            [*TRAIN, "--lengths", "16384", "--methods", "off", "per layer", "layer_major", "sequence_major + offload",
             "--repeats", "3"], 100),
        "train_long": (
            [*TRAIN, "--lengths", "65536", "131072", "--methods", "per layer", "sqrt", "layer_major", *ONCE], 120),
        "train_longer": (
            [*TRAIN, "--lengths", "524288", "--methods", "layer_major", "sequence_major + offload", *ONCE], 140),
    },
    {
        "decode": (["bench", "device", "decode", *DEVICE], 90),
        "launches": (["bench", "device", "launches", *DEVICE], 50),
        "watch": (["bench", "device", "watch", *DEVICE], 70),
        "offload": (["bench", "device", "offload", *DEVICE, "--tokens", "65536"], 70),
        "train_longest": ([*TRAIN, "--lengths", "2097152", "--methods", "sequence_major + offload", *ONCE], 260),
    },
    {
        "train_short": (
            [*TRAIN, "--lengths", "4096", "8192", "32768", "262144", "--methods", "per layer", "sqrt", "layer_major",
             "sequence_major + offload", *ONCE], 180),
        "scan": (["bench", "scan", "--device", "cuda", "--dtypes", "bfloat16", "--tokens", "8192"], 80),
        "core": (["bench", "scan", "--device", "cuda", "--dtypes", "bfloat16", "--tokens", "8192", "--rows", "core"],
                 20),
        "generate": (
            ["bench", "generate", *DEVICE, "--contexts", str(2**10), str(2**17)], 60),
        "memory": (["bench", "memory", "--device", "cuda", "--lengths", "16384", "65536"], 80),
    },
]  # fmt: skip
ON_CPU = [
    {
        "tests": (["pytest", "tests/modeling"], 200),
        "backends": (["bench", "backends"], 60),
        "train_ratios": (["bench", "train", "--lengths", "256", "--repeats", "1"], 180),
    },
    {
        "decode": (["bench", "device", "decode", "--new-tokens", "3"], 100),
        "launches": (["bench", "device", "launches", "--tokens", "64", "1100"], 100),
        "watch": (["bench", "device", "watch", "--frames", "8"], 100),
        "offload": (["bench", "device", "offload", "--tokens", "256", "--repeats", "1"], 100),
    },
    {
        "scan": (["bench", "scan", "--sizes", "tiny", "--tokens", "64", "--their-chunks", "16", "--repeats", "1",
                  "--dtypes", "float32", "--rows", "block", "decode"], 150),
        "generate": (["bench", "generate", "--contexts", "64", "512", "--new-tokens", "5"], 120),
        "memory": (["bench", "memory", "--device", "cpu", "--lengths", "1024"], 260),
    },
]  # fmt: skip

# Video-Ma2mba (arXiv 2411.19460), tables 3 and 8, Mamba-2 2.7B: GB, and tokens a second, by log2 of the tokens
PAPER_GB = {
    "off": {10: 2.7, 11: 5.4, 12: 10.7, 13: 21.4, 14: 42.6},
    "per layer": {10: 1.1, 11: 2.2, 12: 4.4, 13: 8.7, 14: 17.4, 15: 34.7, 16: 69.3},
    "sqrt": {10: 0.6, 11: 1.1, 12: 2.2, 13: 4.4, 14: 8.7, 15: 17.3, 16: 34.6, 17: 69.3},
    "layer_major": {10: 0.7, 11: 1.1, 12: 1.8, 13: 2.7, 14: 4.2, 15: 6.9, 16: 10.5, 17: 17.2, 18: 25.9, 19: 42.2},
}
PAPER_TOKENS_PER_S = {
    ("off", 14): 12167.86, ("per layer", 16): 8449.93, ("sqrt", 17): 8617.66, ("layer_major", 19): 7913.58
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--part", type=int, choices=[1, 2, 3], help="default: all, one after the other")
    parser.add_argument("--wheels", type=Path, help="a folder of wheels that the Python lacks")
    parser.add_argument("--output", type=Path, default=Path("gpu.json"), help="the table goes beside it, as .md")
    parser.add_argument("--again", action="store_true", help="do also what OUT has already")
    args = parser.parse_args()
    parts = ON_CUDA if args.device == "cuda" else ON_CPU
    report = {"device": args.device, "steps": {}}
    if args.output.is_file() and not args.again:
        report = json.loads(args.output.read_text(encoding="utf-8"))
        if report["device"] != args.device:
            parser.error(f"{args.output} is of another device, {report['device']}: name another output, or --again")
    with tempfile.TemporaryDirectory() as folder:
        lay_out(Path(folder), args.wheels)
        environment = {**os.environ, "PYTHONPATH": folder, "HF_HUB_OFFLINE": "1"}
        for part in parts if args.part is None else [parts[args.part - 1]]:
            run_part(part, report, args.output, environment)
    steps = {name: report["steps"].get(name) for part in parts for name in part}
    failed = [name for name, step in steps.items() if step and not step["ok"]]
    left = [name for name, step in steps.items() if not step]
    print(
        f"{args.output}, {args.output.with_suffix('.md')}: {len(steps) - len(failed) - len(left)} steps done, failed: "
        f"{', '.join(failed) or 'none'}, not yet: {', '.join(left) or 'none'}"
    )
    sys.exit(bool(failed))


def run_part(part: dict, report: dict, output: Path, environment: dict[str, str], part_s: float = PART_S) -> None:
    """Run the steps of a part that are not done, within its time, and write the report after each."""
    end = time.monotonic() + part_s
    for name, (command, limit_s) in part.items():
        left_s = end - time.monotonic()
        if report["steps"].get(name, {}).get("ok"):
            print(f"{name}: done before", flush=True)
            continue
        if left_s < 10:
            print(f"{name}: no time left; the same command goes on here", flush=True)
            continue
        kept = output.with_name(f".{output.stem}.{name}.json").absolute()
        report["steps"][name] = run_step(name, _argv(command, kept), min(limit_s, left_s), environment, kept)
        kept.unlink(missing_ok=True)
        write(output, json.dumps(report, indent=2) + "\n")
        write(output.with_suffix(".md"), as_table(report))


def _argv(command: list[str], kept: Path) -> list[str]:
    if command[0] == "pytest":
        marked = ["-q", "-m", "gpu", "--rootdir", str(ROOT)]
        return [sys.executable, "-m", "pytest", *marked, *command[1:]]
    return [sys.executable, "-m", "video_ma2mba.cli", *command, "-o", str(kept)]


def lay_out(folder: Path, wheels: Path | None) -> None:
    """Make `import video_ma2mba` and what is in the wheels work from `folder`."""
    package = folder / "video_ma2mba"
    package.mkdir()
    for part in (*(ROOT / "src" / "video_ma2mba").iterdir(), ROOT / "modeling", ROOT / "processing"):
        (package / part.name).symlink_to(part)
    for wheel in sorted(wheels.glob("*.whl")) if wheels else ():
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(folder)


def run_step(
    name: str, command: list[str], limit_s: float, environment: dict[str, str], kept: Path | None = None
) -> dict:
    """Run one process. Its result is the JSON it prints, or what it kept so far, or else the end of what it printed."""
    print(f"{name} ...", flush=True)
    start = time.perf_counter()
    try:
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=limit_s)
        ok, text, errors = done.returncode == 0, done.stdout, done.stderr
        if "pytest" in command and done.returncode == 5:
            ok = True  # on this device there is none to run
    except subprocess.TimeoutExpired as error:
        ok, text, errors = False, (error.stdout or b"").decode(), f"took more than {limit_s:.0f} s"
    step = {"command": " ".join(command[1:]), "ok": ok, "seconds": round(time.perf_counter() - start, 1)}
    try:
        step["result"] = json.loads(text)
    except json.JSONDecodeError:
        if kept is not None and kept.is_file():
            step["result"] = json.loads(kept.read_text(encoding="utf-8"))
        else:
            step["output"] = text[-3000:]
    if not ok:
        step["errors"] = errors[-3000:]
    print(f"{name}: {'done' if ok else 'FAILED'} in {step['seconds']} s", flush=True)
    return step


def as_table(report: dict) -> str:
    """What the steps found, as Markdown: the paper's tables 3 and 8 beside ours, then the rest."""
    results = {name: step["result"] for name, step in report["steps"].items() if "result" in step}
    machine = next((result["machine"]["device"] for result in results.values() if "machine" in result), "nothing yet")
    lines = [f"# Measured on {machine}", ""]
    tests = report["steps"].get("tests")
    if tests is None or not tests["ok"]:
        why = "the tests have not run" if tests is None else "tests failed"
        lines += [f"**No figures: {why}. The JSON keeps what was measured.**", ""]
        lines += ["```", *tests.get("output", tests.get("errors", "")).splitlines()[-20:], "```", ""] if tests else []
    else:
        lines += _figures(results)
    lines += _markdown(
        "steps", ("step", "ended", "seconds"),
        [(name, "well" if step["ok"] else "FAILED", _show(step["seconds"])) for name, step in report["steps"].items()],
    )  # fmt: skip
    return "\n".join(lines)


def _figures(results: dict) -> list[str]:
    rows = [row for name, result in results.items() if name.startswith("train") for row in result["rows"]]
    lines = _markdown(
        "Training, beside the paper's tables 3 (GB over weights and gradients) and 8 (tokens a second, A100)",
        ("tokens", "method", "GB", "planned", "paper", "planner's error", "tokens/s", "paper's"),
        [_train_row(row) for row in sorted(rows, key=lambda row: (row["tokens"], row["method"]))],
    )
    for name, columns in (
        ("launches", ("tokens", "forward", "forward_backward", "with_recompute", "planned")),
        ("decode", ("way", "tokens_per_s", "s_per_new_token_p20", "s_per_new_token_p80")),
        ("watch", ("vision_chunk_size", "frames_per_s")),
        ("offload", ("tokens", "step_s", "step_s_p20", "step_s_p80", "offload_step_s", "ratio")),
        ("generate", ("context_tokens", "prefill_tokens_per_s", "s_per_new_token", "s_per_new_token_p80")),
        ("scan", ("row", "size", "dtype", "pass", "times_faster", "memory_ratio", "over_floor")),
        ("core", ("size", "pass", "times_faster", "memory_ratio")),
        ("memory", ("tokens", "method", "measured_bytes", "predicted_bytes")),
    ):
        if name in results:
            cells = [[_show(row.get(column)) for column in columns] for row in results[name]["rows"]]
            lines += _markdown(name, columns, cells)
    return lines


def _train_row(row: dict) -> list[str]:
    tokens, method = row["tokens"], row["method"]
    power = tokens.bit_length() - 1 if tokens & (tokens - 1) == 0 else None
    gradients = row["planned_bytes"] - row["planned_activations_bytes"]
    peak = row.get("peak_bytes")
    return [
        str(tokens), method,
        "out of memory" if row.get("out_of_memory") else _show(peak and (peak - gradients) / 1e9),
        _show(row["planned_activations_bytes"] / 1e9), _show(PAPER_GB.get(method, {}).get(power)),
        "" if not peak else f"{peak / row['planned_bytes'] - 1:+.1%}",
        _show(row.get("tokens_per_s")), _show(PAPER_TOKENS_PER_S.get((method, power))),
    ]  # fmt: skip


def _markdown(title: str, columns: tuple, rows: list) -> list[str]:
    if not rows:
        return []
    lines = [columns, ["---"] * len(columns), *rows]
    return [f"## {title}", "", *(f"| {' | '.join(line)} |" for line in lines), ""]


def _show(value: object) -> str:
    if value is None:
        return ""
    return f"{value:,.4g}" if isinstance(value, float) else str(value)


def write(path: Path, text: str) -> None:
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)


if __name__ == "__main__":
    main()
