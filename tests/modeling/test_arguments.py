"""No argument is swallowed: each has its meaning, or is refused by its name. The values come from plain passes."""

import warnings

import pytest
import torch
from torch.nn import functional as F

from ..tiny import tiny_model
from .test_generation import GREEDY, IMAGE, TOKENS_PER_FRAME, VIDEO, batch, greedy_by_hand, prompt, video
from .test_loss import training_batch

CLOSE = {"rtol": 1e-4, "atol": 2e-5}


@pytest.fixture(scope="module")
def model():
    return tiny_model()


def words(count, seed=0):
    return torch.randint(2, 40, (1, count), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    "call",
    [
        lambda model, **unknown: model(words(3), **unknown),
        lambda model, **unknown: model.model(words(3), **unknown),
        lambda model, **unknown: model.get_video_features(video(1), **unknown),
        lambda model, **unknown: model.get_image_features(video(1), **unknown),
        lambda model, **unknown: model.model.get_video_features(video(1), **unknown),
        lambda model, **unknown: model.model.get_image_features(video(1), **unknown),
        lambda model, **unknown: model.generate(words(3), max_new_tokens=1, **unknown),
        lambda model, **unknown: model.activation_checkpointing_enable(**unknown),
        lambda model, **unknown: model.gradient_checkpointing_enable(**unknown),
    ],
)
@pytest.mark.parametrize("value", [None, 1])
def test_unknown_names_are_refused(model, call, value):
    if value is None and "generate" in call.__code__.co_names:
        pytest.skip("generate of transformers takes any name without a value")
    with pytest.raises((TypeError, ValueError), match="nonsense"):
        call(model, nonsense=value)


@pytest.mark.parametrize("name", ["cache_params", "past_key_values"])
def test_old_names_of_the_cache(model, name):
    with torch.no_grad():
        cache = model(words(6)).cache
        expected = model(words(3, 1), cache=cache.copy())
        for one in (model, model.model):
            with pytest.warns(FutureWarning, match="cache"):
                found = one(words(3, 1), **{name: cache.copy()})
        assert torch.equal(found.last_hidden_state, model.model(words(3, 1), cache=cache.copy()).last_hidden_state)
        with pytest.raises(ValueError, match=name):
            model(words(3, 1), cache=cache.copy(), **{name: cache.copy()})
    with pytest.warns(FutureWarning, match="cache"):
        said = model.generate(words(3, 1), **{name: cache}, **GREEDY)
    assert torch.equal(said, model.generate(words(3, 1), cache=cache, **GREEDY))
    assert expected.cache.get_seq_length() == 9


def layers_by_hook(model, inputs):
    """What a plain pass hands from layer to layer."""
    backbone, seen = model.model.language_model, []
    handles = [backbone.layers[0].register_forward_pre_hook(lambda module, args: seen.append(args[0]))]
    handles += [layer.register_forward_hook(lambda module, args, out: seen.append(out[0])) for layer in backbone.layers]
    with torch.no_grad():
        last = model.model(**inputs).last_hidden_state
    for handle in handles:
        handle.remove()
    return [*seen[:-1], last]


@pytest.mark.parametrize("chunk", [None, 4])
@pytest.mark.parametrize("how", ["call", "config"])
def test_hidden_states_of_every_layer(model, how, chunk):
    inputs = {"input_ids": prompt(3), "pixel_values_videos": video(3)}
    expected = layers_by_hook(model, inputs)
    told = {"prefill_chunk_size": chunk, "logits_to_keep": 1}
    try:
        if how == "call":
            told["output_hidden_states"] = True
        model.config.output_hidden_states = how == "config"
        with torch.no_grad():
            found = model(**inputs, **told).hidden_states
    finally:
        model.config.output_hidden_states = False
    assert len(found) == len(expected) == model.config.text_config.num_hidden_layers + 1
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs, **CLOSE)


def test_hidden_states_stand_where_the_tokens_do(model):
    """Also under padding, which the backbone moves to the end."""
    inputs, singles = batch([3, 1])
    with torch.no_grad():
        rows = model(**inputs, output_hidden_states=True).hidden_states
        for row, single in enumerate(singles):
            alone = model(**single, output_hidden_states=True).hidden_states
            real = inputs["attention_mask"][row].bool()
            for mine, theirs in zip(rows, alone, strict=True):
                torch.testing.assert_close(mine[row, real], theirs[0], **CLOSE)


