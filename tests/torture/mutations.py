"""Feed one entry point of the command line mutated inputs, in this process; prints a line of JSON for each that failed.

    python tests/torture/mutations.py ENTRY COUNT SEED

Exit code 0 says that every input gave an answer or an error with a message. A crash or a hang ends the process.
"""

import contextlib
import faulthandler
import io
import json
import random
import shutil
import sys
import tempfile
import traceback
import warnings
from pathlib import Path

import torch

from video_ma2mba import VideoMa2mbaForConditionalGeneration, VideoMa2mbaProcessor, VideoMemory
from video_ma2mba.cli import main
from video_ma2mba.data.synthetic import make_story
from video_ma2mba.loading import TINY_MODEL

TIMEOUT_S = 60
QUESTION = "What colour was the circle?"
RECIPE = """
model: {model}
data: [data]
output: run
trains: [language_model]
learning_rate: 1.0e-3
weight_decay: 0.0
adam_beta1: 0.9
adam_beta2: 0.95
warmup_ratio: 0.1
max_grad_norm: 1.0
global_batch_size: 2
device_batch_size: 1
num_epochs: 1
max_tokens: 2048
"""


def video(folder: Path) -> list[str]:
    make_story(seed=1, duration_s=8).render(folder / "story.mp4")
    return ["ask", f"{folder}/story.mp4", QUESTION, "--max-new-tokens", "4"]


def memory(folder: Path) -> list[str]:
    model = VideoMa2mbaForConditionalGeneration.from_pretrained(TINY_MODEL).eval()
    kept = VideoMemory(model, VideoMa2mbaProcessor.from_pretrained(TINY_MODEL))
    kept.watch(make_story(seed=1, duration_s=8).render(folder.parent / "story.mp4"), snapshots_s=[3.0])
    kept.save_pretrained(folder / "memory")
    return ["ask", f"{folder}/memory", QUESTION, "--max-new-tokens", "4"]


def model(folder: Path) -> list[str]:
    shutil.copytree(TINY_MODEL, folder / "model", ignore=shutil.ignore_patterns("*.py", "README.md"))
    clip = make_story(seed=1, duration_s=4).render(folder.parent / "story.mp4")
    return ["ask", str(clip), QUESTION, "--max-new-tokens", "4", "--model", f"{folder}/model"]


def plan(folder: Path) -> list[str]:
    shutil.copy(TINY_MODEL / "config.json", folder)
    return ["plan", "--model", str(folder), "--tokens", "5000", "--gpu-memory", "8GiB"]


def records(folder: Path) -> list[str]:
    media = folder.parent / "media"
    media.mkdir()
    for number in range(3):
        make_story(seed=number, duration_s=4).render(media / f"{number}.mp4")
    rows = [
        {"id": str(i), "video": f"{i % 3}.mp4", "conversations": [
            {"from": "human", "value": f"<image>\nQuestion {i}?"}, {"from": "gpt", "value": "Yes."}]}
        for i in range(9)
    ]  # fmt: skip
    (folder / "records.json").write_text(json.dumps(rows, indent=1))
    return ["data", "prepare", f"{folder}/records.json", "--media-root", str(media), "-o", f"{folder}/out"]


def benchmark(folder: Path) -> list[str]:
    media = folder.parent / "data"
    media.mkdir()
    make_story(seed=1, duration_s=4).render(media / "a.mp4")
    row = {"duration": "short", "videoID": "a", "question_id": "1", "question": "Which?", "answer": "A"}
    row |= {"options": ["A. red", "B. blue"], "domain": "Art"}
    rows = [json.dumps({**row, "question_id": str(i)}) + "\n" for i in range(4)]
    (folder / "test.jsonl").write_text("".join(rows))
    command = ["eval", str(TINY_MODEL), "--task", "videomme", "--data", str(folder), "--media-root", str(media)]
    return [*command, "-o", f"{folder}/out"]


def recipe(folder: Path) -> list[str]:
    (folder / "recipe.yaml").write_text(RECIPE.format(model=TINY_MODEL))
    return ["train", f"{folder}/recipe.yaml", "--dry-run"]


ENTRIES = {one.__name__: one for one in (video, memory, model, plan, records, benchmark, recipe)}


def mutate(data: bytes, rng: random.Random) -> bytes:
    """Some bytes flipped, cut off, inserted, zeroed, or a number or a word of a text put wrong."""
    kind = rng.choice(("flip", "flip", "cut", "insert", "zero", "word"))
    at = rng.randrange(max(1, len(data)))
    if kind == "flip":
        changed = bytearray(data)
        for _ in range(rng.randint(1, 8)):
            changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
        return bytes(changed)
    if kind == "cut":
        return data[:at]
    if kind == "insert":
        return data[:at] + rng.randbytes(rng.randint(1, 16)) + data[at:]
    if kind == "zero":
        return data[:at] + bytes(min(64, len(data) - at)) + data[at + 64 :]
    words = [(b"1", b"-1"), (b"2", b"1e99"), (b"0", b"null"), (b'"', b""), (b"true", b"7"), (b"[", b"{"), (b",", b"")]
    old, new = rng.choice(words)
    places = [i for i in range(len(data)) if data.startswith(old, i)] if len(data) < 200_000 else []
    if not places:
        return data[: at // 2]
    place = rng.choice(places)
    return data[:place] + new + data[place + len(old) :]


def try_one(command: list[str]) -> str | None:
    """What is wrong with how the command took it; None if nothing is."""
    out, err = io.StringIO(), io.StringIO()
    faulthandler.dump_traceback_later(TIMEOUT_S, exit=True)
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), warnings.catch_warnings():
            code = main(command)
    except SystemExit as error:
        code = error.code
    except BaseException:
        return traceback.format_exc()
    finally:
        faulthandler.cancel_dump_traceback_later()
    if code not in (0, 2):
        return f"exit code {code}"
    if code == 2 and not err.getvalue().strip():
        return "no message"
    return None


def run(entry: str, count: int, seed: int) -> int:
    torch.set_num_threads(1)
    failures = 0
    with tempfile.TemporaryDirectory() as root:
        folder = Path(root) / "inputs"
        folder.mkdir()
        command = ENTRIES[entry](folder)
        assert try_one(command) is None, "the input is refused before anything was changed"
        for output in folder.glob("out"):
            shutil.rmtree(output)
        whole = Path(root) / "whole"
        shutil.copytree(folder, whole)
        files = sorted(path.relative_to(whole) for path in whole.rglob("*") if path.is_file())
        for number in range(count):
            rng = random.Random(f"{entry} {seed} {number}")
            shutil.rmtree(folder)
            shutil.copytree(whole, folder)
            name = rng.choice(files)
            (folder / name).write_bytes(mutate((whole / name).read_bytes(), rng))
            if problem := try_one(command):
                failures += 1
                print(json.dumps({"number": number, "file": str(name), "problem": problem[-1500:]}), flush=True)
    return failures


if __name__ == "__main__":
    sys.exit(1 if run(sys.argv[1], int(sys.argv[2]), int(sys.argv[3])) else 0)
