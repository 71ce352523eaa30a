"""Truncated backpropagation with carried states: the loss of the whole, the gradients of states detached at borders."""

import weakref

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from video_ma2mba.modeling.gradient_horizon import gradient_windows
from video_ma2mba.modeling.modeling_video_ma2mba import VideoMa2mbaModel

from ..tiny import tiny_model
from .reference import assert_gradients_match
from .test_gradient_checkpointing import GRID, NO_GRADIENT

VIDEO, PER_FRAME = 47, 4
LENGTHS, FRAMES = (47, 31, 12), (6, 3, 1)
RTOL = 1e-6  # the model runs in float64, but a loss is float32


def model_of(**kwargs):
    return tiny_model(torch.float64, text={"num_hidden_layers": 3}, vision_chunk_size=2, **kwargs).train()


def batch_of(supervised, seed=0, side="mixed"):
    """Rows of text, frames, and text again; `supervised` is "end", "all over", or a probability."""
    draw = torch.Generator().manual_seed(seed)
    width = max(LENGTHS)
    batch = {name: torch.zeros(len(LENGTHS), width, dtype=torch.int64) for name in ("input_ids", "attention_mask")}
    batch["labels"] = torch.full((len(LENGTHS), width), -100)
    batch["pixel_values_videos"] = torch.randn(len(LENGTHS), max(FRAMES), 3, 16, 16, generator=draw).double()
    for row, (length, frames) in enumerate(zip(LENGTHS, FRAMES, strict=True)):
        ids = torch.randint(2, 40, (length,), generator=draw)
        # a question and its answer stand between the frames, so supervised tokens may lie far before the end
        at = torch.arange(3, 3 + frames * PER_FRAME)
        at[len(at) // 2 // PER_FRAME * PER_FRAME :] += 3
        ids[at] = VIDEO
        labels = ids.clone()
        if supervised == "end":
            labels[:-3] = -100
        else:
            share = 1.0 if supervised == "all over" else supervised
            labels[(ids == VIDEO) | (torch.rand(length, generator=draw) >= share)] = -100
            labels[0], labels[-1] = -100, ids[-1]  # nothing comes before the first
        left = {"left": width - length, "right": 0, "mixed": (width - length) * (row % 2)}[side]
        batch["input_ids"][row, left : left + length] = ids
        batch["attention_mask"][row, left : left + length] = 1
        batch["labels"][row, left : left + length] = labels
    return batch


def plain_pass(model, batch, horizon):
    """Row by row, window by window, without any of the library's loops: loss and gradients."""
    model.zero_grad()
    base, loss = model.model, 0
    for row, frames in enumerate(FRAMES):
        real = batch["attention_mask"][row].bool()
        ids, labels = batch["input_ids"][row, real], batch["labels"][row, real]
        features = base.get_video_features(batch["pixel_values_videos"][row, :frames]).pooler_output.flatten(0, 1)
        embeds = base.get_input_embeddings()(ids)
        embeds = embeds.masked_scatter((ids == VIDEO)[:, None], features)[None]
        states = base.language_model.new_cache(1).layers
        begins = range(len(ids) % horizon - horizon * (len(ids) % horizon > 0), len(ids), horizon)
        for begin in begins:
            window = slice(max(begin, 0), begin + horizon)
            hidden, fresh = embeds[:, window], []
            for block, state in zip(base.language_model.layers, states, strict=True):
                hidden, state = block(hidden, tuple(tensor.detach() for tensor in state))
                fresh.append(state)
            states = fresh
            logits = model.lm_head(base.language_model.norm_f(hidden))[0].float()
            loss = loss + F.cross_entropy(logits, F.pad(labels[1:], (0, 1), value=-100)[window], reduction="sum")
    loss = loss / (batch["labels"][:, 1:] != -100).sum()
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters()}


def step(model, batch):
    model.zero_grad()
    loss = model(**batch).loss
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters()}


def assert_same(found, expected):
    torch.testing.assert_close(found[0], expected[0], rtol=RTOL, atol=0)
    names = [name for name, grad in expected[1].items() if grad is not None and not name.endswith(NO_GRADIENT)]
    names = [name for name in names if expected[1][name].abs().max() > 0]  # no frame may lie within the horizon
    assert "model.language_model.layers.0.mixer.in_proj.weight" in names
    assert_gradients_match(*([one[1][name] for name in names] for one in (found, expected)), names, rtol=RTOL)
    silent = [name for name in expected[1] if name not in names and not name.endswith(NO_GRADIENT)]
    assert not any(found[1][name] is not None and found[1][name].any() for name in silent)


