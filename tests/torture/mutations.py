"""Feed one entry point of the command line mutated inputs, in this process; prints a line of JSON for each that failed.

    python -m tests.torture.mutations ENTRY COUNT SEED

Exit code 0 says that every input gave an answer or an error with a message, and that every file written is whole. A
crash or a hang ends the process.
"""

import contextlib
import faulthandler
import io
import json
import os
import random
import shutil
import sys
import tempfile
import traceback
import warnings
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model
from PIL import Image
from safetensors import safe_open

from tests.tiny import byte_tokenizer
from tests.weights import checkpoints as made
from video_ma2mba import VideoMa2mbaForConditionalGeneration, VideoMa2mbaProcessor, VideoMemory
from video_ma2mba.cli import main
from video_ma2mba.data.synthetic import make_story
from video_ma2mba.loading import TINY_MODEL
from video_ma2mba.training.lora import lora_config

TIMEOUT_S = 60
ASKED = ["What colour was the circle?", "--max-new-tokens", "4"]
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


def story(path: Path, duration_s: int = 4) -> str:
    return str(make_story(seed=1, duration_s=duration_s).render(path))


def video(folder: Path) -> list[str]:
    return ["ask", story(folder / "story.mp4", 8), *ASKED]


def watched(folder: Path) -> list[str]:
    return ["watch", story(folder / "story.mp4", 8), "-o", f"{folder}/out", "--snapshots", "3"]


def memory(folder: Path) -> list[str]:
    model = VideoMa2mbaForConditionalGeneration.from_pretrained(TINY_MODEL).eval()
    kept = VideoMemory(model, VideoMa2mbaProcessor.from_pretrained(TINY_MODEL))
    kept.watch(story(folder.parent / "story.mp4", 8), snapshots_s=[3.0])
    kept.save_pretrained(folder / "memory")
    return ["ask", f"{folder}/memory", *ASKED]


def copy_model(folder: Path) -> str:
    return str(shutil.copytree(TINY_MODEL, folder / "model", ignore=shutil.ignore_patterns("*.py", "README.md")))


def model(folder: Path) -> list[str]:
    return ["ask", story(folder.parent / "story.mp4"), *ASKED, "--model", copy_model(folder)]


def adapter(folder: Path) -> list[str]:
    base = VideoMa2mbaForConditionalGeneration.from_pretrained(TINY_MODEL)
    get_peft_model(base, lora_config(rank=2)).save_pretrained(folder / "adapter")
    (folder / "adapter" / "README.md").unlink()
    return ["ask", story(folder.parent / "story.mp4"), *ASKED, "--adapter", f"{folder}/adapter"]


def shared(folder: Path) -> list[str]:
    """Without a card, which is then rendered."""
    rows = [{"dataset": "shapes", "metric": "accuracy", "value": 0.97}]
    (folder / "training.json").write_text(json.dumps({"steps": 5000, "data": "synthetic"}))
    (folder / "evaluation.json").write_text(json.dumps({"results": rows}))
    reports = ["--training", f"{folder}/training.json", "--evaluation", f"{folder}/evaluation.json"]
    return ["share", copy_model(folder), "--repo", "somebody/tiny", "--dry-run", *reports]


def parts(folder: Path) -> list[str]:
    made.write_checkpoint(folder / "text", made.state_spaces_config(), made.mamba2_tensors(), num_shards=2)
    made.write_checkpoint(folder / "tower", made.tower_config("clip", True), made.whole_vision_tensors("clip"))
    byte_tokenizer().save_pretrained(folder / "text")
    command = ["convert", "init", "--language-model", f"{folder}/text", "--vision-model", f"{folder}/tower"]
    return [*command, "-o", f"{folder}/out"]


def checkpoint(folder: Path) -> list[str]:
    made.write_checkpoint(folder / "source", made.llava_config("siglip"), made.llava_tensors("siglip"), suffix="bin")
    (folder / "tower").mkdir()
    (folder / "tower" / "config.json").write_text(json.dumps(made.tower_config("siglip", False)))
    byte_tokenizer().save_pretrained(folder / "source")
    command = ["convert", "llava-mamba", f"{folder}/source", "--vision-model", f"{folder}/tower"]
    return [*command, "-o", f"{folder}/out"]


