"""The studies at a tiny scale: what they count and compare is what they say."""

import argparse
import json
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from video_ma2mba.benchmark import study
from video_ma2mba.benchmark.studies import fps, length
from video_ma2mba.benchmark.studies.backbone import NAMES, _training, build
from video_ma2mba.benchmark.studies.side_by_side import train_side_by_side
from video_ma2mba.benchmark.studies.stories import Stories
from video_ma2mba.cli import main
from video_ma2mba.data.synthetic import make_story


def parse(*arguments):
    parser = argparse.ArgumentParser()
    study.add_arguments(parser)
    return parser.parse_args(arguments)


def run(name, folder, scale="0.01"):
    """A study whose trained backbones are in `folder`."""
    plot = folder / f"{name}.png"
    result = study.run(parse(name, "--scale", scale, "--keep", str(folder / "kept"), "--plot", str(plot)))
    assert plot.read_bytes().startswith(b"\x89PNG")
    json.dumps(result)
    return result


class Oracle:
    """Knows the next token of every question, and is mistaken at some positions."""

    def __init__(self, stories, mistaken):
        self.embeddings, self.mistaken = torch.nn.Embedding(len(stories.tokenizer), 128), mistaken

    def eval(self):
        return self

    def get_input_embeddings(self):
        return lambda ids: (setattr(self, "ids", ids), self.embeddings(ids))[1]

    def __call__(self, inputs_embeds):
        rows, length, _ = inputs_embeds.shape
        logits = torch.zeros(rows, length, self.embeddings.num_embeddings)
        after = self.ids + self.mistaken
        logits[:, -self.ids.shape[1] - 1 : -1].scatter_(2, after[..., None] % self.embeddings.num_embeddings, 1.0)
        return SimpleNamespace(logits=logits)


def test_accuracy_counts_answers_that_are_right_at_every_token():
    stories = Stories()
    assert stories.accuracy(Oracle(stories, 0), 8, 3) == pytest.approx(
        {"circle_colour": 1, "first_shape": 1, "last_shape": 1, "ever_appears": 1, "which_first": 1, "all": 1}
    )
    assert stories.accuracy(Oracle(stories, 1), 8, 3)["all"] == 0


def test_training_batches_are_the_same_for_the_same_step_and_supervise_answers_alone():
    stories = Stories()
    batch, again = stories.training_batch(7, 4, 20, 3), stories.training_batch(7, 4, 20, 3)
    assert torch.equal(batch.ids, again.ids)
    assert torch.equal(batch.features, again.features)
    supervised = batch.labels[:, batch.features.shape[1] :]
    assert torch.equal(supervised[supervised != -100], batch.ids[supervised != -100])
    text = stories.tokenizer.decode(batch.ids[0][supervised[0] != -100])
    asked = stories.tokenizer.decode(batch.ids[0])
    assert 5 <= text.count("<|endoftext|>") == asked.count("<|user|>")
    assert (batch.labels[:, : batch.features.shape[1]] == -100).all()


@pytest.fixture(scope="module")
def backbone(tmp_path_factory):
    """What the study gave, and its folder."""
    folder = tmp_path_factory.mktemp("backbone")
    return run("backbone", folder), folder


def test_backbone_compares_models_of_one_size(backbone):
    result, _ = backbone
    ours, theirs = (result["num_parameters"][name] for name in ("mamba2", "attention"))
    assert 0.9 < ours / theirs < 1.1
    first, second = result["answering"]
    assert first["mamba2"]["bytes"] == second["mamba2"]["bytes"]
    assert second["attention"]["bytes"] == 4 * first["attention"]["bytes"]  # 256 tokens to 64
    assert all(row["mamba2"]["bytes"] > 0 < row["attention"]["bytes"] for row in result["training"])


def test_fps_takes_the_backbones_that_were_trained(backbone):
    _, folder = backbone
    written = {path.name: path.stat().st_mtime_ns for path in (folder / "kept").glob("*.safetensors")}
    assert len(written) == 2
    result = run("fps", folder)
    assert written == {path.name: path.stat().st_mtime_ns for path in (folder / "kept").glob("*.safetensors")}
    rows = {(r["video_s"], r["sample"], r["backbone"]): r for r in result["rows"]}
    assert rows[48, "2 FPS", "mamba2"]["num_frames"] == 96
    assert rows[48, "2 FPS", "attention"]["memory_bytes"] == 12 * rows[48, "8 frames", "attention"]["memory_bytes"]
    assert len({row["memory_bytes"] for (_, _, name), row in rows.items() if name == "mamba2"}) == 1
    hour = result["hour"]
    assert set(hour["accuracy"]) == {"every second", "few frames", "attention, few frames"}
    assert hour["accuracy"]["every second"]["all"] >= 0.8  # the tiny model, at lengths of its training
    assert hour["num_few_frames"] <= hour["video_s"]
    for same in result["same_memory"]:
        assert same["attention"]["memory_bytes"] <= same["mamba2"]["memory_bytes"]


