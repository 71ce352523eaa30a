"""`gradient_checkpointing_enable` as people call it: bare, by the Trainer, with PEFT, autocast, in two processes."""

import json
import warnings
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import PreTrainedModel

from video_ma2mba.modeling import modeling_video_ma2mba

from .. import forked
from ..tiny import tiny_model
from .train_two_processes import Clips, train

CUT = {"layer_interval": 2, "sequence_interval": 8}
GRID = [
    {"axes": ("layer",), "layer_interval": 1},
    {"axes": ("layer",), "layer_interval": 2},
    {"axes": ("sequence",), "sequence_interval": 8},
    {**CUT, "order": "layer_major"},
    {**CUT, "order": "sequence_major"},
    {**CUT, "order": "layer_major", "offload": True},
    {"sequence_interval": 8, "offload": True},
    {},
]
# float32 sums in another order. A key bias of the tower changes no attention weight: its gradient is rounding alone.
RTOL, NO_GRADIENT = 1e-5, "k_proj.bias"
# transformers 5.23 gave the method and the Trainer's argument a second name
NAMES = ["gradient_checkpointing"] + ["activation_checkpointing"] * hasattr(
    PreTrainedModel, "activation_checkpointing_enable"
)


def model_of(**kwargs):
    return tiny_model(text={"num_hidden_layers": 3}, **kwargs).train()


def batch_of(indices, padded=False):
    clips = [Clips()[i] for i in indices]
    batch = {name: torch.stack([clip[name] for clip in clips]) for name in clips[0]}
    batch["attention_mask"] = torch.ones_like(batch["input_ids"])
    if padded:  # the first row on the left, the second on the right
        batch["attention_mask"][0, :2] = 0
        batch["attention_mask"][1, -3:] = 0
        batch["labels"][batch["attention_mask"] == 0] = -100
    return batch


def step(model, batch):
    model.zero_grad()
    loss = model(**batch).loss
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


def assert_same_step(found, expected, rtol=RTOL):
    (loss, grads), (expected_loss, expected_grads) = found, expected
    assert abs(loss - expected_loss) <= rtol * expected_loss
    assert grads.keys() == expected_grads.keys()
    for name, theirs in expected_grads.items():
        if name.endswith(NO_GRADIENT):
            continue
        assert grads[name] is not None, name
        assert theirs.abs().max() > 0, name
        assert (grads[name] - theirs).norm() <= rtol * theirs.norm(), name


@pytest.mark.parametrize("options", GRID, ids=str)
def test_every_gradient_through_the_whole_model(options):
    """Loss, backbone, embeddings, projector and tower; batch of three with left and right padding."""
    model, batch = model_of(vision_chunk_size=2), batch_of(range(3), padded=True)
    expected = step(model, batch)
    model.gradient_checkpointing_enable(**options)
    assert model.is_gradient_checkpointing
    assert_same_step(step(model, batch), expected)


def test_gradient_of_the_pixels():
    model, batch = model_of(dtype=torch.float64), batch_of(range(2))  # the tower multiplies rounding
    pixels = torch.randn(2, 3, 3, 16, 16)

    def gradient():
        batch["pixel_values_videos"] = pixels.clone().requires_grad_()
        model(**batch).loss.backward()
        return batch["pixel_values_videos"].grad

    expected = gradient()
    assert expected.abs().max() > 0
    model.gradient_checkpointing_enable(**CUT, offload=True)
    found = gradient()
    assert (found - expected).norm() <= RTOL * expected.norm()


def test_disable_restores_everything(monkeypatch):
    calls = []
    run_checkpointed = modeling_video_ma2mba.Mamba2Backbone.forward.__globals__["run_checkpointed"]
    monkeypatch.setitem(
        modeling_video_ma2mba.Mamba2Backbone.forward.__globals__,
        "run_checkpointed",
        lambda *args: calls.append(1) or run_checkpointed(*args),
    )
    model, batch = model_of(), batch_of(range(2))
    before = {name: id(p) for name, p in model.named_parameters()}
    expected = step(model, batch)
    model.gradient_checkpointing_enable(**CUT)
    step(model, batch)
    assert len(calls) == 1
    model.eval()
    step(model, batch)
    assert len(calls) == 1, "evaluation is not checkpointed"
    model.train()
    model.gradient_checkpointing_disable()
    assert not model.is_gradient_checkpointing
    assert_same_step(step(model, batch), expected, rtol=0)
    assert len(calls) == 1
    assert before == {name: id(p) for name, p in model.named_parameters()}
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_a_frozen_tower_builds_no_graph():
    model, batch = model_of(), batch_of(range(2))
    model.model.vision_tower.requires_grad_(False)
    model.gradient_checkpointing_enable(**CUT)
    seen = []
    model.model.vision_tower.register_forward_hook(lambda _, __, out: seen.append(out.last_hidden_state.requires_grad))
    _, grads = step(model, batch)
    assert seen == [False]
    assert grads["model.multi_modal_projector.linear_1.weight"].abs().max() > 0


@pytest.mark.parametrize("name", NAMES)
def test_bare_and_through_the_newer_name(name):
    model, batch = model_of(), batch_of(range(2))
    expected = step(model, batch)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        getattr(model, f"{name}_enable")()
    assert model.is_checkpointing()
    assert_same_step(step(model, batch), expected)


