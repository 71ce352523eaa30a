"""Benchmarks in the format of their publishers with rendered videos, and a model whose answers are known."""

import json

import pytest
import torch

from video_ma2mba import VideoMemory
from video_ma2mba.data.synthetic import make_story


@pytest.fixture(scope="session")
def clips(tmp_path_factory):
    """A function that puts videos of six seconds under a folder."""
    folder = tmp_path_factory.mktemp("clips")
    files = [make_story(seed=seed, duration_s=6).render(folder / f"{seed}.mp4") for seed in range(3)]

    def place(root, *names):
        for number, name in enumerate(names):
            path = root / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(files[number % len(files)].read_bytes())

    return place


@pytest.fixture
def says(monkeypatch, processor):
    """A function after whose call the model gives the answers of a table {part of the prompt: answer}."""

    def script(table):
        def generate(self, prompts, **kwargs):
            texts = [next(answer for part, answer in table.items() if part in prompt) for prompt in prompts]
            return [torch.tensor(processor.tokenizer(text)["input_ids"], dtype=torch.long) for text in texts]

        monkeypatch.setattr(VideoMemory, "generate", generate)

    return script


def write(path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in value))
    else:
        path.write_text(json.dumps(value))