@pytest.mark.parametrize("options", GRID, ids=str)
@pytest.mark.parametrize("supervised", ["end", "all over"])
def test_equals_states_detached_at_the_borders(options, supervised):
    """Every mode, rows of unequal length, padding on both sides; frames lie across the borders."""
    model, batch = model_of(), batch_of(supervised)
    whole = step(model, batch)
    expected = plain_pass(model, batch, 13)
    assert any(not torch.allclose(whole[1][name], grad) for name, grad in expected[1].items() if grad is not None)
    model.gradient_checkpointing_enable(**options, gradient_horizon=13)
    found = step(model, batch)
    torch.testing.assert_close(found[0], whole[0], rtol=RTOL, atol=0)
    assert_same(found, expected)


@settings(max_examples=12, deadline=None)
@given(data=st.data())
def test_any_horizon(data):
    horizon = data.draw(st.integers(1, 50), label="horizon")
    share = data.draw(st.sampled_from([0.0, 0.1, 0.5]), label="share")
    batch = batch_of(share, data.draw(st.integers(0, 5)), data.draw(st.sampled_from(["left", "right", "mixed"])))
    options = data.draw(st.sampled_from(GRID), label="options")
    model = model_of(prefill_chunk_size=data.draw(st.integers(1, 50), label="prefill_chunk_size"))
    expected = plain_pass(model, batch, horizon)
    model.gradient_checkpointing_enable(**options, gradient_horizon=horizon)
    assert_same(step(model, batch), expected)


def test_a_horizon_longer_than_the_sample_is_none():
    model, batch = model_of(), batch_of("all over")
    model.gradient_checkpointing_enable(sequence_interval=8)
    expected = step(model, batch)
    model.gradient_checkpointing_enable(sequence_interval=8, gradient_horizon=max(LENGTHS))
    assert_same(step(model, batch), expected)


def test_given_embeddings_and_a_cache():
    """Embeddings and states before the horizon get no gradient, those within do."""
    model = model_of().model
    embeds = torch.randn(1, 20, 32, dtype=torch.float64, requires_grad=True)
    keep = torch.zeros(1, 20, dtype=torch.bool)
    keep[:, -1] = True
    found = []
    for horizon, live in ((5, 5), (20, 20), (None, 20)):
        model.gradient_checkpointing_enable(sequence_interval=3, gradient_horizon=horizon)
        cache = model.language_model.new_cache(1)
        state = cache.layers[0].ssm_state.requires_grad_()
        out = model(inputs_embeds=embeds, cache=cache, keep=keep).last_hidden_state
        grads = torch.autograd.grad(out.sum(), [embeds, state], allow_unused=True)
        assert (grads[0][0] != 0).any(-1).tolist() == [False] * (20 - live) + [True] * live
        assert (grads[1] is not None and bool(grads[1].any())) == (live == 20)
        found.append(out)
    torch.testing.assert_close(found[0], found[2], rtol=1e-12, atol=0)


def test_windows_of_two_rows():
    supervised = torch.zeros(2, 12, dtype=torch.bool)
    supervised[0, 1] = supervised[0, 11] = supervised[1, 6] = True
    windows = gradient_windows(torch.tensor([12, 7]), supervised, 3)
    assert windows.first == 0
    assert windows.live.int().tolist() == [[1, 1, 1, 0, 0, 0, 0, 0, 0, 1, 1, 1], [0, 0, 0, 0, 1, 1, 1, 0, 0, 0, 0, 0]]
    assert windows.starts.nonzero().tolist() == [[0, 9], [1, 4]]
    assert windows.cuts == [3, 4, 7, 9]
    assert gradient_windows(torch.tensor([12, 7]), supervised, 12) is None
    supervised[0, 1] = False
    assert gradient_windows(torch.tensor([12, 7]), supervised, 3).first == 4


