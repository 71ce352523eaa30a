"""`recompute_segments` and `saved_as_recipe` against plain autograd."""

from contextlib import nullcontext

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn import functional as F

from video_ma2mba.modeling.recompute import recompute_segments, saved_as_recipe

from .reference import assert_gradients_match, leaves

NAMES = ("x", "state", "weight", "scale")


def toy(sequence, states, params):
    """A leaky running sum: needs the state, all parameters, and a sequence that has no gradient."""
    x, keep, _ = sequence
    (state,) = states
    weight, _, scale = params
    outputs = []
    for t in range(x.shape[1]):
        state = torch.tanh(state * scale) + keep[:, t, None] * (x[:, t] @ weight)
        outputs.append(state * x[:, t])
    return torch.stack(outputs, dim=1), (state,)


def toy_inputs(tokens, dtype=torch.float64):
    draw = torch.Generator().manual_seed(tokens)
    shapes = [(2, tokens, 5), (2, 5), (5, 5), (5,)]
    tensors = leaves(*(torch.randn(shape, generator=draw, dtype=torch.float64) for shape in shapes), dtype=dtype)
    return tensors, torch.rand(2, tokens, generator=draw) > 0.3


def by_segments(segment):
    def run(x, keep, state, weight, scale):
        y, states, again = recompute_segments(toy, segment, (x, keep, None), (state,), (weight, None, scale))
        assert torch.equal(again(), y)
        return y, states[0]

    return run


def plainly(x, keep, state, weight, scale):
    y, states = toy((x, keep, None), (state,), (weight, None, scale))
    return y, states[0]


@pytest.mark.parametrize("tokens", [1, 3, 4, 5, 11])
@pytest.mark.parametrize("use", ["both", "y", "state"])
def test_equals_plain_autograd(tokens, use):
    found = []
    for run in (plainly, by_segments(4)):
        (x, state, weight, scale), keep = toy_inputs(tokens)
        y, final = run(x, keep, state, weight, scale)
        loss = {"both": y.sin().sum() + final.cos().sum(), "y": y.sin().sum(), "state": final.cos().sum()}[use]
        found.append((y, final, torch.autograd.grad(loss, (x, state, weight, scale))))
    (y, final, expected), (y_segments, final_segments, gradients) = found
    assert torch.equal(y, y_segments)  # the same operations in the same order
    assert torch.equal(final, final_segments)
    assert_gradients_match(gradients, expected, NAMES, rtol=1e-12)  # sums over segments instead of over tokens


@pytest.mark.parametrize("trained", [("x",), ("state",), ("weight",), ("scale",), ("x", "scale"), ("state", "weight")])
def test_frozen_inputs_stay_frozen(trained):
    """The rest gets its gradient: between segments the state's flows even where the first state is frozen."""
    found = []
    for run in (plainly, by_segments(3)):
        tensors, keep = toy_inputs(8)
        inputs = {name: t.detach().requires_grad_(name in trained) for name, t in zip(NAMES, tensors, strict=True)}
        y, final = run(inputs["x"], keep, inputs["state"], inputs["weight"], inputs["scale"])
        (y.sin().sum() + final.cos().sum()).backward()
        found.append([inputs[name].grad for name in trained])
        assert all(t.grad is None for name, t in inputs.items() if name not in trained)
    assert_gradients_match(found[1], found[0], trained, rtol=1e-12)


def test_results_without_any_gradient():
    """Here one output depends on nothing that is trained, and one parameter is not used by every segment."""

    def fn(sequence, states, params):
        return sequence[0] * params[0], (states[0] + sequence[0].sum(1),)

    x, state = torch.randn(2, 7), torch.zeros(2)
    weight = torch.tensor(3.0, requires_grad=True)
    y, (final,), _ = recompute_segments(fn, 3, (x,), (state,), (weight,))
    y.sum().backward()
    torch.testing.assert_close(weight.grad, x.sum())
    torch.testing.assert_close(final, x.sum(1))


def test_backward_twice():
    (x, state, weight, scale), keep = toy_inputs(7)
    y, final = by_segments(3)(x, keep, state, weight, scale)
    loss = y.sum() + final.sum()
    first = torch.autograd.grad(loss, (x, state, weight, scale), retain_graph=True)
    second = torch.autograd.grad(loss, (x, state, weight, scale))
    for mine, theirs in zip(first, second, strict=True):
        assert torch.equal(mine, theirs)


def test_parameter_gradients_are_summed_in_float32():
    """1 + many times 2^-9: in bfloat16, which has 8 bits, every single addition would be lost."""

    def fn(sequence, states, params):
        return sequence[0] * params[0], states

    tokens = 1 + 256
    x = torch.full((1, tokens), 2.0**-9, dtype=torch.bfloat16)
    x[0, -1] = 1
    weight = torch.ones((), dtype=torch.bfloat16, requires_grad=True)
    y, _, _ = recompute_segments(fn, 1, (x,), params=(weight,))
    y.sum().backward()
    assert weight.grad.dtype == torch.bfloat16
    assert weight.grad == 1 + 256 * 2.0**-9


def test_lets_its_inputs_go_after_backward():
    (x, state, weight, scale), keep = toy_inputs(7)
    hidden = x * 2
    y, final = by_segments(3)(hidden, keep, state, weight, scale)
    held = StorageWeakRef(hidden.untyped_storage())
    del hidden
    assert not held.expired()
    (y.sum() + final.sum()).backward()
    assert held.expired()


def test_without_grad_there_is_no_graph():
    (x, state, weight, scale), keep = toy_inputs(7)
    with torch.no_grad():
        y, final = by_segments(3)(x, keep, state, weight, scale)
    assert y.grad_fn is None
    assert final.grad_fn is None


@pytest.mark.parametrize("recipe", [True, False])
def test_recipe_replaces_what_would_be_saved(recipe):
    x, weight = leaves(torch.randn(3, 4, dtype=torch.float64), torch.randn(5, 4, dtype=torch.float64))
    calls = []

    def again():
        calls.append(1)
        return x * 2

    expected = torch.autograd.grad(F.linear(x * 2, weight).sin().sum(), (x, weight))
    hidden = x * 2
    held = StorageWeakRef(hidden.untyped_storage())
    with saved_as_recipe(hidden, again) if recipe else nullcontext():
        y = F.linear(hidden[None], weight)
    del hidden
    assert held.expired() == recipe
    gradients = torch.autograd.grad(y[0].sin().sum(), (x, weight))
    assert bool(calls) == recipe
    assert_gradients_match(gradients, expected, ("x", "weight"), rtol=1e-12)
