"""`generate` bare: every way of decoding gives what full forward passes give, and leaves the caller's cache alone."""

import pytest
import torch

from video_ma2mba.modeling import Mamba2Cache, VideoMa2mbaForConditionalGeneration

from ..tiny import tiny_model
from .reference import Largest

IMAGE, VIDEO = 46, 47
TOKENS_PER_FRAME = 4
# Left out: the end token, so that every answer has its full length; the padding token, which `generate` would take for
# padding when it is given back; and the placeholders, which stand for frames.
GREEDY = {"do_sample": False, "max_new_tokens": 6, "suppress_tokens": [0, 1, IMAGE, VIDEO]}
CLOSE = {"rtol": 1e-4, "atol": 2e-5}  # float32, sums in another order


@pytest.fixture(scope="module")
def model():
    return tiny_model()


def prompt(num_frames, text=5, seed=0, token=VIDEO):
    """Text, the placeholders of a video, text."""
    ids = torch.randint(2, 40, (1, text), generator=torch.Generator().manual_seed(seed))
    visual = torch.full((1, num_frames * TOKENS_PER_FRAME), token)
    return torch.cat([ids[:, :2], visual, ids[:, 2:]], dim=1)


def video(num_frames, seed=0):
    return torch.randn(1, num_frames, 3, 16, 16, generator=torch.Generator().manual_seed(100 + seed))


def batch(frame_counts, side="left"):
    """Rows of different lengths, padded, with videos of different lengths, padded too."""
    rows = [prompt(n, text=4 + i, seed=i)[0] for i, n in enumerate(frame_counts)]
    width, most = max(map(len, rows)), max(frame_counts)
    ids, mask = torch.ones(len(rows), width, dtype=torch.int64), torch.zeros(len(rows), width, dtype=torch.int64)
    pixels = torch.zeros(len(rows), most, 3, 16, 16)
    for i, (row, count) in enumerate(zip(rows, frame_counts, strict=True)):
        span = slice(width - len(row), None) if side == "left" else slice(0, len(row))
        ids[i, span], mask[i, span] = row, 1
        pixels[i, :count] = video(count, seed=i)[0]
    singles = [
        {"input_ids": row[None], "pixel_values_videos": video(n, seed=i)}
        for i, (row, n) in enumerate(zip(rows, frame_counts, strict=True))
    ]
    return {"input_ids": ids, "attention_mask": mask, "pixel_values_videos": pixels}, singles


def greedy_by_hand(model, input_ids, pixel_values_videos, steps=6):
    """A full forward pass for every token."""
    ids = input_ids
    for _ in range(steps):
        with torch.no_grad():
            logits = model(ids, pixel_values_videos=pixel_values_videos, use_cache=False).logits[:, -1]
        logits[:, GREEDY["suppress_tokens"]] = -torch.inf
        ids = torch.cat([ids, logits.argmax(-1, keepdim=True)], dim=1)
    return ids


@pytest.mark.parametrize("use_cache", [True, False])
def test_greedy_is_the_argmax_of_full_passes(model, use_cache):
    inputs = {"input_ids": prompt(3), "pixel_values_videos": video(3)}
    expected = greedy_by_hand(model, **inputs)
    assert torch.equal(model.generate(**inputs, **GREEDY, use_cache=use_cache), expected)
    other = model.generate(inputs["input_ids"], pixel_values_videos=video(3, seed=7), **GREEDY)
    assert not torch.equal(other, expected)  # the video matters


def test_logits_of_each_step_are_those_of_full_passes(model):
    inputs = {"input_ids": prompt(2), "pixel_values_videos": video(2)}
    out = model.generate(**inputs, **GREEDY, return_dict_in_generate=True, output_logits=True)
    with torch.no_grad():
        full = model(out.sequences[:, :-1], pixel_values_videos=video(2)).logits
    torch.testing.assert_close(torch.stack(out.logits, dim=1), full[:, -6:], **CLOSE)