def test_length_trains_every_arm_for_as_many_token_passes_and_goes_on_where_it_was(backbone, capsys):
    _, folder = backbone
    result = run("length", folder, "0.004")
    assert set(result["arms"]) == {"as it was", *length.ARMS}
    files = {path: path.stat().st_mtime_ns for path in (folder / "kept" / "length-0.004").iterdir()}
    assert run("length", folder, "0.004") == result
    assert files == {path: path.stat().st_mtime_ns for path in (folder / "kept" / "length-0.004").iterdir()}
    weights = [load_file(path) for path in files if path.suffix == ".safetensors"]
    assert len(weights) == len(length.ARMS)
    name = "model.language_model.layers.0.mixer.A_log"
    assert len({tuple(one[name].tolist()) for one in weights}) == len(weights)  # no two arms are the same
    assert {row["state_size"] for row in result["facts"]} == {16, 128}
    assert {row["facts"] for row in result["facts"]} == set(length.FACTS_TESTED)


def test_facts_are_asked_for_in_another_order_and_only_their_values_supervised():
    ids, labels = length.fact_sequences(np.random.default_rng(0), 5, 3)
    for row, targets in zip(ids.tolist(), labels.tolist(), strict=True):
        shown, asked = row[: 4 * 5], row[4 * 5 :]
        facts = {key: shown[place + 1] for place, key in enumerate(shown) if key < length.KEYS}
        assert len(facts) == 5
        assert dict(zip(asked[::2], asked[1::2], strict=True)) == facts
        assert targets == [-100] * 4 * 5 + [
            value for pair in zip([-100] * 5, asked[1::2], strict=True) for value in pair
        ]


def test_frames_are_spread_over_the_whole_video():
    story = make_story(seed=1, duration_s=20)
    frames = list(story.iter_frames(None))
    picked = fps.spread(story, 4)
    assert [next(i for i, frame in enumerate(frames) if (frame == one).all()) for one in picked] == [10, 30, 50, 70]


def test_intervals_marks_what_the_planner_takes(tmp_path):
    result = run("intervals", tmp_path)
    one_recompute = [row for row in result["rows"] if row["recompute_factor"] <= 4 / 3 + 1e-9]
    assert one_recompute
    assert result["chosen"]["recompute_factor"] == pytest.approx(4 / 3)
    assert result["chosen"]["bytes"] <= min(row["bytes"] for row in one_recompute)
    assert result["chosen"]["bytes"] < result["off"]["bytes"]
    assert all(row["seconds"] > 0 for row in result["rows"])


def test_max_length_is_what_the_plan_command_says(tmp_path, capsys):
    result = run("max-length", tmp_path)
    command = "plan --model 0.7b --hours 1 --gpu-memory 16GiB --host-memory 256GiB --optimizer lora --compare --json"
    assert main(command.split()) == 0
    unplotted = study.run(parse("max-length", "--scale", "0.01"))
    assert unplotted["rows"] == result["rows"]
    planned = {row["method"]: row["longest_frames"] for row in json.loads(capsys.readouterr().out)["rows"]}
    found = {row["method"]: row["hours"] * 3600 for row in result["rows"] if row["optimizer"] == "lora"}
    assert found == pytest.approx(planned)


def test_stability_compares_two_runs_of_one_beginning(tmp_path):
    result = run("stability", tmp_path)
    losses = result["loss"]
    assert len(losses["on"]) == len(losses["off"]) == 24
    assert losses["on"][0] == pytest.approx(losses["off"][0], rel=1e-5)
    assert losses["off"][0] > losses["off"][-1]
    # the first step apart by rounding alone, and never by nothing: otherwise checkpointing was not on
    assert 0 < result["weights"][0]["on"] < 1e-5
    assert 0 < result["weights"][0]["nudged"] < 1e-5


def test_long_sequences_are_also_trained_with_checkpointing():
    stories = Stories()
    row = _training({name: build(name, stories) for name in NAMES}, 600)
    assert 0 < row["mamba2 with MA-GC"]["bytes"] < row["mamba2"]["bytes"]


def test_long_runs_say_how_far_they_are(capsys):
    class Loss:
        def loss(self, model):
            return model(torch.ones(1, 2)).square().sum()

    models = {"one": torch.nn.Linear(2, 1), "other": torch.nn.Linear(2, 1)}
    losses = [found["one"][0] for found in train_side_by_side(models, 100, iter([Loss()] * 100))]
    assert losses[-1] < losses[0]
    assert re.fullmatch(r"step 100: one \d\.\d{4}, other \d\.\d{4}\n", capsys.readouterr().out)