def plan(folder: Path) -> list[str]:
    shutil.copy(TINY_MODEL / "config.json", folder)
    return ["plan", "--model", str(folder), "--tokens", "5000", "--gpu-memory", "8GiB"]


def records(folder: Path) -> list[str]:
    for number in range(2):
        story(folder / f"{number}.mp4")
    rows = [
        {"id": str(i), "video": f"{i % 2}.mp4", "conversations": [
            {"from": "human", "value": f"<image>\nQuestion {i}?"}, {"from": "gpt", "value": "Yes."}]}
        for i in range(9)
    ]  # fmt: skip
    (folder / "records.json").write_text(json.dumps(rows, indent=1))
    command = ["data", "prepare", f"{folder}/records.json", "--media-root", str(folder), "-o", f"{folder}/out"]
    return [*command, "--cache-frames", "jpeg", "--model", str(TINY_MODEL)]


def benchmark(folder: Path) -> list[str]:
    story(folder / "a.mp4")
    row = {"duration": "short", "videoID": "a", "question_id": "1", "question": "Which?", "answer": "A"}
    row |= {"options": ["A. red", "B. blue"], "domain": "Art"}
    rows = [json.dumps({**row, "question_id": str(i)}) + "\n" for i in range(4)]
    (folder / "test.jsonl").write_text("".join(rows))
    return ["eval", str(TINY_MODEL), "--task", "videomme", "--data", str(folder), "-o", f"{folder}/out"]


def resumed(folder: Path) -> list[str]:
    """What an evaluation left behind, of which one answer is missing."""
    data = folder.parent / "data"
    data.mkdir()
    command = benchmark(data)
    command[-1] = f"{folder}/run"
    main(command)
    answers = folder / "run" / "answers.jsonl"
    answers.write_text(answers.read_text().partition("\n")[0])
    return [*command, "--resume"]


def needles(folder: Path) -> list[str]:
    story(folder / "haystack.mp4", 8)
    Image.new("RGB", (64, 64), "red").save(folder / "needle.png")
    row = {"image": "needle.png", "question": "What colour was it?", "answer": "red"}
    (folder / "needles.jsonl").write_text(json.dumps(row) + "\n")
    command = ["eval", str(TINY_MODEL), "--task", "niah", "--data", str(folder), "--minutes", "0.1", "--depths", "0.5"]
    return [*command, "-o", f"{folder}/out"]


def manifest(folder: Path) -> list[str]:
    data = folder.parent / "data"
    data.mkdir()
    command = records(data)
    command[command.index("-o") + 1] = f"{folder}/prepared"
    main(command)
    options = {"model": TINY_MODEL, "data": f"{folder}/prepared", "output": f"{folder}/out", "max_steps": 1}
    options |= {"global_batch_size": 1, "device_batch_size": 1, "num_workers": 0}
    return ["train", "finetune-lora", *(word for k, v in options.items() for word in ("--set", f"{k}={v}"))]


def recipe(folder: Path) -> list[str]:
    (folder / "recipe.yaml").write_text(RECIPE.format(model=TINY_MODEL))
    return ["train", f"{folder}/recipe.yaml", "--dry-run"]


ENTRIES = {
    one.__name__: one
    for one in (video, watched, memory, model, adapter, shared, parts, checkpoint, plan, records, benchmark, resumed,
                needles, recipe, manifest)
}  # fmt: skip


def read_back(entry: str, folder: Path) -> list[str] | None:
    """The command that must do with what an entry wrote, if it wrote anything."""
    out = folder / "out"
    if entry == "watched" and out.exists():
        return ["ask", str(out), *ASKED]
    if entry in ("parts", "checkpoint") and out.exists():
        return ["ask", str(folder.parent / "whole.mp4"), *ASKED, "--model", str(out)]
    if entry == "records" and (out / "manifest.jsonl").exists() and (out / "manifest.jsonl").stat().st_size:
        options = {"model": TINY_MODEL, "data": out, "output": "run"}
        return ["train", "finetune", "--dry-run", *(word for k, v in options.items() for word in ("--set", f"{k}={v}"))]
    return None


def misplaced(value: Any, rng: random.Random) -> Any:
    """A JSON value with one of another kind in some place."""
    if not isinstance(value, dict | list) or not value or rng.random() < 0.1:
        return rng.choice([None, True, -1, 1e99, "", "x", [], ["x"], {}, {"x": 1}])
    key = rng.choice(list(value) if isinstance(value, dict) else range(len(value)))
    value[key] = misplaced(value[key], rng)
    return value