def test_autocast_in_the_recompute_is_that_of_the_forward_pass():
    model, batch = model_of(), batch_of(range(2))

    def autocast_step():
        model.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = model(**batch).loss
        loss.backward()
        return loss.detach(), {name: p.grad for name, p in model.named_parameters()}

    exact = step(model, batch)[1]
    loss, grads = autocast_step()
    model.gradient_checkpointing_enable(layer_interval=2, sequence_interval=24)
    same_loss, same_grads = autocast_step()
    assert_same_step((same_loss, same_grads), (loss, grads))  # one chunk: the very same operations
    model.gradient_checkpointing_enable(**CUT)
    _, cut_grads = autocast_step()
    for name, truth in exact.items():
        if not name.endswith(NO_GRADIENT):
            plain_error, cut_error = ((g[name] - truth).norm() / truth.norm() for g in (grads, cut_grads))
            assert cut_error <= 2.5 * plain_error + 2**-8, name


@pytest.mark.parametrize("enable_first", [False, True], ids=["after get_peft_model", "before get_peft_model"])
def test_lora(enable_first):
    """Adapters on both projections; the frozen rest gets no gradient, and the adapters get what they get plainly."""
    batch = batch_of(range(2))

    def adapted(options=None, first=False):
        model = model_of()
        if options and first:
            model.gradient_checkpointing_enable(**options)
        torch.manual_seed(3)
        targets = LoraConfig(target_modules=r".*language_model.*\.(in_proj|out_proj)", init_lora_weights=False)
        wrapped = get_peft_model(model, targets)
        if options and not first:
            wrapped.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)
        return wrapped.train()

    expected = step(adapted(), batch)
    assert len(expected[1]) == 3 * 2 * 2
    model = adapted({**CUT, "offload": True}, enable_first)
    assert_same_step(step(model, batch), expected)
    assert all(p.grad is None for p in model.parameters() if not p.requires_grad)


def test_lora_dropout_is_recomputed_alike():
    model = get_peft_model(
        model_of(), LoraConfig(target_modules=r".*\.in_proj", init_lora_weights=False, lora_dropout=0.5)
    ).train()
    batch = batch_of(range(2))
    model.gradient_checkpointing_enable(layer_interval=3, sequence_interval=24)  # one cell draws what a plain run draws
    torch.manual_seed(1)
    found = step(model, batch)
    model.gradient_checkpointing_disable()
    torch.manual_seed(1)
    assert_same_step(found, step(model, batch))
    assert step(model, batch)[0] != found[0]  # other random numbers, another loss


@pytest.mark.parametrize("key", NAMES)
def test_stock_trainer_with_accumulation(tmp_path, key):
    common = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2}
    expected = train(model_of(), tmp_path, **common)
    found = train(
        model_of(), tmp_path, **common, **{key: True, f"{key}_kwargs": {"axes": ["layer", "sequence"], **CUT}}
    )
    assert len(expected) == 4
    assert expected[0] != expected[-1]
    assert found == pytest.approx(expected, rel=1e-4)  # logged with four digits
    bare = train(model_of(), tmp_path, **common, **{key: True})
    assert bare == pytest.approx(expected, rel=1e-4)


def test_two_processes_equal_one(tmp_path):
    results = []
    for count in (1, 2):
        out = tmp_path / f"{count}.json"
        words = ["tests.modeling.train_two_processes", out, 2 // count]
        codes, _, said = forked.run(forked.MODULE, words, count, where=Path(__file__).parents[2])
        assert codes == [0] * count, said[-3000:]
        results.append(json.loads(out.read_text()))
    one, two = results
    assert len(one["losses"]) == 4
    assert two["losses"] == pytest.approx(one["losses"], rel=1e-4)
    for name, weights in one["weights"].items():
        if not name.endswith(NO_GRADIENT):
            # AdamW's first steps are about the sign of a gradient; four of them move a weight by 4e-3
            assert two["weights"][name] == pytest.approx(weights, abs=1e-4), name


@pytest.mark.parametrize(
    "options", [{"every_n_layers": 2}, {"gradient_checkpointing_kwargs": {"every_n_layers": 2, "use_reentrant": True}}]
)
def test_transformers_own_options_are_understood(options):
    model = model_of()
    model.gradient_checkpointing_enable(**options)
    assert model.checkpoint_plan(1, 24).layer_interval == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"axes": ()}, "axes"),
        ({"axes": ("time",)}, "time"),
        ({"layer_interval": 0}, "layer_interval"),
        ({"layer_interval": 4}, "layer_interval"),
        ({"sequence_interval": -8}, "sequence_interval"),
        ({"order": "diagonal"}, "diagonal"),
        ({"memory_budget_bytes": -1}, "memory_budget_bytes"),
        ({"gradient_checkpointing_kwargs": {"intervall": 3}}, "intervall"),
    ],
)
def test_nonsense_is_refused_when_it_is_asked_for(options, message):
    model = model_of()
    with pytest.raises(ValueError, match=message):
        model.gradient_checkpointing_enable(**options)
    assert not model.is_gradient_checkpointing
