"""A prepared data set of four small stories, and a recipe for it."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from video_ma2mba.data.prepare import prepare
from video_ma2mba.data.synthetic import make_story


@pytest.fixture(scope="session")
def stories(tmp_path_factory) -> Path:
    """A prepared folder of eight conversations about videos of 3 to 10 seconds."""
    root = tmp_path_factory.mktemp("stories")
    rng = np.random.default_rng(0)
    with (root / "source.jsonl").open("w") as file:
        for seed in range(8):
            story = make_story(seed, 3 + seed)
            story.render(root / f"{seed}.mp4")
            for number, question in enumerate(story.questions(rng)):
                content = [{"type": "video", "path": f"{seed}.mp4"}, {"type": "text", "text": question.text}]
                messages = [{"role": "user", "content": content}, {"role": "assistant", "content": question.answer}]
                file.write(json.dumps({"id": f"{seed}-{number}", "messages": messages}) + "\n")
    prepare(root / "source.jsonl", root, root / "prepared")
    return root / "prepared"


@pytest.fixture
def changes(model_folder, stories, tmp_path) -> Callable[..., list[str]]:
    """`--set` of a short run of the recipe `finetune` on the stories; more may be given."""

    def make(**more: object) -> list[str]:
        values = {
            "model": model_folder, "data": str(stories), "output": str(tmp_path / "run"), "global_batch_size": 4,
            "max_steps": 4, "logging_steps": 1, "learning_rate": 1e-3, "vision_learning_rate": 1e-4, "num_workers": 0,
            **more,
        }  # fmt: skip
        return [f"{key}={json.dumps(value)}" for key, value in values.items()]

    return make
