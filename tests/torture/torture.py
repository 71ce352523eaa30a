"""Ill-treatment: mutated inputs, and long commands killed at random moments. Too long for every day: `make torture`."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.tiny import byte_tokenizer
from tests.torture.mutations import ENTRIES, check_files
from tests.weights import checkpoints as made
from video_ma2mba.data.synthetic import make_story
from video_ma2mba.loading import TINY_MODEL

NUM_MUTATIONS = int(os.environ.get("TORTURE_MUTATIONS", "200"))
NUM_KILLS = int(os.environ.get("TORTURE_KILLS", "10"))
ROOT = Path(__file__).resolve().parents[2]
COMMAND = [sys.executable, "-m", "video_ma2mba.cli"]


@pytest.mark.parametrize("entry", ENTRIES)
def test_mutated_inputs_give_an_answer_or_a_message(entry):
    command = [sys.executable, "-m", "tests.torture.mutations", entry, str(NUM_MUTATIONS), "0"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]


def test_mutated_media_are_read_or_refused():
    command = [sys.executable, "-m", "tests.torture.media", str(10 * NUM_MUTATIONS), "0"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]


def test_many_more_clips_are_picked_from_as_they_were_written():
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:randomly", "tests/processing/test_every_container.py"]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, env={**os.environ, "VIDEO_DRAWS": str(10 * NUM_MUTATIONS)}
    )
    assert done.returncode == 0, done.stdout[-2000:]


def prepare(inputs, out):
    rows = []
    for number in range(8):
        make_story(seed=number, duration_s=20).render(inputs / f"{number}.mp4")
        rows.append({"video": f"{number}.mp4", "question": "What is this?", "answer": "a cross"})
    (inputs / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = ["data", "prepare", f"{inputs}/questions.jsonl", "--media-root", str(inputs), "-o", str(out)]
    return [*command, "--cache-frames", "jpeg"], []


def watch(inputs, out):
    make_story(seed=1, duration_s=7200).render(inputs / "long.mp4")
    return ["watch", f"{inputs}/long.mp4", "-o", str(out)], ["--resume"]


def evaluate(inputs, out):
    rows = []
    for number in range(20):
        make_story(seed=number, duration_s=30).render(inputs / f"{number}.mp4")
        row = {"videoID": str(number), "question": "Which?", "answer": "A", "options": ["A. red", "B. blue"]}
        rows += [json.dumps({**row, "question_id": f"{number}-{i}"}) + "\n" for i in range(4)]
    (inputs / "test.jsonl").write_text("".join(rows))
    return ["eval", str(TINY_MODEL), "--task", "videomme", "--data", str(inputs), "-o", str(out)], ["--resume"]


def train(inputs, out):
    command, _ = prepare(inputs, inputs / "data")
    subprocess.run([*COMMAND, *command], check=True, capture_output=True)
    options = {"model": TINY_MODEL, "data": inputs / "data", "output": out, "max_steps": 12, "save_steps": 2}
    options |= {"logging_steps": 1, "global_batch_size": 2, "device_batch_size": 1, "num_workers": 0}
    return ["train", "finetune", *(word for k, v in options.items() for word in ("--set", f"{k}={v}"))], ["--resume"]


def convert(inputs, out):
    made.write_checkpoint(inputs / "text", made.transformers_mamba2_config(), made.mamba2_tensors("embeddings"))
    made.write_checkpoint(inputs / "tower", made.tower_config("clip", True), made.whole_vision_tensors("clip"))
    command = ["convert", "init", "--language-model", f"{inputs}/text", "--vision-model", f"{inputs}/tower"]
    byte_tokenizer().save_pretrained(inputs / "tokenizer")
    return [*command, "--tokenizer", f"{inputs}/tokenizer", "-o", str(out)], []


def results(out):
    """What must be the same after all: the files that hold no times and no paths."""
    kept = {}
    for path in sorted(out.rglob("*")):
        name = path.relative_to(out).as_posix()
        if path.name in ("manifest.jsonl", "model.safetensors") or path.name.startswith(("states-", "snapshot")):
            kept[name.split("-")[0] if name.startswith("states-") else name] = path.read_bytes()
        elif path.name == "answers.jsonl":
            kept[name] = [(a["id"], a["raw"]) for a in map(json.loads, path.read_text().splitlines())]
    return {name: value for name, value in kept.items() if not name.startswith("checkpoints/")}


@pytest.mark.parametrize("start", [prepare, watch, evaluate, train, convert])
def test_a_command_killed_at_any_moment_goes_on_to_the_same_result(start, tmp_path):
    inputs, out = tmp_path / "inputs", tmp_path / "out"
    inputs.mkdir()
    command, resume = start(inputs, out)
    begin = time.monotonic()
    done = subprocess.run([*COMMAND, *command], capture_output=True, text=True)
    whole_s = time.monotonic() - begin
    assert done.returncode == 0, done.stderr
    expected = results(out)
    assert expected
    rng = random.Random(start.__name__)
    for _ in range(NUM_KILLS):
        shutil.rmtree(out)
        for left in tmp_path.glob(".*"):
            shutil.rmtree(left)
        with subprocess.Popen([*COMMAND, *command], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
            try:
                process.wait(rng.uniform(0.2, 1.0) * whole_s)
            except subprocess.TimeoutExpired:
                process.send_signal(signal.SIGKILL)
        if process.returncode != 0:
            was_whole = results(out) == expected
            again = subprocess.run([*COMMAND, *command, *resume], capture_output=True, text=True)
            if "leave the option out" in again.stderr:  # killed before there was anything to go on from
                again = subprocess.run([*COMMAND, *command], capture_output=True, text=True)
            assert again.returncode == 0 or was_whole, again.stderr
        assert results(out) == expected
        assert check_files(out, inputs) is None
        assert not list(tmp_path.glob(".*"))
