"""The example that teaches the tiny model to remember: growing changes no answer, and a gap hands the gradient on."""

import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from video_ma2mba import VideoMa2mbaForConditionalGeneration, VideoMa2mbaProcessor
from video_ma2mba.data.synthetic import make_story
from video_ma2mba.loading import TINY_MODEL

from ..tiny import tiny_model

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


@pytest.fixture(scope="module")
def example():
    sys.path.insert(0, str(EXAMPLES))
    try:
        spec = importlib.util.spec_from_file_location("train_tiny_long", EXAMPLES / "train_tiny_long.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module
    finally:
        sys.path.remove(str(EXAMPLES))


@pytest.fixture(scope="module")
def bank(example, tmp_path_factory):
    model = VideoMa2mbaForConditionalGeneration.from_pretrained(TINY_MODEL)
    processor = VideoMa2mbaProcessor.from_pretrained(TINY_MODEL)
    return example.Bank(model, processor, 60, tmp_path_factory.mktemp("bank") / "bank.safetensors")


def test_what_a_head_keeps_is_the_gradient_of_its_state_across_a_gap(example):
    """In one layer there is no other path, so it is all of the gradient."""
    model = tiny_model(torch.float64, text={"num_hidden_layers": 1})
    embeds = torch.randn(1, 25, 32, dtype=torch.float64)
    cache = model.model.language_model.new_cache(1)
    before = torch.randn_like(cache.layers[0].ssm_state).requires_grad_()
    cache.layers[0] = type(cache.layers[0])(cache.layers[0].conv_state, before)
    with example.decays(model) as kept:
        after = model(inputs_embeds=embeds, cache=cache, use_cache=True).cache.layers[0].ssm_state
    weights = torch.randn_like(after)
    (gradient,) = torch.autograd.grad((after * weights).sum(), before)
    assert gradient.abs().max() > 1e-6
    torch.testing.assert_close(kept[0][:, :, None, None] * weights, gradient, rtol=1e-9, atol=1e-15)
    with example.decays(model) as kept:  # in pieces it is the same
        for span in (slice(0, 9), slice(9, 25)):
            cache = model(inputs_embeds=embeds[:, span], use_cache=True).cache
    torch.testing.assert_close(kept[0][:, :, None, None] * weights, gradient, rtol=1e-9, atol=1e-15)
    assert not model.model.language_model.layers[0].mixer.in_proj._forward_hooks


def test_a_story_of_the_bank_knows_what_was_true_when(example, bank):
    model = VideoMa2mbaForConditionalGeneration.from_pretrained(TINY_MODEL)
    processor = VideoMa2mbaProcessor.from_pretrained(TINY_MODEL)
    rng = np.random.default_rng(0)
    story = make_story(5, 40)
    tape = example.Tape(5, 40, bank, rng, needle=False, plain=False)
    assert tape.rows.shape == (40,)
    names = [scene.name for scene in story.scenes for _ in range(scene.duration_s)]
    for second in (10, 40):
        for question in tape.questions(second, rng):
            so_far = names[:second]
            if question.kind == "ever_appears":
                asked = question.text.removeprefix("Did a ").removesuffix(" ever appear?")
                assert question.answer == ("yes" if asked in so_far else "no")
            elif question.kind == "which_first":
                asked = question.text.removeprefix("Which came first, the ").removesuffix("?").split(" or the ")
                assert question.answer == min(asked, key=so_far.index)
            elif question.kind == "circle_colour":
                assert f"{question.answer} circle" in so_far
            else:
                assert question.answer == so_far[0 if question.kind == "first_shape" else -1].split()[1]
    tapes = [example.Tape(seed, 30, bank, rng, needle=True, plain=True) for seed in range(12)]
    circles = [[name for name in tape.names if "circle" in name] for tape in tapes]
    assert circles == [[tape.circle] for tape in tapes]
    assert any(tape.circle == tape.names[0] for tape in tapes)
    assert any(tape.circle == tape.names[-1] for tape in tapes)
    assert any(sum(tape.circle.split()[0] in name for name in tape.names) > 1 for tape in tapes)  # of others' colour
    drawn = make_story(example.BANK_SEED + 60, example.BANK_STORY_S, source_fps=1)
    frames = processor.video_processor.load(drawn.frames()).frames
    with torch.no_grad():
        features = model.get_video_features(frames).pooler_output[:, 0]
    half = len(bank.features) // 2
    torch.testing.assert_close(bank.features[half : half + len(features)], features)
    assert all(tape.rows.min() >= half for tape in tapes)
    assert all(len(tape.rows) == 30 for tape in tapes)


def test_every_kind_of_step_teaches(example, bank, monkeypatch):
    sizes = {
        "NUM_STREAMS": 2, "STREAMS_S": ((1.0, 60, 90),), "WINDOWS": ((1.0, 16, 2),), "SHORT": ((1.0, 8, 12, 2),),
        "GAPS": ((16, 2),), "GAP_STORY_S": (60, 90), "NEEDLE_SHARE": 0.5, "PLAIN_SHARE": 0.5,
    }  # fmt: skip
    for name, value in sizes.items():
        monkeypatch.setattr(example, name, value)
    model = VideoMa2mbaForConditionalGeneration.from_pretrained(TINY_MODEL)
    processor = VideoMa2mbaProcessor.from_pretrained(TINY_MODEL)
    teacher = example.Teacher(model, processor, bank, np.random.default_rng(0), 10**10)
    for kind in ("short", "gap", "stream"):
        model.zero_grad()
        getattr(teacher, f"{kind}_loss")().backward()
        gradient = model.model.language_model.layers[0].mixer.in_proj.weight.grad
        assert gradient.isfinite().all()
        assert gradient.norm() > 1e-6
    assert {stream["at"] for stream in teacher.streams} != {0}


def test_a_gate_opens_for_circles_alone(example, bank):
    model = VideoMa2mbaForConditionalGeneration.from_pretrained(TINY_MODEL)
    processor = VideoMa2mbaProcessor.from_pretrained(TINY_MODEL)
    example.open_for_circles(model, bank)
    layer = model.model.language_model.layers[0]
    story = make_story(11, 60)
    with torch.no_grad():
        frames = processor.video_processor.load(story.frames()).frames
        read = layer.norm(model.get_video_features(frames).pooler_output[:, 0])
        projected = layer.mixer.in_proj(read)[:, example.CIRCLE_HEAD - example.NUM_HEADS]
        steps = torch.nn.functional.softplus(projected + layer.mixer.dt_bias[example.CIRCLE_HEAD])
    circle = slice(story.circle.start_s, story.circle.end_s)
    assert steps[circle].min() > 0.05
    steps[circle] = 0
    assert steps.sum() < 0.01


def test_growing_changes_little(example):
    """The new heads are quiet, the new layers silent; all that was there is in its place."""
    processor = VideoMa2mbaProcessor.from_pretrained(TINY_MODEL)
    torch.manual_seed(0)
    old = sys.modules["train_tiny"].build_model(processor).eval()
    new = example.grown(old).eval()
    assert new.num_parameters() < 1.1e6
    ids = torch.randint(5, 300, (2, 80))
    with torch.no_grad():
        before, after = old(ids).logits, new(ids).logits
        assert (after - before).norm() < 0.1 * before.norm()
        for layer in new.model.language_model.layers:
            layer.mixer.out_proj.weight[:, 128:] = 0  # without the new heads
        quiet = new(ids).logits
        # what is left is their part in the mean square of the gated norm
        assert (quiet - before).norm() < 0.1 * before.norm()
