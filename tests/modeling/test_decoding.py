"""A decode step writes its states in place where nobody else holds them, and leaves alone those that somebody holds."""

import pytest
import torch
from transformers import CompileConfig

from video_ma2mba.modeling.mamba2 import Mamba2Backbone
from video_ma2mba.modeling.mamba2_cache import OwnLayerState

from ..tiny import tiny_model

NEW = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}


@pytest.fixture(scope="module")
def model():
    return tiny_model()


def states_of(cache):
    return [tensor for layer in cache.layers for tensor in layer]


def prefilled(model, batch=2):
    ids = torch.randint(2, 40, (batch, 7), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return model(ids, use_cache=True).cache


def tokens(model, cache, own, count=4):
    logits = []
    for token in range(count):
        if own:
            cache.own()
        with torch.no_grad():
            out = model(torch.full((len(cache.layers[0].ssm_state), 1), 5 + token), cache=cache, use_cache=True)
        logits.append(out.logits)
        cache = out.cache
    return torch.cat(logits, dim=1), states_of(cache)


@pytest.mark.parametrize("text", [{}, {"n_groups": 2, "use_bias": True, "time_step_limit": (0.01, 0.5)}], ids=str)
def test_in_place_gives_the_same(text):
    model = tiny_model(text=text)
    expected, expected_states = tokens(model, prefilled(model), own=False)
    found, found_states = tokens(model, prefilled(model), own=True)
    assert torch.equal(found, expected)
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(found_states, expected_states, strict=True))


def test_what_a_caller_holds_stays(model):
    cache = prefilled(model)
    held = states_of(cache)
    kept = [tensor.clone() for tensor in held]
    tokens(model, cache, own=False)
    assert all(torch.equal(now, before) for now, before in zip(held, kept, strict=True))


def test_a_copy_takes_the_right_to_write(model):
    cache = prefilled(model)
    cache.own()
    other = cache.copy()
    kept = [tensor.clone() for tensor in states_of(other)]
    tokens(model, cache, own=False)
    assert all(torch.equal(now, before) for now, before in zip(states_of(other), kept, strict=True))
    tokens(model, other, own=False)
    assert not any(isinstance(layer, OwnLayerState) for layer in (*cache.layers, *other.layers))


def test_generate_makes_its_states_once(model, monkeypatch):
    """One set after the prefill, which the steps then write; what is given out is the caller's from then on."""
    places, forward = [], Mamba2Backbone.forward

    def watched(self, inputs_embeds, cache, *args, **kwargs):
        out = forward(self, inputs_embeds, cache, *args, **kwargs)
        places.append([tensor.data_ptr() for tensor in states_of(cache)])
        return out

    monkeypatch.setattr(Mamba2Backbone, "forward", watched)
    ids = torch.randint(2, 40, (1, 7), generator=torch.Generator().manual_seed(2))
    out = model.generate(ids, **NEW, return_dict_in_generate=True)
    assert len(places) == 6
    assert places[1:] == places[:1] * 5
    cache = out["cache" if "cache" in out else "past_key_values"]
    kept = [tensor.clone() for tensor in states_of(cache)]
    held = states_of(cache)
    model.generate(ids[:, :1], cache=cache, **NEW)
    tokens(model, cache, own=False)
    assert all(torch.equal(now, before) for now, before in zip(held, kept, strict=True))


@pytest.mark.parametrize("with_past", [False, True])
def test_generate_compiles_its_step_where_it_is_told_to(model, with_past):
    """And no second time for a longer past. (Beams are not compiled by Transformers.)"""
    ids = torch.randint(2, 40, (1, 7), generator=torch.Generator().manual_seed(3))
    past = {"cache": prefilled(model, 1)} if with_past else {}
    expected = model.generate(ids, **NEW, **past)
    compiled = []

    def backend(graph, inputs):
        compiled.append(graph)
        return graph.forward

    config = CompileConfig(backend=backend, mode=None, fullgraph=True, dynamic=None)
    config._compile_all_devices = True
    past = {"cache": prefilled(model, 1)} if with_past else {}
    torch._dynamo.reset()
    found = model.generate(ids, **NEW, **past, compile_config=config)
    assert torch.equal(found, expected)
    assert 1 <= len(compiled) <= 2, "each token was compiled anew"
