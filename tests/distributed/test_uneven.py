"""Ranks that see different things: text alone, other numbers of frames, an unreadable sample, a short last batch."""

import json
import shutil

import pytest

from .commands import RUNS, Command

NAMES = ("ddp", "fsdp2", "sequence", "zero3")


@pytest.fixture(scope="module")
def command(model_folder, stories, tmp_path_factory):
    """Seven rows of other lengths, one without a video, one whose video is gone."""
    root = tmp_path_factory.mktemp("uneven")
    shutil.copytree(stories.parent, root / "data")
    prepared = root / "data" / "prepared"
    rows = [json.loads(line) for line in (prepared / "manifest.jsonl").read_text().splitlines()][:6]
    (root / "data" / "3.mp4").write_bytes(b"gone")
    question = {"role": "user", "content": [{"type": "text", "text": "Hello?"}]}
    answer = {"role": "assistant", "content": [{"type": "text", "text": "Yes."}]}
    rows.append({"id": "t", "messages": [question, answer], "watched_s": 0.0, "num_images": 0, "num_characters": 10})
    (prepared / "manifest.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = Command(model_folder, prepared, root)
    command.values |= {"global_batch_size": 2, "max_steps": 0, "num_epochs": 1}
    return command


@pytest.mark.slice
def test_all_go_on_and_every_sample_is_counted_once(command):
    """On all engines, one after another in the same processes."""
    runs = []
    for name in NAMES:
        values = RUNS[name][0]
        runs += [(name, values), (f"{name} off", {**values, "gradient_checkpointing": None})]
    command.start(2, *(command.wanted(*run) for run in runs))
    for name, _ in runs:
        report = command.report(name)
        assert report["skipped_samples"] == 1, name
        assert report["samples"] in (6, 7), name  # a last batch that is short begins again from the first row
        assert all(loss == loss for loss in command.losses(name))


@pytest.mark.parametrize("name", ["fsdp2", "sequence"])
def test_strict_ends_all_ranks_at_a_sample_that_cannot_be_read(command, name):
    values, processes = RUNS[name]
    _, said = command.start(processes, command.wanted(f"{name} strict", values, flags=["--strict"]), fails=True)
    assert "sample 3-0 (3.mp4): " in said
    assert not (command.root / f"{name} strict" / "model").exists()