def test_sampling_is_reproducible(model):
    inputs = {"input_ids": prompt(2), "pixel_values_videos": video(2)}
    options = {**GREEDY, "do_sample": True, "max_new_tokens": 12, "temperature": 3.0}

    def sample(seed, **kwargs):
        torch.manual_seed(seed)
        return model.generate(**inputs, **options, **kwargs)

    assert torch.equal(sample(1), sample(1))
    assert torch.equal(sample(1), sample(1, use_cache=False))
    assert not torch.equal(sample(1), sample(2))


@pytest.mark.parametrize("rows", [1, 2])
def test_beams_are_those_without_cache(model, rows, monkeypatch):
    inputs, _ = batch([3, 2][:rows])
    orders, reorder = [], Mamba2Cache.reorder_cache
    monkeypatch.setattr(
        Mamba2Cache, "reorder_cache", lambda cache, beams: orders.append(beams.tolist()) or reorder(cache, beams)
    )
    options = {**GREEDY, "num_beams": 3, "num_return_sequences": 2}
    options |= {"return_dict_in_generate": True, "output_scores": True}
    plain = model.generate(**inputs, **options, use_cache=False)
    assert not orders
    cached = model.generate(**inputs, **options)
    assert any(order != list(range(3 * rows)) for order in orders)  # the beams did cross
    assert torch.equal(cached.sequences, plain.sequences)
    torch.testing.assert_close(cached.sequences_scores, plain.sequences_scores, **CLOSE)
    assert cached.sequences.shape[0] == 2 * rows


def test_num_return_sequences(model):
    inputs, _ = batch([2, 1])
    torch.manual_seed(0)
    many = model.generate(**inputs, **{**GREEDY, "do_sample": True, "temperature": 3.0}, num_return_sequences=3)
    assert many.shape[0] == 6
    assert torch.equal(many[:3, : inputs["input_ids"].shape[1]], inputs["input_ids"][:1].expand(3, -1))
    assert len({tuple(row) for row in many[:3].tolist()}) > 1


@pytest.mark.parametrize("frame_counts", [(3, 1), (1, 4, 2)])
@pytest.mark.parametrize("chunk", [None, 5])
def test_left_padded_batch_is_its_single_rows(model, frame_counts, chunk):
    inputs, singles = batch(frame_counts)
    found = model.generate(**inputs, **GREEDY, prefill_chunk_size=chunk)[:, -6:]
    expected = [model.generate(**single, **GREEDY)[0, -6:] for single in singles]
    assert torch.equal(found, torch.stack(expected))


def padded(ids, mask_row):
    """Put ids where mask_row is true, padding elsewhere."""
    out = torch.ones(len(mask_row), dtype=torch.int64)
    out[mask_row] = ids
    return out


@pytest.mark.parametrize("with_past", [False, True])
def test_padding_anywhere_is_exact(model, with_past):
    """Left, right, and in the middle, also after a past: real tokens' logits and states are those without padding."""
    real = torch.randint(2, 40, (5,), generator=torch.Generator().manual_seed(3))
    masks = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 0, 0, 0], [1, 0, 1, 1, 0, 0, 1, 1]]).bool()
    ids = torch.stack([padded(real, row) for row in masks])
    past = torch.randint(2, 40, (1, 4), generator=torch.Generator().manual_seed(4))
    with torch.no_grad():
        caches = [model(past.expand(n, -1)).cache if with_past else None for n in (1, 3)]
        alone = model(real[None], cache=caches[0])
        rows = model(ids, attention_mask=masks.long(), cache=caches[1])
        following = torch.randint(2, 40, (1, 3), generator=torch.Generator().manual_seed(5))
        next_alone = model(following, cache=alone.cache).logits
        next_rows = model(following.expand(3, -1), cache=rows.cache).logits
    for row in range(3):
        torch.testing.assert_close(rows.logits[row, masks[row]], alone.logits[0], **CLOSE)
        torch.testing.assert_close(next_rows[row], next_alone[0], **CLOSE)


