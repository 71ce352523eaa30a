"""Spans of a video that several processes share: how they are cut, and what cannot be shared."""

from itertools import pairwise

import pytest
import torch

from video_ma2mba.modeling.checkpoint_plan import CheckpointPlan, pipeline_idle
from video_ma2mba.modeling.sequence_parallel import cut_span
from video_ma2mba.training.recipe import read_recipe

LAYERS = 4
PLACEHOLDERS = {"pixel_values": 46, "pixel_values_videos": 47}

REQUIRED = ["model=m", "data=d", "output=o"]


def batch_of(tokens, frames, padding=0):
    """Two words, frames of four tokens, words; every second word is supervised."""
    ids = torch.arange(2, 2 + tokens)[None] % 40 + 2
    ids[:, 2 : 2 + 4 * frames] = 47
    labels = torch.where((torch.arange(tokens) % 2 == 0) & (ids != 47), ids, -100)
    mask = torch.ones_like(ids)
    pad = torch.nn.functional.pad
    pixels = torch.arange(frames).view(1, frames, 1, 1, 1).expand(1, frames, 3, 2, 2)
    return {
        "input_ids": pad(ids, (0, padding), value=1), "attention_mask": pad(mask, (0, padding)),
        "labels": pad(labels, (0, padding), value=-100), "pixel_values_videos": pixels, "pixel_values": None,
    }  # fmt: skip


@pytest.mark.parametrize("size", [1, 2, 3, 4])
@pytest.mark.parametrize(("tokens", "frames"), [(40, 3), (41, 9), (17, 2), (23, 0)])
def test_spans_lie_side_by_side_and_hold_whole_frames_and_their_targets(tokens, frames, size):
    batch = batch_of(tokens, frames, padding=5)
    spans, places = zip(*(cut_span(batch, rank, size, 4, PLACEHOLDERS) for rank in range(size)), strict=True)
    assert places[0][0] == 0
    assert places[-1][1:] == (tokens, tokens)
    assert all(one[1] == other[0] for one, other in pairwise(places))
    assert torch.equal(torch.cat([s["input_ids"] for s in spans], dim=1), batch["input_ids"][:, :tokens])
    targets = torch.cat([s["shift_labels"] for s in spans], dim=1)
    assert torch.equal(targets[:, :-1], batch["labels"][:, 1:tokens])
    assert targets[0, -1] == -100
    seen = [s["pixel_values_videos"] for s in spans if "pixel_values_videos" in s]
    assert sum(pixels.shape[1] for pixels in seen) == frames
    for span in spans:
        held = span["pixel_values_videos"].shape[1] if "pixel_values_videos" in span else 0
        assert int((span["input_ids"] == 47).sum()) == 4 * held
    if frames:
        assert torch.equal(torch.cat(seen, dim=1), batch["pixel_values_videos"])


def test_what_cannot_be_shared_is_refused():
    two = {
        name: None if value is None else value.repeat(2, *[1] * (value.ndim - 1))
        for name, value in batch_of(40, 3).items()
    }
    with pytest.raises(ValueError, match="one row at a time, got 2"):
        cut_span(two, 0, 2, 4, PLACEHOLDERS)
    with pytest.raises(ValueError, match="14 tokens cannot be shared by 8 ranks"):
        cut_span(batch_of(14, 3), 0, 8, 4, PLACEHOLDERS)


def test_a_recipe_says_what_it_shares():
    recipe = read_recipe("finetune", [*REQUIRED, "held_out=0", "sequence_parallel=2", "global_batch_size=4"])
    assert recipe.accumulation_steps(2) == 4
    assert recipe.accumulation_steps(8) == 1
    with pytest.raises(ValueError, match=r"sequence_parallel 2 does not divide the 3 device\(s\)"):
        recipe.accumulation_steps(3)
    for other in ("device_batch_size=2", "streaming=true"):
        with pytest.raises(ValueError, match="let device_batch_size be 1 and streaming false"):
            read_recipe("finetune", [*REQUIRED, "held_out=0", "sequence_parallel=2", "max_steps=3", other])
    for other in ("gradient_checkpointing.gradient_horizon=64", "initial_states.kind=passed"):
        with pytest.raises(ValueError, match=other.partition(".")[2].partition("=")[0] + ".*sequence_parallel"):
            read_recipe("finetune", [*REQUIRED, "held_out=0", "sequence_parallel=2", other])


def test_the_planner_counts_the_turns_of_the_pipeline():
    assert pipeline_idle(CheckpointPlan("layer_major", 1, 8, False), LAYERS, 2) == 1 / 5
    assert pipeline_idle(CheckpointPlan("layer_major", 16, 8, False), 64, 8) == 7 / 11
    assert pipeline_idle(CheckpointPlan("sequence_major", 1, 8, False), 64, 8) == 7 / 8
    assert pipeline_idle(None, 64, 2) == 1 / 2
