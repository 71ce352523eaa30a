"""Where states begin: with zeros, with what another sample left, with noise like it; resumed bit for bit."""

import shutil

import pytest
import torch

from video_ma2mba.training.initial_states import InitialStates, InitialStatesOptions
from video_ma2mba.training.recipe import read_recipe
from video_ma2mba.training.run import make_trainer, prepare_run

from ..forked import run_well
from ..tiny import tiny_model
from .test_trainer import command, weights_of


def backbone():
    return tiny_model().model.language_model


def filled(cache, seed):
    """The cache as a model would leave it."""
    draw = torch.Generator().manual_seed(seed)
    cache.layers = [
        type(layer)(*(torch.randn(s.shape, generator=draw) * 3 + 5 for s in layer)) for layer in cache.layers
    ]
    return cache


def test_states_are_passed_on_and_a_share_begins_with_zeros():
    model, given = backbone(), InitialStates(InitialStatesOptions("passed", share=0.5), seed=3)
    first = given.begin(model.new_cache(2))
    assert not any(state.any() for layer in first.layers for state in layer)
    left = filled(first, 0).copy()
    given.end(first)
    kinds = set()
    for _ in range(20):
        cache = given.begin(model.new_cache(4))
        for layer, before in zip(cache.layers, left.layers, strict=True):
            for state, kept in zip(layer, before, strict=True):
                for row in range(4):
                    assert not state[row].any() or torch.equal(state[row], kept[row % 2])
                    kinds.add(bool(state[row].any()))
        given.num_batches += 1
    assert kinds == {True, False}


def test_gradients_stop_at_what_was_passed():
    model, given = backbone(), InitialStates(InitialStatesOptions("passed", share=1.0))
    for _ in range(2):
        cache = given.begin(model.new_cache(1))
        assert not any(state.requires_grad for layer in cache.layers for state in layer)
        model(torch.randn(1, 5, 32), cache)
        assert cache.layers[0].ssm_state.requires_grad
        given.end(cache)


def test_noise_has_the_mean_and_spread_of_the_states_by_head():
    model, given = backbone(), InitialStates(InitialStatesOptions("noise", share=1.0))
    cache = model.new_cache(64)
    cache.layers = [
        type(layer)(
            layer.conv_state, torch.arange(1.0, 5.0)[None, :, None, None] * torch.randn_like(layer.ssm_state) + 7
        )
        for layer in cache.layers
    ]
    given.end(cache)
    noise = given.begin(model.new_cache(256)).layers[1].ssm_state
    torch.testing.assert_close(noise.std((0, 2, 3)), torch.arange(1.0, 5.0), rtol=0.05, atol=0)
    torch.testing.assert_close(noise.mean((0, 2, 3)), torch.full((4,), 7.0), rtol=0.05, atol=0)
    # later batches move it slowly
    given.end(filled(model.new_cache(64), 1))
    assert 6.9 < float(given.begin(model.new_cache(256)).layers[1].ssm_state.mean()) < 7.1


@pytest.mark.parametrize("kind", ["passed", "noise"])
def test_a_checkpoint_goes_on_bit_for_bit(kind, tmp_path):
    model, options = backbone(), InitialStatesOptions(kind)
    given = InitialStates(options, seed=1, rank=1)
    for seed in range(3):
        given.begin(model.new_cache(2))
        given.end(filled(model.new_cache(2), seed))
    given.save(tmp_path)
    again = InitialStates(options, seed=1, rank=1)
    again.load(tmp_path)
    for _ in range(5):
        one, other = given.begin(model.new_cache(3)), again.begin(model.new_cache(3))
        states = [
            (a, b)
            for left, right in zip(one.layers, other.layers, strict=True)
            for a, b in zip(left, right, strict=True)
        ]
        assert all(torch.equal(a, b) for a, b in states)
        for each in (given, again):
            each.end(filled(model.new_cache(3), 9))
    with pytest.raises(ValueError, match="no initial states of process 0"):
        InitialStates(options, seed=1).load(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("initial_states.kind=guess", "initial_states.kind must be one of zeros, passed, noise"),
        ("initial_states.share=0", "initial_states.share must lie in"),
        ("joining={shortest_s: 10, longest_s: 5}", "joining: shortest_s and longest_s"),
    ],
)
def test_nonsense_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        read_recipe("finetune", ["model=m", "data=d", "output=o", change])


def test_a_run_begins_with_states_of_the_sample_before(changes):
    """What the model is given is what it left, and evaluation begins with zeros."""
    trainer = make_trainer(
        prepare_run(read_recipe("finetune", changes(initial_states={"kind": "passed", "share": 1.0})))
    )
    seen = []
    trainer.model.model.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(None if kwargs.get("cache") is None else kwargs["cache"].copy()),
        with_kwargs=True,
    )
    trainer.model.model.register_forward_hook(
        lambda _, args, kwargs, out: seen.append(kwargs["cache"].copy() if kwargs["cache"] else None), with_kwargs=True
    )
    trainer.train()
    assert len(seen) == 2 * 4 * 4
    for left, given in zip(seen[1:-1:2], seen[2::2], strict=True):
        assert torch.equal(left.layers[0][1], given.layers[0][1])
        assert given.layers[0][1].any()
    seen.clear()
    trainer.evaluate(trainer.train_dataset)
    assert set(seen) == {None}


def test_two_processes_resume_bit_for_bit(changes, tmp_path):
    """Each has states of its own; with a horizon of four tokens, most batches have no gradient of the tower."""
    more = {"max_steps": 4, "save_steps": 2, "global_batch_size": 2, "initial_states": {"kind": "passed"}}
    more["gradient_checkpointing"] = {"gradient_horizon": 4}
    whole, cut = (changes(output=str(tmp_path / name), **more) for name in ("whole", "cut"))
    run_well(command(whole), 2)
    kept = "checkpoints/checkpoint-2"
    names = {path.name for path in (tmp_path / "whole" / kept).glob("initial_*")}
    assert names == {"initial_states_0.safetensors", "initial_states_1.safetensors"}
    shutil.copytree(tmp_path / "whole" / kept, tmp_path / "cut" / kept)
    run_well(command(cut, "--resume"), 2)
    expected, got = weights_of(tmp_path / "whole"), weights_of(tmp_path / "cut")
    assert all(torch.equal(expected[name], got[name]) for name in expected)