def test_continuation_from_the_returned_cache(model):
    """What `generate` returns can be taken up again with the new ids alone; the caller's cache stays as it was."""
    first_ids = prompt(2)
    first = model.generate(first_ids, pixel_values_videos=video(2), **GREEDY, return_dict_in_generate=True)
    cache = first["cache" if "cache" in first else "past_key_values"]  # its name before 5.24
    assert cache.num_tokens == first.sequences.shape[1] - 1  # the last token has been given out, not read
    assert cache.get_seq_length() == cache.num_tokens
    before = [state.clone() for layer in cache.layers for state in layer]
    question = torch.randint(2, 40, (1, 4), generator=torch.Generator().manual_seed(8))
    new_ids = torch.cat([first.sequences[:, -1:], question], dim=1)
    for mask in ({}, {"attention_mask": torch.ones_like(new_ids)}):
        second = model.generate(new_ids, cache=cache, **GREEDY, **mask)
        whole = model.generate(torch.cat([first.sequences, question], dim=1), pixel_values_videos=video(2), **GREEDY)
        assert torch.equal(second[:, -6:], whole[:, -6:])
        assert second.shape[1] == new_ids.shape[1] + 6
        after = [state for layer in cache.layers for state in layer]
        assert all(torch.equal(old, new) for old, new in zip(before, after, strict=True))
        assert cache.num_tokens == first.sequences.shape[1] - 1


def test_continuation_with_the_mask_of_the_whole_conversation(model):
    """The mask that covers past and new tokens, which transformers' own models want, is understood too."""
    ids = prompt(0, text=6)
    with torch.no_grad():
        cache = model(ids[:, :4]).cache
    expected = model.generate(ids, **GREEDY)[:, -6:]
    found = model.generate(ids[:, 4:], cache=cache, attention_mask=torch.ones_like(ids), **GREEDY)
    assert torch.equal(found[:, -6:], expected)


def test_beams_continue_from_a_cache(model):
    ids = prompt(0, text=8)
    with torch.no_grad():
        cache = model(ids[:, :5]).cache
    options = {**GREEDY, "num_beams": 3}
    found = model.generate(ids[:, 5:], cache=cache, **options)
    assert torch.equal(found[:, -6:], model.generate(ids, **options)[:, -6:])
    assert cache.layers[0].ssm_state.shape[0] == 1


@pytest.mark.parametrize("chunk", [1, 3, 7, 100])
def test_chunked_prefill_gives_the_same_tokens(chunk):
    model = tiny_model()
    inputs = {"input_ids": prompt(4), "pixel_values_videos": video(4)}
    expected = greedy_by_hand(model, **inputs)
    assert torch.equal(model.generate(**inputs, **GREEDY, prefill_chunk_size=chunk), expected)
    model.generation_config.prefill_chunk_size = chunk
    for _ in range(2):  # the model's generation config serves more than once
        assert torch.equal(model.generate(**inputs, **GREEDY), expected)
        assert model.generation_config.prefill_chunk_size == chunk
    model.generation_config.prefill_chunk_size = None
    configured = VideoMa2mbaForConditionalGeneration(model.config)
    configured.load_state_dict(model.state_dict())
    configured.model.language_model.prefill_chunk_size = chunk
    assert torch.equal(configured.eval().generate(**inputs, **GREEDY), expected)


def test_config_sets_the_prefill_chunk(monkeypatch):
    model = tiny_model(prefill_chunk_size=3)
    lengths = []
    monkeypatch.setattr(
        model.model.language_model.layers[0],
        "forward",
        lambda hidden, *args, real=model.model.language_model.layers[0].forward: (
            lengths.append(hidden.shape[1]) or real(hidden, *args)
        ),
    )
    with torch.no_grad():
        model(prompt(0, text=8))
    assert lengths == [3, 3, 2]


def test_chunked_prefill_needs_constant_memory(model):
    """Nothing but the embeddings of the prompt is as long as the prompt: no other tensor outgrows one chunk's."""
    chunk, hidden_size = 32, model.config.text_config.hidden_size
    widest = model.model.language_model.layers[0].mixer.in_proj.out_features
    for tokens in (256, 1024):
        with torch.no_grad(), Largest() as seen:
            out = model(torch.full((1, tokens), 5), prefill_chunk_size=chunk, logits_to_keep=1)
        assert out.logits.shape == (1, 1, 48)
        assert seen.numel == tokens * hidden_size
        embeds = torch.zeros(1, tokens, hidden_size)
        with torch.no_grad(), Largest(but=embeds) as seen:
            model(inputs_embeds=embeds, prefill_chunk_size=chunk, logits_to_keep=1)
        assert seen.numel == chunk * widest


