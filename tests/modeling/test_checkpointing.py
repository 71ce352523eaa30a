"""MA-GC's executor: every gradient is that of the plain run, the recompute is counted, the grid is the paper's."""

from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from video_ma2mba.modeling.checkpointing import run_checkpointed
from video_ma2mba.modeling.run_layers import run_layers

from ..tiny import tiny_model
from .reference import assert_gradients_match, leaves

# float32: the two runs add the same numbers in another order; the bound
RTOL = 1e-5
CHUNK = 8


def plan(order="sequence_major", layer_interval=3, sequence_interval=CHUNK, offload=False):
    return SimpleNamespace(
        order=order, layer_interval=layer_interval, sequence_interval=sequence_interval, offload=offload
    )


def backbone(dtype=torch.float32, layers=3):
    model = tiny_model(dtype, text={"num_hidden_layers": layers}).model.language_model.train()
    for name, parameter in model.named_parameters():
        if dtype == torch.bfloat16 and name.endswith(("A_log", "mixer.D", "dt_bias")):
            parameter.data = parameter.data.float()  # as `from_pretrained` leaves them
    return model


def padding_mask(tokens):
    """Three rows: whole, short by a third, and of one token."""
    lengths = torch.tensor([tokens, max(1, 2 * tokens // 3), 1])
    return torch.arange(tokens) < lengths[:, None]


class Case:
    """One set of inputs, run plainly and by plan, with cotangents for the result and the final states."""

    def __init__(self, model, tokens, batch=3, mask=None, kept=None):
        self.model, self.mask = model, mask
        draw = torch.Generator().manual_seed(tokens)
        dtype = model.embeddings.weight.dtype
        states = [t for state in model.new_cache(batch).layers for t in state]
        self.embeds = torch.randn(batch, tokens, 32, generator=draw).to(dtype)
        self.states = [torch.randn(t.shape, generator=draw).to(t.dtype) for t in states]
        self.keep = None
        if kept is not None:
            wanted = torch.rand(batch, tokens, generator=draw) < kept
            wanted[:, -1] = True
            self.keep = torch.where(wanted, wanted.flatten().cumsum(0).view_as(wanted) - 1, -1)
        self.names = ["embeds", *(f"state {i}" for i in range(len(states)))]
        self.names += [name for name, p in model.layers.named_parameters() if p.requires_grad]
        self.cotangents = None

    def run(self, how):
        """Returns the outputs and the gradients of embeddings, states and parameters, through `how`: a plan or None."""
        embeds, *states = leaves(self.embeds, *self.states)
        params = [p for p in self.model.layers.parameters() if p.requires_grad]
        pairs = list(zip(states[::2], states[1::2], strict=True))
        if how is None:
            out, final = run_layers(self.model.layers, embeds, pairs, self.mask)
            if self.keep is not None:
                chosen = self.keep >= 0
                out = out[chosen][self.keep[chosen].argsort()]
        else:
            out, final = run_checkpointed(self.model.layers, how, embeds, pairs, self.mask, self.keep)
        outputs = [out, *(t for state in final for t in state)]
        if self.mask is not None and self.keep is None:
            outputs[0] = out * self.mask[..., None]  # what comes out at padding is nobody's business
        if self.cotangents is None:
            draw = torch.Generator().manual_seed(1)
            self.cotangents = [torch.randn(t.shape, generator=draw).to(t.dtype) for t in outputs]
        grads = torch.autograd.grad(outputs, [embeds, *states, *params], self.cotangents, allow_unused=True)
        return [t.detach() for t in outputs], grads

    def assert_equal(self, how, rtol=RTOL):
        expected, expected_grads = self.run(None)
        found, grads = self.run(how)
        for mine, theirs in zip(found, expected, strict=True):
            assert (mine - theirs).abs().max() <= rtol * theirs.abs().max()
        assert_gradients_match(grads, expected_grads, self.names, rtol=rtol)


@pytest.mark.parametrize("offload", [False, True], ids=["device", "offload"])
@pytest.mark.parametrize("layer_interval", [1, 2, 3])
@pytest.mark.parametrize("order", ["layer_major", "sequence_major"])
def test_equals_plain_with_padding(order, layer_interval, offload):
    tokens = 2 * CHUNK + 5
    case = Case(backbone(), tokens, mask=padding_mask(tokens))
    case.assert_equal(plan(order, layer_interval, CHUNK, offload))


@pytest.mark.parametrize("tokens", [1, CHUNK - 1, CHUNK, CHUNK + 1, 23, 37])
@pytest.mark.parametrize("order", ["layer_major", "sequence_major"])
def test_ragged_lengths(order, tokens):
    Case(backbone(), tokens, kept=0.3).assert_equal(plan(order, 2))


@pytest.mark.parametrize("how", [plan("layer_major", 1, 30), plan("layer_major", 2, 30), plan("sequence_major", 3, 7)])
def test_one_axis_alone(how):
    """axes=("layer",) is one time block, axes=("sequence",) one layer block."""
    Case(backbone(), 30, batch=2).assert_equal(how)


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_any_cut(data):
    tokens = data.draw(st.integers(1, 40), label="tokens")
    how = plan(
        data.draw(st.sampled_from(["layer_major", "sequence_major"]), label="order"),
        data.draw(st.integers(1, 4), label="layer_interval"),
        data.draw(st.integers(1, tokens), label="sequence_interval"),
        data.draw(st.booleans(), label="offload"),
    )
    model = backbone(torch.float64, layers=4)  # any cut is exact; in float32 the order of the sums would show
    Case(model, tokens, batch=2, kept=data.draw(st.sampled_from([None, 0.2, 0.9]))).assert_equal(how, rtol=1e-10)


@pytest.mark.parametrize("order", ["layer_major", "sequence_major"])
def test_bf16_is_no_worse_than_plain_bf16(order):
    """Both against float64: cutting may not cost accuracy, and float32 sums over chunks rather gain some."""
    tokens = 5 * CHUNK + 3
    model = backbone(torch.bfloat16)
    case = Case(model, tokens, batch=2)
    plain, plain_grads = case.run(None)
    cut, cut_grads = case.run(plan(order, 1))
    exact_model = backbone(torch.float64)
    exact_model.load_state_dict(model.state_dict())
    exact_case = Case(exact_model, tokens, batch=2)
    exact_case.embeds = case.embeds.double()
    exact_case.states = [t.double() for t in case.states]
    exact_case.cotangents = [t.double() for t in case.cotangents]
    exact, exact_grads = exact_case.run(None)
    names = ["out", *(f"final state {i}" for i in range(len(exact) - 1)), *case.names]
    errors = []
    for name, mine, theirs, truth in zip(
        names, [*cut, *cut_grads], [*plain, *plain_grads], [*exact, *exact_grads], strict=True
    ):
        assert truth.norm() > 0, name
        assert mine.dtype == theirs.dtype, name
        cut_error, plain_error = ((t.double() - truth).norm() / truth.norm() for t in (mine, theirs))
        # a tensor of four numbers has a noisy error of its own, so each has some room, and all together have little
        assert cut_error <= 2.5 * plain_error + 2**-8, f"{name}: {cut_error:.1e} against {plain_error:.1e}"
        errors.append(torch.stack([cut_error, plain_error]))
    cut_total, plain_total = torch.stack(errors).square().mean(dim=0).sqrt()
    assert cut_total <= 1.1 * plain_total


def test_frozen_parameters_get_no_gradient_and_build_no_sum():
    model = backbone()
    for name, parameter in model.layers.named_parameters():
        parameter.requires_grad_("in_proj" in name)
    case = Case(model, 20)
    case.assert_equal(plan())
    assert len(case.names) == 1 + 2 * 3 + 3


def test_the_final_states_alone_may_have_a_loss():
    """As where a later call of the model goes on from them; the hidden states then have no gradient at all."""
    case = Case(backbone(torch.float64), 20)
    pairs = list(zip(case.states[::2], case.states[1::2], strict=True))
    found = []
    for run in (run_layers, lambda blocks, *inputs: run_checkpointed(blocks, plan(), *inputs)):
        (embeds,) = leaves(case.embeds)
        _, states = run(case.model.layers, embeds, pairs)
        params = list(case.model.layers.parameters())
        loss = sum(tensor.sin().sum() for state in states for tensor in state)
        found.append(torch.autograd.grad(loss, [embeds, *params], allow_unused=True))
    reached = [i for i, gradient in enumerate(found[0]) if gradient is not None and gradient.any()]
    assert not any(gradient.any() for i, gradient in enumerate(found[1]) if gradient is not None and i not in reached)
    names = ["embeds", *(name for name, _ in case.model.layers.named_parameters())]
    assert len(reached) > len(names) / 2
    expected, mine = ([grads[i] for i in reached] for grads in found)
    assert_gradients_match(mine, expected, [names[i] for i in reached], rtol=1e-10)


class Idle(nn.Module):
    """A block with a parameter that it does not use."""

    def __init__(self):
        super().__init__()
        self.used, self.unused = nn.Parameter(torch.ones(())), nn.Parameter(torch.ones(()))

    def forward(self, hidden_states, state, mask):
        return hidden_states * self.used, state


def test_a_parameter_that_is_not_used_gets_no_gradient():
    blocks = nn.ModuleList([Idle()])
    out, _ = run_checkpointed(blocks, plan(), torch.ones(1, 20, 2, requires_grad=True), [(torch.zeros(1),)])
    out.sum().backward()
    assert blocks[0].used.grad == 40
    assert blocks[0].unused.grad is None


class DropoutBlock(nn.Module):
    """A block of another kind, with dropout: the executor knows blocks and states, not Mamba-2."""

    def __init__(self):
        super().__init__()
        self.linear, self.dropout = nn.Linear(32, 32), nn.Dropout(0.5)

    def forward(self, hidden_states, state, mask):
        total = state[0] + hidden_states.sum(dim=1)
        return hidden_states + self.dropout(self.linear(hidden_states)) + total[:, None], (total,)


@pytest.mark.parametrize("order", ["layer_major", "sequence_major"])
def test_dropout_is_the_same_in_the_recompute(order):
    """The gradient of a linear block with dropout is its recorded mask: a wrong mask shows as a wrong gradient."""
    torch.manual_seed(0)
    blocks = nn.ModuleList([DropoutBlock() for _ in range(2)])
    embeds = torch.randn(1, 20, 32, requires_grad=True)
    direction = torch.randn_like(embeds)

    def loss(inputs):
        torch.manual_seed(7)
        out, _ = run_checkpointed(blocks, plan(order, 1), inputs, [(torch.zeros(1, 32),)] * 2)
        return (out * direction).sum()

    (grad,) = torch.autograd.grad(loss(embeds), embeds)
    probe = torch.randn_like(embeds)
    with torch.no_grad():  # the loss is linear in the embeddings, so a difference is exact up to rounding
        difference = loss(embeds + probe) - loss(embeds)
    assert abs(difference) > 1
    torch.testing.assert_close((grad * probe).sum(), difference, rtol=1e-3, atol=1e-3)


def test_a_second_backward_is_refused_with_a_remedy():
    case = Case(backbone(), 20)
    embeds = case.embeds.requires_grad_()
    out, _ = run_checkpointed(
        case.model.layers, plan(), embeds, list(zip(case.states[::2], case.states[1::2], strict=True))
    )
    out.sum().backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="call the model again"):
        out.sum().backward()


def test_parameters_are_back_in_place_after_an_error_in_backward():
    case = Case(backbone(), 20)
    before = dict(case.model.layers.named_parameters())
    out, _ = run_checkpointed(
        case.model.layers, plan(), case.embeds, list(zip(case.states[::2], case.states[1::2], strict=True))
    )
    case.model.layers[0].norm.variance_epsilon = "broken"
    with pytest.raises(TypeError):
        out.sum().backward()
    assert all(p is before[name] for name, p in case.model.layers.named_parameters())


class Flops(TorchDispatchMode):
    """Floating-point operations by kind of product. The only `mm` of a block without biases are its projections."""

    def __init__(self):
        super().__init__()
        self.of = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func._overloadpacket in flop_registry:
            self.of[func._overloadpacket] += flop_registry[func._overloadpacket](*args, **(kwargs or {}), out_val=out)
        return out


@pytest.mark.parametrize(
    ("how", "units"),
    [
        (None, 3),
        (plan("layer_major", 1), 4),
        (plan("layer_major", 2), 4),
        (plan("sequence_major", 4), 4),
        (plan("sequence_major", 1), 5 - 1 / 4),
        (plan("sequence_major", 2), 5 - 2 / 4),
    ],
    ids=["off", "layer_major l=1", "layer_major l=2", "sequence_major l=L", "sequence_major l=1", "sequence_major l=2"],
)
def test_compute_units_by_counted_flops(how, units):
    """In units of one forward pass through the projections. Two recomputes cost 5, less the last layer block: only its
    lower border is needed, not its output, so it is computed again once and not twice."""
    layers, tokens = 4, 24
    case = Case(backbone(layers=layers), tokens, batch=1)
    with Flops() as flops:
        case.run(how)
    projection, inner = 2 * 64 + 2 * 8 + 4, 64
    one_forward = 2 * tokens * layers * (32 * projection + inner * 32)
    assert flops.of[torch.ops.aten.mm] / one_forward == units
    print(f"projections: {units} units; all products of the model: {sum(flops.of.values()) / one_forward:.2f}")


class TracingBlock(nn.Module):
    """Notes which tokens it was run on, and whether with a graph. Its state is the number of tokens before."""

    def __init__(self, layer, trace):
        super().__init__()
        self.weight, self.layer, self.trace = nn.Parameter(torch.ones(())), layer, trace

    def forward(self, hidden_states, state, mask):
        start, end = int(state[0]), int(state[0]) + hidden_states.shape[1]
        self.trace.append((self.layer, start, end, torch.is_grad_enabled()))
        return hidden_states * self.weight, (state[0] + hidden_states.shape[1],)


def trace_of(how, layers=4, tokens=20):
    trace = []
    blocks = nn.ModuleList([TracingBlock(i, trace) for i in range(layers)])
    embeds = torch.randn(1, tokens, 2, requires_grad=True)
    out, _ = run_checkpointed(blocks, how, embeds, [(torch.zeros(()),) for _ in range(layers)])
    forward = list(trace)
    trace.clear()
    out.sum().backward()
    return forward, trace


def cells(time_blocks, layer_blocks, graph):
    return [(j, a, b, graph) for a, b in time_blocks for block in layer_blocks for j in block]


def test_layer_major_visits_the_grid_of_algorithms_1_and_2():
    """Forward: every layer and token once. Backward: time blocks from last to first, in each the layer blocks from last
    to first, each cell restored once from its two checkpoints."""
    forward, backward = trace_of(plan("layer_major", 2, 8))
    times, blocks = [(0, 8), (8, 16), (16, 20)], [(0, 1), (2, 3)]
    assert forward == cells(times, blocks, False)
    assert backward == cells(times[::-1], blocks[::-1], True)


def test_sequence_major_restores_a_chunks_lower_borders_first():
    forward, backward = trace_of(plan("sequence_major", 2, 8))
    times = [(0, 8), (8, 16), (16, 20)]
    assert forward == cells(times, [(0, 1, 2, 3)], False)
    expected = []
    for time in times[::-1]:
        expected += cells([time], [(0, 1)], False) + cells([time], [(2, 3), (0, 1)], True)
    assert backward == expected


def test_a_border_keeps_no_chunk_alive():
    """What waits at the borders is as large as the states, not as the chunks they were cut from."""
    case = Case(backbone(), 5 * CHUNK, batch=1)
    out, _ = run_checkpointed(
        case.model.layers,
        plan(),
        case.embeds.requires_grad_(),
        list(zip(case.states[::2], case.states[1::2], strict=True)),
    )
    run = out.grad_fn.run
    kept = [t for border in run.left_borders for state in border for t in state]
    assert len(kept) == 5 * 3 * 2
    assert all(t.untyped_storage().nbytes() == t.nbytes for t in kept)