def test_hidden_states_of_some_layers_and_of_generate(model):
    with torch.no_grad():
        every = model(words(5), output_hidden_states=True).hidden_states
        some = model(words(5), output_hidden_states=[0, -1]).hidden_states
    assert [states is None for states in some] == [False, True, False]
    assert torch.equal(some[-1], every[-1])
    said = model.generate(words(5), **GREEDY, output_hidden_states=True, return_dict_in_generate=True)
    assert len(said.hidden_states) == 6
    with torch.no_grad():
        whole = model(said.sequences[:, :-1], output_hidden_states=True).hidden_states
    for layer, states in enumerate(whole):
        steps = torch.cat([step[layer] for step in said.hidden_states], dim=1)
        torch.testing.assert_close(steps, states, **CLOSE)


def test_hidden_states_are_not_kept_by_checkpointing():
    model = tiny_model().train()
    model.gradient_checkpointing_enable()
    with pytest.raises(ValueError, match="output_hidden_states"):
        model(words(5), labels=words(5), output_hidden_states=True)


def test_tuples(model):
    with torch.no_grad():
        whole = model(words(5), labels=words(5))
        for_tuple = model(words(5), labels=words(5), return_dict=False)
        assert isinstance(for_tuple, tuple)
        assert torch.equal(for_tuple[0], whole.loss)
        assert torch.equal(for_tuple[1], whole.logits)
        assert torch.equal(model.model(words(5), return_dict=False)[0], model.model(words(5)).last_hidden_state)
        features = model.get_video_features(video(2), return_dict=False)
        assert isinstance(features, tuple)
        assert torch.equal(features[1], model.get_video_features(video(2)).pooler_output)


def float64_loss(model, inputs, targets):
    """`targets` stand at the tokens that predict them."""
    with torch.no_grad():
        logits = model(**inputs).logits
    return F.cross_entropy(logits.flatten(0, 1).double(), targets.flatten()).float()


def test_shift_labels_stand_where_they_are_predicted(model):
    ids, targets = words(7), torch.tensor([[4, -100, 9, -100, 3, 5, -100]])
    expected = float64_loss(model, {"input_ids": ids}, targets)
    with torch.no_grad():
        torch.testing.assert_close(model(ids, shift_labels=targets).loss, expected)
        torch.testing.assert_close(model(ids, labels=ids, shift_labels=targets).loss, expected)
        with pytest.raises(ValueError, match="shift_labels"):
            model(ids, shift_labels=targets[:, 1:])


@pytest.mark.parametrize("training", [False, True])
def test_frames_beside_embeddings(training):
    model = tiny_model().train(training)
    inputs = {"input_ids": torch.cat([prompt(2), prompt(1, token=IMAGE)], dim=1)}
    pixels = {"pixel_values_videos": video(2), "pixel_values": video(1, seed=3)}
    embeds = model.get_input_embeddings()(inputs["input_ids"])
    before = embeds.clone()
    with torch.no_grad():
        expected = model(**inputs, **pixels).logits
    found = model(inputs_embeds=embeds, **pixels).logits
    torch.testing.assert_close(found, expected)
    assert torch.equal(embeds, before)  # the caller's
    said = model.eval().generate(inputs_embeds=embeds.detach(), **pixels, **GREEDY)
    assert torch.equal(said[:, -6:], model.generate(**inputs, **pixels, **GREEDY)[:, -6:])
    with pytest.raises(ValueError, match="need input_ids, or embeddings"):
        model(inputs_embeds=torch.zeros(1, 9, 32), **pixels)