def test_uint8_pixels_are_normalised_on_the_way(model):
    pixels = torch.randint(0, 256, (1, 3, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    mean = torch.tensor(model.config.image_mean)[:, None, None]
    std = torch.tensor(model.config.image_std)[:, None, None]
    with torch.no_grad():
        found = model(prompt(3), pixel_values_videos=pixels).logits
        expected = model(prompt(3), pixel_values_videos=(pixels / 255 - mean) / std).logits
    assert torch.equal(found, expected)


def test_an_image_is_a_video_of_one_frame(model):
    with torch.no_grad():
        as_image = model(prompt(1, token=IMAGE), pixel_values=video(1)).logits
        as_video = model(prompt(1), pixel_values_videos=video(1)).logits
        both = model(
            torch.cat([prompt(1, token=IMAGE), prompt(2)], dim=1), pixel_values=video(1), pixel_values_videos=video(2)
        ).logits
    assert torch.equal(as_image, as_video)
    torch.testing.assert_close(both[:, : as_image.shape[1]], as_image, **CLOSE)


def test_frames_do_not_depend_on_their_micro_batch(model):
    with torch.no_grad():
        whole = model.get_video_features(video(5)[0]).pooler_output
        cut = tiny_model(vision_chunk_size=2).get_video_features(video(5)[0]).pooler_output
    assert whole.shape == (5, TOKENS_PER_FRAME, model.config.text_config.hidden_size)
    torch.testing.assert_close(cut, whole, **CLOSE)


def test_generation_from_embeddings(model):
    ids = prompt(0, text=7)
    embeds = model.get_input_embeddings()(ids)
    expected = model.generate(ids, **GREEDY)[:, -6:]
    assert torch.equal(model.generate(inputs_embeds=embeds, **GREEDY)[:, -6:], expected)
    assert torch.equal(model.generate(inputs_embeds=embeds, **GREEDY, prefill_chunk_size=2)[:, -6:], expected)
    assert torch.equal(
        model.generate(inputs_embeds=embeds, **GREEDY, num_beams=3)[:, -6:],
        model.generate(ids, **GREEDY, num_beams=3)[:, -6:],
    )


@pytest.mark.parametrize("keep", [0, 1, 3, torch.tensor([0, 2, 5])])
def test_logits_to_keep(model, keep):
    ids = prompt(0, text=6).expand(2, -1)
    with torch.no_grad():
        whole = model(ids).logits
        found = model(ids, logits_to_keep=keep).logits
    expected = whole[:, keep] if torch.is_tensor(keep) else whole[:, -keep:] if keep else whole
    torch.testing.assert_close(found, expected, **CLOSE)


def test_assisted_decoding_is_refused(model):
    with pytest.raises(ValueError, match="assisted"):
        model.generate(prompt(0), assistant_model=tiny_model(seed=1), **GREEDY)


def test_hidden_states_of_the_base_model_are_those_of_the_head(model):
    """All of them, at their places, also where padding stands between them."""
    inputs, _ = batch([2, 1])
    inputs["attention_mask"][0, -2] = 0
    with torch.no_grad():
        hidden = model.model(**inputs).last_hidden_state
        logits = model(**inputs).logits
    assert hidden.shape == (*inputs["input_ids"].shape, 32)
    real = inputs["attention_mask"].bool()
    torch.testing.assert_close(model.lm_head(hidden).float()[real], logits[real], **CLOSE)


def test_image_features_are_those_of_a_video(model):
    with torch.no_grad():
        images = model.get_image_features(video(2)[0]).pooler_output
        assert torch.equal(images, model.get_video_features(video(2)[0]).pooler_output)


def test_hidden_states_of_some_layers_alone(model):
    with torch.no_grad():
        every = model(prompt(0), output_hidden_states=True).hidden_states
        some = model(prompt(0), output_hidden_states=[0, -1]).hidden_states
    assert len(some) == len(every) == 3
    assert some[1] is None
    assert torch.equal(some[0], every[0])
    assert torch.equal(some[2], every[2])
