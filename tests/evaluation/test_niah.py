"""Needles: where they are put, whether they count as found, a run that goes on."""

import copy
import json
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image

from video_ma2mba import VideoMemory
from video_ma2mba.cli import main
from video_ma2mba.evaluation import niah


def test_a_needle_lies_at_its_depth(model, processor, tmp_path, monkeypatch):
    haystack = torch.arange(40, dtype=torch.uint8)[:, None, None, None].expand(40, 3, 28, 28).contiguous()
    needle = niah.Needle(torch.full((2, 3, 28, 28), 255, dtype=torch.uint8), "What?", "white")
    seen = []
    push, duplicate, generate = VideoMemory.push_frames, VideoMemory.copy, VideoMemory.generate

    def pushed(self, frames, timestamps_s=None):
        push(self, frames, timestamps_s)
        self.history = [*getattr(self, "history", []), *frames[:, 0, 0, 0].tolist()]

    def copied(self):
        other = duplicate(self)
        other.history = list(getattr(self, "history", []))
        return other

    def generated(self, *args, **kwargs):
        seen.append(self.history)
        return generate(self, *args, **kwargs)

    monkeypatch.setattr(VideoMemory, "push_frames", pushed)
    monkeypatch.setattr(VideoMemory, "copy", copied)
    monkeypatch.setattr(VideoMemory, "generate", generated)
    arguments = model, processor, [lambda num_frames: haystack[:num_frames]], [needle]
    cells = niah.find_needles(*arguments, [10, 20], [0.0, 0.5, 1.0], tmp_path)
    assert [(cell["num_frames"], cell["depth"]) for cell in cells] == [
        (10, 0.0), (10, 0.5), (10, 1.0), (20, 0.0), (20, 0.5), (20, 1.0)
    ]  # fmt: skip
    for cell, frames in zip([*cells[3:], *cells[:3]], seen, strict=True):  # the longest were first
        place = round(cell["depth"] * cell["num_frames"])
        assert frames == [*range(place), 255, 255, *range(place, cell["num_frames"])]
    lines = (tmp_path / niah.CELLS).read_text().splitlines()
    damaged = [lines[1].replace('"needle": 0', '"needle": []'), lines[1].replace('"found": ', '"found": 7')]
    (tmp_path / niah.CELLS).write_text("\n".join([*lines, *damaged]))
    cells_again = niah.find_needles(*arguments, [10, 20], [0.0, 0.5, 1.0], tmp_path)
    assert cells_again == cells
    assert len(seen) == 6  # none was asked again


def test_needles_are_dealt_to_haystacks(model, processor, tmp_path, monkeypatch):
    needles = [niah.Needle(torch.full((1, 3, 28, 28), 200 + i, dtype=torch.uint8), "What?", "white") for i in range(3)]
    made, seen = [], []

    def made_of(number, num_frames):
        made.append((num_frames, number))
        return torch.full((num_frames, 3, 28, 28), number, dtype=torch.uint8)

    def pushed(self, frames, timestamps_s=None):
        self.kinds = {*getattr(self, "kinds", ()), *frames[:, 0, 0, 0].tolist()}

    monkeypatch.setattr(VideoMemory, "push_frames", pushed)
    monkeypatch.setattr(VideoMemory, "copy", copy.copy)
    monkeypatch.setattr(niah, "_ask", lambda memory, needle: (seen.append(memory.kinds), ("white", True))[1])
    haystacks = [partial(made_of, number) for number in range(2)]
    cells = niah.find_needles(model, processor, haystacks, needles, [4, 8], [0.5], tmp_path)
    assert [(cell["needle"], cell["haystack"]) for cell in cells] == 2 * [(0, 0), (1, 1), (2, 0)]
    assert seen == 2 * [{0, 200}, {0, 202}, {1, 201}]
    assert made == [(8, 0), (8, 1), (4, 0), (4, 1)]  # one at a time, and one for each length
    niah.find_needles(model, processor, haystacks[:1], needles, [4], [0.5], tmp_path)
    assert seen[6:] == [{0, 201}]  # of the three, that one had not been in this haystack


def test_found_means_every_token(model, processor, tmp_path, monkeypatch):
    answers = iter([[1, 2, 3], [1, 2, 4]])
    monkeypatch.setattr(VideoMemory, "generate", lambda self, *a, **k: (torch.tensor(next(answers)),))
    monkeypatch.setattr(type(processor.tokenizer), "__call__", lambda self, *a, **k: {"input_ids": [1, 2, 3]})
    memory = object.__new__(VideoMemory)
    memory.processor = processor
    needle = niah.Needle(torch.zeros(1), "What?", "xyz")
    assert niah._ask(memory, needle)[1]
    assert not niah._ask(memory, needle)[1]


def test_the_synthetic_haystack_holds_no_needle(processor):
    haystack, other = (niah.synthetic_haystack(processor, number, 700) for number in range(2))
    assert haystack.shape == other.shape == (700, 3, 28, 28)
    assert not torch.equal(haystack, other)
    assert [needle.answer for needle in niah.synthetic_needles(processor)] == list(niah.COLOURS)


def test_the_command_draws_a_map_and_goes_on(model_folder, tmp_path, capsys):
    command = ["eval", model_folder, "--task", "niah", "--minutes", "0.2", "0.4", "--depths", "0", "1", "-o"]
    command.append(str(tmp_path / "out"))
    assert main(command) == 0
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert [(row["num_frames"], row["depth"], row["num_needles"]) for row in report["rows"]] == [
        (12, 0.0, 6), (12, 1.0, 6), (24, 0.0, 6), (24, 1.0, 6)
    ]  # fmt: skip
    assert (tmp_path / "out" / "report.png").read_bytes().startswith(b"\x89PNG")
    assert main([*command, "--resume"]) == 0
    assert json.loads((tmp_path / "out" / "report.json").read_text()) == report


def test_needles_of_ones_own(processor, tmp_path):
    Image.fromarray(np.full((30, 30, 3), 200, np.uint8)).save(tmp_path / "a.png")
    lines = [{"image": "a.png", "question": "What?", "answer": "grey"}]
    (tmp_path / "needles.jsonl").write_text("\n".join(map(json.dumps, lines)))
    (needle,) = niah.read_needles(tmp_path, processor)
    assert needle.frames.shape == (1, 3, 28, 28)
    for bad in ("{", '{"image": "a.png"}', '{"image": "../x.png", "question": "?", "answer": "a"}'):
        (tmp_path / "needles.jsonl").write_text(bad)
        with pytest.raises(ValueError, match=r"needles\.jsonl:1"):
            niah.read_needles(tmp_path, processor)
    (tmp_path / "needles.jsonl").write_text(json.dumps(lines[0]))
    (tmp_path / "a.png").write_bytes((tmp_path / "a.png").read_bytes().replace(b"IDAT", b"I\0AT"))
    with pytest.raises(ValueError, match=r"a\.png"):
        niah.read_needles(tmp_path, processor)


def test_a_haystack_that_is_too_short(model, processor, tmp_path):
    frames = torch.zeros(5, 3, 28, 28, dtype=torch.uint8)
    haystacks, needles = [lambda num_frames: frames], [niah.Needle(frames[:1], "What?", "black")]
    with pytest.raises(ValueError, match="has 5 frames, and 10 are asked for"):
        niah.find_needles(model, processor, haystacks, needles, [5, 10], [0.0], tmp_path)
    assert not (tmp_path / niah.CELLS).read_text()


def test_a_folder_without_needles(processor, tmp_path):
    with pytest.raises(ValueError, match=r"there is no needles\.jsonl in it"):
        niah.read_needles(tmp_path, processor)