def test_positions_that_only_count_are_taken(model):
    ids = words(6)
    mask = torch.tensor([[0, 0, 1, 1, 1, 1]])
    by_mask = (mask.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        plain, padded = model(ids).logits, model(ids, attention_mask=mask).logits
        counting = torch.arange(6)[None]
        assert torch.equal(model(ids, position_ids=counting, seq_idx=torch.zeros_like(ids)).logits, plain)
        assert torch.equal(model(ids, position_ids=None, seq_idx=None, output_attentions=False).logits, plain)
        assert torch.equal(model(ids, attention_mask=mask, position_ids=by_mask).logits, padded)
        for packed in (
            {"position_ids": torch.tensor([[0, 1, 2, 0, 1, 2]])}, {"seq_idx": torch.tensor([[0, 0, 0, 1, 1, 1]])},
        ):  # fmt: skip
            for one in (model, model.model):
                with pytest.raises(ValueError, match=f"{next(iter(packed))}.*row of its own"):
                    one(ids, **packed)
        with pytest.raises(ValueError, match="output_attentions"):
            model(ids, output_attentions=True)


def test_features_have_an_entry_per_video():
    model = tiny_model()
    model.set_attn_implementation("eager")  # gives attentions out; reaches the tower through the shared configuration
    frames = torch.cat([video(3), video(3, seed=1)])
    with torch.no_grad():
        found = model.get_video_features(frames, output_hidden_states=True, output_attentions=True)
        apart = [model.get_video_features(one).pooler_output.flatten(0, 1) for one in frames]  # frame by frame
    assert found.pooler_output.shape == (2, 3 * TOKENS_PER_FRAME, 32)
    torch.testing.assert_close(found.pooler_output, torch.stack(apart), **CLOSE)
    tower = model.model.vision_tower
    with torch.no_grad():
        expected = tower(frames.flatten(0, 1), output_hidden_states=True, output_attentions=True)
    assert len(found.hidden_states) == model.config.num_vision_layers + 1
    for name in ("hidden_states", "attentions"):
        for mine, theirs in zip(found[name], expected[name], strict=True):
            torch.testing.assert_close(mine.flatten(0, 1), theirs, **CLOSE)
    torch.testing.assert_close(found.last_hidden_state.flatten(0, 1), expected.last_hidden_state, **CLOSE)
    assert model.get_image_features(frames[:, :1]).pooler_output.shape == (2, TOKENS_PER_FRAME, 32)
    assert model.get_image_features(frames[0]).hidden_states is None
    assert model.config.vision_config is tower.config
    assert tower.config._attn_implementation == "eager"


# --- logits beside the loss ------------------------------------------------------------------------------------------


def eval_batch():
    return training_batch(dtype=torch.float32)


def test_loss_and_logits_in_eval_mode(model, caplog):
    inputs = eval_batch()
    plain = {name: value for name, value in inputs.items() if name != "labels"}
    with torch.no_grad():
        expected = model(**plain).logits
        found = model(**inputs)
        some = model(**inputs, logits_to_keep=torch.tensor([5, 2]))
    real = inputs["attention_mask"].bool()
    torch.testing.assert_close(found.logits[real], expected[real], **CLOSE)
    torch.testing.assert_close(
        found.loss, float64_loss(model, plain, F.pad(inputs["labels"][:, 1:], (0, 1), value=-100))
    )
    torch.testing.assert_close(some.logits[1], expected[1, [5, 2]], **CLOSE)
    torch.testing.assert_close(some.loss, found.loss)


def test_large_logits_do_not_come_with_the_loss(caplog, monkeypatch):
    inputs = eval_batch()
    size = inputs["input_ids"].numel() * 48 * 4
    with torch.no_grad():
        assert tiny_model(eval_logits_bytes=size)(**inputs).logits is not None
        small = tiny_model(eval_logits_bytes=size - 1)
        caplog.clear()
        said = []
        monkeypatch.setattr("video_ma2mba.modeling.modeling_video_ma2mba.logger.warning_once", said.append)
        assert small(**inputs).logits is None
        assert "eval_logits_bytes" in said[0]
        assert "logits_to_keep" in said[0]
        assert small(**inputs, logits_to_keep=0).logits.shape[:2] == inputs["input_ids"].shape
        assert small(**inputs, logits_to_keep=2).logits.shape[1] == 2
        said.clear()
        assert tiny_model(eval_logits_bytes=0)(**inputs).logits is None
        assert not said


def test_training_gives_logits_only_if_asked():
    model, inputs = tiny_model().train(), eval_batch()
    assert model(**inputs).logits is None
    assert model(**inputs, logits_to_keep=None).logits is None
    both = model(**inputs, logits_to_keep=0)
    alone = model(**{name: value for name, value in inputs.items() if name != "labels"}).logits
    real = inputs["attention_mask"].bool()
    torch.testing.assert_close(both.logits[real], alone[real], **CLOSE)
    both.logits.sum().backward()
    assert model.get_input_embeddings().weight.grad.any()


# --- generation ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("frame_counts", [(2,), (3, 1)])
def test_continuing_with_all_ids_again(model, frame_counts):
    """The past is cut from ids and frames: the answer is that of the whole conversation without a past."""
    inputs, _ = batch(frame_counts)
    first = model.generate(**inputs, **GREEDY, return_dict_in_generate=True)
    cache = first["cache" if "cache" in first else "past_key_values"]
    question = words(4, 9).expand(len(frame_counts), -1)
    more = torch.full((len(frame_counts), TOKENS_PER_FRAME), VIDEO)
    mask = torch.cat([inputs["attention_mask"], torch.ones_like(first.sequences[:, inputs["input_ids"].shape[1] :])], 1)
    for added, new_frames in ((question, 0), (torch.cat([more, question], dim=1), 1)):
        ids = torch.cat([first.sequences, added], dim=1)
        whole_mask = torch.cat([mask, torch.ones_like(added)], dim=1)
        rows = [row[:count] for row, count in zip(inputs["pixel_values_videos"], frame_counts, strict=True)]
        rows = [torch.cat([row, video(new_frames, seed=5)[0]]) for row in rows]
        frames = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
        told = {"attention_mask": whole_mask, "pixel_values_videos": frames, **GREEDY}
        expected = model.generate(ids, **told)
        assert torch.equal(model.generate(ids, cache=cache, **told), expected)
    if len(frame_counts) == 1:
        assert torch.equal(model.generate(ids, cache=cache, pixel_values_videos=frames, **GREEDY), expected)


def test_a_cache_that_would_not_be_read_is_refused(model):
    with torch.no_grad():
        cache = model(words(4)).cache
    with pytest.raises(ValueError, match="use_cache=False"):
        model.generate(words(3), cache=cache, use_cache=False, **GREEDY)


def test_guidance_with_a_negative_prompt(model):
    """Against a loop of full passes over both prompts."""
    ids, negative, scale = prompt(2), words(4, 7), 1.7
    expected, unguided = ids, negative
    for _ in range(6):
        with torch.no_grad():
            yes = model(expected, pixel_values_videos=video(2), use_cache=False).logits[:, -1].log_softmax(-1)
            no = model(unguided, use_cache=False).logits[:, -1].log_softmax(-1)
        scores = scale * (yes - no) + no
        scores[:, GREEDY["suppress_tokens"]] = -torch.inf
        chosen = scores.argmax(-1, keepdim=True)
        expected, unguided = torch.cat([expected, chosen], dim=1), torch.cat([unguided, chosen], dim=1)
    told = {**GREEDY, "guidance_scale": scale, "negative_prompt_ids": negative, "pixel_values_videos": video(2)}
    assert torch.equal(model.generate(ids, **told), expected)
    assert not torch.equal(greedy_by_hand(model, ids, video(2)), expected)
    with pytest.raises(ValueError, match=r"guidance_scale.*num_beams"):
        model.generate(ids, **told, num_beams=2)


# --- graphs ----------------------------------------------------------------------------------------------------------


def test_prefill_and_step_compile_into_whole_graphs(model):
    torch.compiler.reset()
    mask = torch.tensor([[0, 0, 1, 1, 1, 1, 1]])
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        compiled = torch.compile(model, fullgraph=True, backend="eager")
        expected = model(words(7))
        found = compiled(words(7))
        torch.testing.assert_close(found.logits, expected.logits, **CLOSE)
        padded = compiled(words(7), attention_mask=mask).logits
        torch.testing.assert_close(padded[:, 2:], model(words(7), attention_mask=mask).logits[:, 2:], **CLOSE)
        cache, plain = found.cache, expected.cache
        for step in range(3):
            found, expected = compiled(words(1, step), cache=cache), model(words(1, step), cache=plain)
            torch.testing.assert_close(found.logits, expected.logits, **CLOSE)
            cache, plain = found.cache, expected.cache
        assert cache.get_seq_length() == 10
        with pytest.raises(RuntimeError, match="placeholders"):
            compiled(torch.full((1, 7), VIDEO))
    torch.compiler.reset()


def test_prefill_and_step_export(model):
    with torch.no_grad():
        expected = model(words(7))
        prefill = torch.export.export(model, (), {"input_ids": words(7)}).module()
        torch.testing.assert_close(prefill(input_ids=words(7)).logits, expected.logits, **CLOSE)
        step = torch.export.export(model, (), {"input_ids": words(1), "cache": expected.cache.copy()}).module()
        longer = model(words(20, 3)).cache  # a past of another length
        found = step(input_ids=words(1), cache=longer.copy())
        torch.testing.assert_close(found.logits, model(words(1), cache=longer.copy()).logits, **CLOSE)
        assert found.cache.get_seq_length() == 21
