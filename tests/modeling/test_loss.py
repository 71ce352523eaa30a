"""The loss and all its gradients against the plain computation, and what training neither allocates nor keeps."""

import pytest
import torch
from torch.nn import functional as F
from transformers import AutoModelForImageTextToText

from video_ma2mba.modeling import VideoMa2mbaConfig, VideoMa2mbaForConditionalGeneration

from ..tiny import tiny_config, tiny_model
from .reference import Largest, Made, assert_gradients_match

VIDEO, TOKENS_PER_FRAME, IGNORED = 47, 4, -100


def training_batch(frame_counts=(3, 1), text=7, answer=3, side="left", dtype=torch.float64):
    """Rows of different lengths whose last `answer` tokens are supervised, padded on `side`; padding frames are nan."""
    draw = torch.Generator().manual_seed(0)
    rows = [
        torch.cat([torch.full((n * TOKENS_PER_FRAME,), VIDEO), torch.randint(2, 40, (text,), generator=draw)])
        for n in frame_counts
    ]
    width = max(map(len, rows))
    ids = torch.ones(len(rows), width, dtype=torch.int64)
    mask, labels = torch.zeros_like(ids), torch.full_like(ids, IGNORED)
    pixels = torch.full((len(rows), max(frame_counts), 3, 16, 16), torch.nan, dtype=dtype)
    for i, (row, count) in enumerate(zip(rows, frame_counts, strict=True)):
        start = width - len(row) if side == "left" else 0
        ids[i, start : start + len(row)] = row
        mask[i, start : start + len(row)] = 1
        labels[i, start + len(row) - answer : start + len(row)] = row[-answer:]
        pixels[i, :count] = torch.randn(count, 3, 16, 16, generator=draw, dtype=dtype)
    return {"input_ids": ids, "attention_mask": mask, "pixel_values_videos": pixels, "labels": labels}


def plain_loss(model, batch, reduction="mean"):
    """Cross-entropy over the logits of all tokens."""
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    logits = model(**inputs).logits
    flat = logits[:, :-1].reshape(-1, logits.shape[-1])
    return F.cross_entropy(flat, batch["labels"][:, 1:].reshape(-1), ignore_index=IGNORED, reduction=reduction)


def compared(model):
    """All parameters but the keys' biases: softmax is blind to a shift of all scores, so their gradient is zero."""
    return [name for name, _ in model.named_parameters() if not name.endswith("k_proj.bias")]


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return [model.get_parameter(name).grad.clone() for name in compared(model)]


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("loss_chunk_size", [2, 1024])
def test_loss_and_all_gradients_are_the_plain_ones(loss_chunk_size, side, monkeypatch):
    monkeypatch.setattr(torch.Tensor, "float", lambda tensor: tensor)  # the head's float32, here kept at float64
    model = tiny_model(dtype=torch.float64, loss_chunk_size=loss_chunk_size).train()
    batch = training_batch(side=side)
    names = compared(model)
    assert "model.language_model.embeddings.weight" in names
    assert "lm_head.weight" not in names  # tied: one parameter, whose gradient has two sources
    expected = plain_loss(model, batch)
    loss = model(**batch).loss
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    found = gradients(model, loss)
    assert_gradients_match(found, gradients(model, expected), names, rtol=1e-9)


def test_untied_head_gets_its_own_gradient(monkeypatch):
    monkeypatch.setattr(torch.Tensor, "float", lambda tensor: tensor)
    model = tiny_model(dtype=torch.float64, tie_word_embeddings=False).train()
    batch = training_batch()
    names = compared(model)
    assert "lm_head.weight" in names
    found = gradients(model, model(**batch).loss)
    assert_gradients_match(found, gradients(model, plain_loss(model, batch)), names, rtol=1e-9)


def test_gradient_reaches_the_pixels():
    model = tiny_model().train()
    batch = training_batch(frame_counts=(2, 2), dtype=torch.float32)
    pixels = batch["pixel_values_videos"].requires_grad_()
    model(**batch).loss.backward()
    assert (pixels.grad.flatten(2).abs().amax(2) > 0).all()


def test_num_items_in_batch_divides_the_sum():
    model = tiny_model()
    batch = training_batch(dtype=torch.float32)
    total = plain_loss(model, batch, reduction="sum")
    for count in (24, torch.tensor(24), torch.tensor(24.0)):  # the Trainer's types over transformers' versions
        torch.testing.assert_close(model(**batch, num_items_in_batch=count).loss, total / 24)
    torch.testing.assert_close(model(**batch).loss, total / 6)  # two rows of three


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("value", [IGNORED, 5])
def test_nothing_supervised_is_a_zero_with_gradients(value, tied):
    """A label on the first token is predicted by none, so it does not count either."""
    model = tiny_model(tie_word_embeddings=tied).train()
    batch = training_batch(dtype=torch.float32)
    batch["labels"] = torch.full_like(batch["labels"], IGNORED)
    batch["labels"][:, 0] = value
    loss = model(**batch).loss
    assert loss == 0
    loss.backward()  # as data-parallel training wants: every parameter takes part
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert not parameter.grad.any(), name