@pytest.mark.parametrize("trains_vision", [True, False])
def test_frames_before_the_horizon_build_no_graph(trains_vision):
    model = model_of(prefill_chunk_size=10).model
    model.vision_tower.requires_grad_(trains_vision)
    ids = torch.full((1, 40), VIDEO)
    ids[:, -4:] = 5
    keep = torch.arange(40)[None] == 39
    pixels = torch.randn(1, 9, 3, 16, 16, dtype=torch.float64)
    seen = []
    model.vision_tower.register_forward_hook(
        lambda _, args, kwargs, out: seen.append((len(out.last_hidden_state), out.last_hidden_state.requires_grad)),
        with_kwargs=True,
    )
    model.gradient_checkpointing_enable(sequence_interval=4, gradient_horizon=7)
    out = model(ids, pixel_values_videos=pixels, keep=keep).last_hidden_state
    # watched in chunks of 10 tokens, a frame across a border in both; the last frame has 3 tokens in the horizon
    assert sum(frames for frames, graph in seen if graph) == (1 if trains_vision else 0)
    assert sum(frames for frames, _ in seen) == 3 + 3 + 3 + 2 + 1
    out.sum().backward()
    grad = model.vision_tower.embeddings.patch_embedding.weight.grad
    assert (grad is not None and bool(grad.any())) == trains_vision


class Work(TorchDispatchMode):
    """Counts the elements of matrices multiplied from the left by `mm`, and the bytes that live at most."""

    def __init__(self):
        super().__init__()
        self.tokens, self.live, self.peak, self.known = 0, 0, 0, {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func is torch.ops.aten.mm.default:
            self.tokens += 2 * args[0].shape[0] * args[0].shape[1] * args[1].shape[1]
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor):
                self._count(leaf.untyped_storage())
        return out

    def _count(self, storage):
        if (key := storage._cdata) not in self.known:
            self.known[key] = weakref.finalize(storage, self._forget, key, storage.nbytes())
            self.live += storage.nbytes()
            self.peak = max(self.peak, self.live)

    def _forget(self, key, num_bytes):
        del self.known[key]
        self.live -= num_bytes


def test_products_are_those_of_watching_and_of_the_window():
    """In units of a forward pass through the backbone's projections: one before the horizon, four behind it."""
    model = VideoMa2mbaModel(model_of().config).train()
    embeds, tokens, horizon = torch.randn(1, 2048, 32), 2048, 64
    keep = torch.arange(tokens)[None] == tokens - 1
    found = []
    for options in ({"gradient_horizon": horizon}, {}):
        model.gradient_checkpointing_enable(layer_interval=3, sequence_interval=64, **options)
        with Work() as work:
            model(inputs_embeds=embeds, keep=keep).last_hidden_state.sum().backward()
        found.append(work.tokens)
    of_a_token = 2 * 3 * 32 * (2 * 64 + 2 * 8 + 4 + 64)
    assert found == [of_a_token * (tokens + 3 * horizon), of_a_token * 4 * tokens]
    plan = model.checkpoint_plan(1, tokens)
    assert 3 * plan.recompute_factor == pytest.approx(4)


def test_memory_does_not_grow_with_what_is_watched():
    """Counted live bytes of a step on ids and frames, over what the caller holds: the ids alone still grow."""
    model = tiny_model(vision_chunk_size=8, prefill_chunk_size=64).train()
    model.gradient_checkpointing_enable(layer_interval=2, sequence_interval=32, gradient_horizon=96)
    peaks = {}
    for frames in (64, 512):
        ids = torch.full((1, PER_FRAME * frames + 4), VIDEO)
        ids[:, -4:] = 5
        labels = torch.where(torch.arange(ids.shape[1]) >= ids.shape[1] - 2, ids, -100)
        pixels = torch.randint(0, 256, (1, frames, 3, 16, 16), dtype=torch.uint8)
        step(model, {"input_ids": ids, "labels": labels, "pixel_values_videos": pixels})  # gradients are there
        with Work() as work:
            model(input_ids=ids, labels=labels, pixel_values_videos=pixels).loss.backward()
        peaks[frames] = work.peak - pixels.nbytes  # the real frames of all rows are gathered once
    per_token = (peaks[512] - peaks[64]) / (PER_FRAME * 448)
    assert per_token <= 64, peaks  # some int64 and bool; a hidden state would be 128, and its gradient as much again
