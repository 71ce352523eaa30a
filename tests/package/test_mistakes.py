"""Mistakes of the first hour: one line each, which names the cause and the next step. Nothing else is printed."""

import errno
import json
import re
import shutil
import socket
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch

from video_ma2mba import VideoMemory, cli

QUESTION = "What colour was the circle?"
PREPARE = ("data", "prepare", "--media-root", "{empty}")
# Of other commands, or what they say of themselves: not the error.
BESIDE = re.compile(r"Watching|checking|opening|left out, |which ones and why")


@dataclass
class Mistake:
    """What was typed, in which {names} stand for the fixtures below; what the line must say; what goes wrong there."""

    name: str
    typed: tuple[str, ...]
    cause: str
    next_step: str
    prepare: list = field(default_factory=list)


MISTAKES = [
    Mistake("a wrong path", ("ask", "no.mp4", QUESTION), "no.mp4", "no such file"),
    Mistake("not a video", ("ask", "{text}", QUESTION), "{text}", "not a video"),
    Mistake("a folder in place of a video", ("ask", "{empty}", QUESTION), "{empty}", "folder"),
    Mistake("begun beyond the end", ("ask", "{video}", QUESTION, "--start", "99"), "beyond the end", "10.0"),
    Mistake("no GPU", ("ask", "{video}", QUESTION, "--device", "cuda"), "no CUDA device", "use --device cpu"),
    Mistake("an empty question", ("ask", "{video}", " "), "question 1 is empty", "write it in quotes"),
    Mistake("two videos", ("ask", "{video}", "{video}", QUESTION), "path of a file", "in a call of its own"),
    Mistake(
        "options that a memory has no use for",
        ("ask", "{memory}", QUESTION, "--fps", "2"),
        "--fps: {memory} is a memory",
        "leave the option out",
    ),
    Mistake(
        "the Hub out of reach",
        ("ask", "{video}", QUESTION, "--model", "owner/name"),
        "the Hub cannot be reached",
        "no copy of it is kept on this machine",
    ),
    Mistake(
        "adapters of a Hub out of reach",
        ("ask", "{video}", QUESTION, "--adapter", "owner/name"),
        "the Hub cannot be reached",
        "no copy of it is kept on this machine",
    ),
    Mistake("no such model", ("ask", "{video}", QUESTION, "--model", "modle"), "no such folder", "owner/name"),
    Mistake(
        "a card as a model",
        ("ask", "{video}", QUESTION, "--model", "{card}"),
        "{card}: this folder describes a model and holds no weights",
        "`video-ma2mba convert init`",
    ),
    Mistake(
        "adapters as a model",
        ("ask", "{video}", QUESTION, "--model", "{adapters}"),
        "LoRA adapters and no model",
        "--adapter",
    ),
    Mistake(
        "a missing extra",
        ("train", "finetune"),
        "needs datasets",
        "pip install 'video-ma2mba[train]'",
        ["without_datasets"],
    ),
    Mistake("a full disk", ("watch", "{video}", "-o", "kept"), "No space left on device", "kept", ["full_disk"]),
    Mistake("an output in use", ("merge", "{adapters}", "-o", "{used}"), "{used}: is there already", "another folder"),
    Mistake("something else in the way", ("watch", "{video}", "-o", "{used}"), "{used}", "choose another folder"),
    Mistake("data that are none", (*PREPARE, "{empty}", "-o", "out"), "{empty}", "holds no .json"),
    Mistake("not one record of use", (*PREPARE, "{questions}", "-o", "out"), "not one of 1 records", "the first: "),
    Mistake(
        "written into its own data", (*PREPARE, "{data}", "-o", "{data}"), "{data} holds the data", "another output"
    ),
    Mistake(
        "an empty option", ("ask", "{video}", QUESTION, "--model", ""), "after --model is empty", "leave the option"
    ),
    Mistake("more pictures than a video has", ("ask", "{video}", QUESTION, "--fps", "1e9"), "--fps", "to 1000"),
    Mistake(
        "an end before the start", ("ask", "{video}", QUESTION, "--start", "5", "--end", "3"), "--end 3", "--start 5"
    ),
    Mistake(
        "a key without a server", ("chat", "{video}", "--api-key-file", "{text}"), "--api-key-file", "leave it out"
    ),
    Mistake(
        "an address that is none",
        ("chat", "{video}", "--server", "http://localhost:99999"),
        "localhost:99999",
        "like http:",
    ),
    Mistake(
        "adapters that are not there", ("merge", "nope", "-o", "m"), "nope: there is no adapter", "`train finetune"
    ),
    Mistake(
        "a file as the output", ("eval", "{model}", "--task", "niah", "-o", "{text}"), "{text} is a file", "a folder"
    ),
    Mistake(
        "the likeliest option of none",
        ("eval", "{model}", "--task", "own", "--data", "{free}", "--media-root", "{media}", "--by-likelihood"),
        "--by-likelihood is for multiple choice",
        "1 have no options; the first: {free}",
    ),
    Mistake("no size", ("plan", "--model", "3.1b", "--hours", "1", "--gpu-memory", "x24"), "x24", "80GiB"),
]
TRAINING = [
    Mistake("a typo in a recipe", ("train", "finetune_lora"), "finetune_lora: no such recipe", "mean finetune-lora?"),
    Mistake("keys of one recipe", ("train", "finetune", "--keys"), "--keys", "leave finetune out"),
    Mistake(
        "a dry run that goes on", ("train", "finetune", "--dry-run", "--resume"), "--resume", "leave one of them out"
    ),
    Mistake("a typo in a key", ("train", "finetune", "--set", "modle=x"), "--set modle", "did you mean 'model'?"),
    Mistake(
        "data that are not prepared",
        ("train", "finetune", "--set", "model={model}", "--set", "data={data}", "--set", "output=run"),
        "{data} is not prepared yet",
        "video-ma2mba data prepare",
    ),
]
SERVING = [
    Mistake("a port that is taken", ("serve", "{model}", "--port", "{port}"), "--port {port}", "name another"),
    Mistake("no such port", ("serve", "{model}", "--port", "99999"), "--port", "from 0 to 65,535"),
    Mistake("no such file of keys", ("serve", "{model}", "--api-key-file", "nope"), "error: nope: ", "No such file"),
]