def put_wrong(data: bytes, rng: random.Random) -> bytes | None:
    """A JSON, or one line of JSON lines, with a value misplaced; None where it is neither."""
    lines = data.splitlines()
    number = rng.randrange(max(1, len(lines)))
    for first, last in ((0, len(lines)), (number, number + 1)):
        with contextlib.suppress(ValueError):
            changed = json.dumps(misplaced(json.loads(b"\n".join(lines[first:last])), rng))
            return b"\n".join([*lines[:first], changed.encode(), *lines[last:]])
    return None


def mutate(data: bytes, rng: random.Random) -> bytes:
    """Some bytes flipped, cut off, inserted, zeroed, or a word of a text or a value of a JSON put wrong."""
    if not data:
        return rng.randbytes(rng.randint(1, 16))
    kind = rng.choice(("flip", "flip", "cut", "insert", "zero", "word", "value", "value"))
    at = rng.randrange(len(data))
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
    if kind == "value" and (changed := put_wrong(data, rng)) is not None:
        return changed
    words = [(b"1", b"-1"), (b"2", b"1e99"), (b"0", b"null"), (b'"', b""), (b"true", b"7"), (b"[", b"{"), (b",", b"")]
    old, new = rng.choice(words)
    places = [i for i in range(len(data)) if data.startswith(old, i)] if len(data) < 200_000 else []
    if not places:
        return data[: at // 2]
    place = rng.choice(places)
    return data[:place] + new + data[place + len(old) :]


def try_one(command: list[str], codes: tuple[int, ...] = (0, 2)) -> str | None:
    """What is wrong with how the command took it; None if nothing is."""
    out, err = io.StringIO(), io.StringIO()
    faulthandler.dump_traceback_later(TIMEOUT_S, exit=True)
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), warnings.catch_warnings():
            code = main(command)
    except BaseException:
        return traceback.format_exc()
    finally:
        faulthandler.cancel_dump_traceback_later()
    if code not in codes:
        return f"exit code {code}: {err.getvalue()}"
    if code == 2 and not err.getvalue().strip():
        return "no message"
    return None


def check_files(folder: Path, whole: Path) -> str | None:
    """Which file that was not there before is left over or cut off; None if none is."""
    for path in folder.rglob("*"):
        name = path.relative_to(folder)
        if (whole / name).exists():
            continue
        if path.name.startswith(".") or "partial" in path.name:
            return f"left over: {name}"
        try:
            if path.suffix == ".json":
                json.loads(path.read_text())
            elif path.suffix == ".jsonl":
                _ = [json.loads(line) for line in path.read_text().splitlines() if line]
            elif path.suffix == ".safetensors":
                safe_open(path, framework="pt")
            elif path.suffix == ".png":
                Image.open(path).load()
        except Exception as error:
            return f"half-written: {name}: {error}"
    return None


def run(entry: str, count: int, seed: int) -> int:
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    failures = 0
    with tempfile.TemporaryDirectory() as root:
        os.environ["HF_DATASETS_CACHE"] = f"{root}/cache"
        story(Path(root) / "whole.mp4")
        folder = Path(root) / "inputs"
        folder.mkdir()
        command = ENTRIES[entry](folder)
        whole = Path(root) / "whole"
        shutil.copytree(folder, whole)
        files = sorted(path.relative_to(whole) for path in whole.rglob("*") if path.is_file())
        for number in range(-1, count):
            rng = random.Random(f"{entry} {seed} {number}")
            shutil.rmtree(folder)
            shutil.copytree(whole, folder)
            name = rng.choice(files)
            if number >= 0:
                (folder / name).write_bytes(mutate((whole / name).read_bytes(), rng))
            problem = try_one(command, (0, 2) if number >= 0 else (0,)) or check_files(folder, whole)
            if problem is None and (reader := read_back(entry, folder)):
                problem = try_one(reader, (0,))
            if problem:
                failures += 1
                print(json.dumps({"number": number, "file": str(name), "problem": problem[-1500:]}), flush=True)
    return failures


if __name__ == "__main__":
    sys.exit(1 if run(sys.argv[1], int(sys.argv[2]), int(sys.argv[3])) else 0)