def test_no_logits_of_all_tokens():
    """With labels the head runs on a few supervised tokens at a time, forward and backward."""
    model = tiny_model(text={"vocab_size": 3000}, loss_chunk_size=4).train()
    vocab, hidden = 3000, 32
    ids = torch.randint(2, 40, (1, 200))
    labels = torch.full_like(ids, IGNORED)
    labels[:, -12:] = ids[:, -12:]
    with Largest() as largest:
        loss = model(input_ids=ids, labels=labels).loss
        loss.backward()
    # the head's own weight and its gradient are the largest; chunks of logits are 4 x 3000, all of them 200 x 3000
    assert largest.numel == vocab * hidden
    assert largest.numel < 200 * vocab
    assert model.lm_head.weight.grad.abs().max() > 0


def test_frozen_tower_builds_no_graph():
    model = tiny_model().train()
    model.model.vision_tower.requires_grad_(False)
    seen = []
    model.model.vision_tower.register_forward_hook(lambda module, args, out: seen.append(out.last_hidden_state))
    model(**training_batch(dtype=torch.float32)).loss.backward()
    assert seen
    assert all(hidden.grad_fn is None for hidden in seen)
    assert all(p.grad is None for p in model.model.vision_tower.parameters())
    assert model.model.multi_modal_projector.linear_1.weight.grad.any()


def test_layers_after_the_used_one_do_not_exist():
    model = tiny_model()
    assert len(model.model.vision_tower.encoder.layers) == model.config.vision_config.num_hidden_layers - 1
    assert not [name for name, _ in model.named_parameters() if "post_layernorm" in name]


STATE_PARAMETERS = ("A_log", "D", "dt_bias")


def dtypes_of(model):
    state = {p.dtype for name, p in model.named_parameters() if name.endswith(STATE_PARAMETERS)}
    return state, {p.dtype for name, p in model.named_parameters() if not name.endswith(STATE_PARAMETERS)}


def test_state_parameters_stay_float32(tmp_path):
    """Loaded in bfloat16, made in bfloat16, saved and loaded again: what decides the decay keeps its bits."""
    expected = ({torch.float32}, {torch.bfloat16})
    model = tiny_model()
    model.save_pretrained(tmp_path / "a")
    loaded = VideoMa2mbaForConditionalGeneration.from_pretrained(tmp_path / "a", dtype=torch.bfloat16)
    assert dtypes_of(loaded) == expected
    for mine, original in zip(loaded.model.language_model.layers, model.model.language_model.layers, strict=True):
        assert torch.equal(mine.mixer.A_log, original.mixer.A_log)  # not rounded on the way either
    loaded.save_pretrained(tmp_path / "b")
    again = VideoMa2mbaForConditionalGeneration.from_pretrained(tmp_path / "b", dtype="auto")
    assert dtypes_of(again) == expected
    assert torch.equal(
        again.model.language_model.layers[0].mixer.A_log, model.model.language_model.layers[0].mixer.A_log
    )
    made = VideoMa2mbaForConditionalGeneration._from_config(tiny_config(), dtype=torch.bfloat16)
    assert dtypes_of(made) == expected


def test_autocast_step_keeps_no_float32_copies():
    """In bfloat16 autocast over float32 weights, what a block keeps per token is in_proj's output in bfloat16."""
    model = tiny_model().train()
    tokens = 700
    ids = torch.randint(2, 40, (1, tokens))
    labels = ids.clone()
    labels[:, : tokens - 8] = IGNORED
    with torch.autocast("cpu", torch.bfloat16), Made() as made:
        loss = model(input_ids=ids, labels=labels).loss
    projection = model.model.language_model.layers[0].mixer.in_proj.out_features
    long = [size for size in made.held_bytes() if size >= tokens * 32]
    # of two layers: two projections in bfloat16, and the float32 streams entering the first and leaving each
    streams = [tokens * 32 * 4] * 2
    assert long[-2:] == [tokens * projection * 2] * 2
    assert len(long) <= 2 + len(streams) + 1, long
    loss.backward()
    plain = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    model(input_ids=ids, labels=labels).loss.backward()
    exact = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert plain.keys() == exact.keys() == {n for n, _ in model.named_parameters() if "language_model" in n}  # no video
    for name, gradient in exact.items():
        # bfloat16 rounds by up to 0.4 % at every step; a term that is missing or counted twice would be off by 100 %
        error = (plain[name] - gradient).norm() / gradient.norm()
        assert error < 0.25, (name, error)


def test_labels_of_another_shape_are_refused():
    model = tiny_model()
    with pytest.raises(ValueError, match="labels"):
        model(input_ids=torch.ones(1, 4, dtype=torch.int64), labels=torch.ones(1, 3, dtype=torch.int64))


def test_auto_class_makes_it():
    import video_ma2mba  # noqa: F401 - registers the classes

    assert isinstance(tiny_config(), VideoMa2mbaConfig)
    model = AutoModelForImageTextToText.from_config(tiny_config(), dtype=torch.bfloat16)
    assert isinstance(model, VideoMa2mbaForConditionalGeneration)
    assert dtypes_of(model) == ({torch.float32}, {torch.bfloat16})