@pytest.fixture
def places(model_folder, video, model, processor, tmp_path, monkeypatch):
    """What the {names} stand for; the commands run in a folder of their own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for name in ("empty", "used", "card", "adapters", "data"):
        (tmp_path / name).mkdir()
    (tmp_path / "used" / "thesis.txt").write_text("five years")
    (tmp_path / "text.mp4").write_text("To whom it may concern. " * 50)
    for file in Path(model_folder).iterdir():
        if file.suffix != ".safetensors":
            shutil.copy(file, tmp_path / "card")
    (tmp_path / "adapters" / "adapter_config.json").write_text("{}")
    row = json.dumps({"video": "gone.mp4", "question": "What?", "answer": "Nothing."}) + "\n"
    for file in (tmp_path / "questions.jsonl", tmp_path / "data" / "questions.jsonl"):
        file.write_text(row)
    free = {"video": Path(video).name, "question": "What?", "answer": "Nothing."}
    (tmp_path / "free.jsonl").write_text(json.dumps(free) + "\n")
    memory = VideoMemory(model, processor)
    memory.watch(video)
    memory.save_pretrained(tmp_path / "memory")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        yield {
            "video": video, "model": model_folder, "text": "text.mp4", "questions": "questions.jsonl",
            "port": taken.getsockname()[1], "memory": "memory", "free": "free.jsonl", "media": Path(video).parent,
            **{name: name for name in ("empty", "used", "card", "adapters", "data")},
        }  # fmt: skip


@pytest.fixture
def full_disk(monkeypatch):
    def save_file(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device", "kept")

    monkeypatch.setattr("video_ma2mba.modeling.video_memory_files.save_file", save_file)


@pytest.fixture
def without_datasets(monkeypatch):
    def run(args):
        raise ModuleNotFoundError("No module named 'datasets'", name="datasets")

    monkeypatch.setattr(cli.train, "run", run)


def check(mistake, places, capsys, request):
    for name in mistake.prepare:
        request.getfixturevalue(name)
    words = [word.format(**places) for word in mistake.typed]
    if words[0] in ("ask", "watch") and "--model" not in words:
        words += ["--model", places["model"]]
    code = cli.main(words)
    out, err = capsys.readouterr()
    assert code == 2
    assert out == ""
    lines = [line for line in err.splitlines() if line.strip() and not BESIDE.match(line)]
    assert len(lines) == 1, err
    for wanted in (mistake.cause, mistake.next_step):
        assert wanted.format(**places) in lines[0], lines[0]


@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda mistake: mistake.name)
def test_a_mistake_is_one_line(mistake, places, capsys, request):
    check(mistake, places, capsys, request)


@pytest.mark.parametrize("mistake", TRAINING, ids=lambda mistake: mistake.name)
def test_a_mistake_in_a_training_is_one_line(mistake, places, capsys, request):
    check(mistake, places, capsys, request)


@pytest.mark.parametrize("mistake", SERVING, ids=lambda mistake: mistake.name)
def test_a_mistake_of_a_server_is_one_line(mistake, places, capsys, request):
    check(mistake, places, capsys, request)
