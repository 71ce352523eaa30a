"""Mixer, block and backbone: the same numbers as the token-by-token loop, and nothing kept that need not be."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from video_ma2mba.modeling import mamba2
from video_ma2mba.modeling.mamba2 import LayerState, Mamba2Block, Mamba2Mixer, init_mamba2_weights

from ..tiny import tiny_config
from .reference import Largest, Made, assert_gradients_match, leaves, mixer_loop

RTOL_64 = 1e-10  # float64, some thousand operations deep
SEGMENT = 8


@pytest.fixture(autouse=True)
def short_segments(monkeypatch):
    """Several segments and ragged ends already at a few tokens."""
    monkeypatch.setattr(mamba2, "SEGMENT", SEGMENT)


def build(cls, dtype=torch.float64, **text):
    torch.manual_seed(0)
    config = tiny_config(text=text).text_config
    module = cls(config)
    mixer = module if cls is Mamba2Mixer else module.mixer
    init_mamba2_weights(mixer, config)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return module.to(dtype), config


def mixer_inputs(mixer, batch, tokens, hidden=32):
    draw = torch.Generator().manual_seed(tokens)
    shapes = [(batch, tokens, hidden), *(t.shape for t in mixer.new_state(batch))]
    return leaves(*(torch.randn(shape, generator=draw, dtype=torch.float64) for shape in shapes))


def cotangents(tensors):
    draw = torch.Generator().manual_seed(5)
    return [torch.randn(t.shape, generator=draw, dtype=torch.float64).to(t.dtype) for t in tensors]


def masked(tensors, mask):
    """What the outputs at padding are is nobody's business."""
    return tensors if mask is None else (tensors[0] * mask[..., None], *tensors[1:])


def compare_with_loop(mixer, config, batch, tokens, mask=None):
    names = ["hidden_states", "conv_state", "ssm_state", *(name for name, _ in mixer.named_parameters())]
    inputs = [*mixer_inputs(mixer, batch, tokens), *mixer.parameters()]
    weights = dict(zip(names[3:], inputs[3:], strict=True))
    expected = mixer_loop(
        weights, *inputs[:3], mask,
        n_groups=config.n_groups, eps=config.layer_norm_epsilon, time_step_limit=config.time_step_limit,
    )  # fmt: skip
    expected = masked(expected, mask)
    y, state = mixer(inputs[0], LayerState(*inputs[1:3]), mask)
    found = masked((y, *state), mask)
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=RTOL_64, atol=RTOL_64)
    expected_gradients = torch.autograd.grad(expected, inputs, cotangents(expected))
    assert_gradients_match(
        torch.autograd.grad(found, inputs, cotangents(found)), expected_gradients, names, rtol=RTOL_64
    )


@pytest.mark.parametrize("tokens", [1, SEGMENT - 1, SEGMENT, SEGMENT + 1, 2 * SEGMENT + 3])
@pytest.mark.parametrize("n_groups", [1, 2])
def test_mixer_is_the_loop(n_groups, tokens):
    mixer, config = build(Mamba2Mixer, n_groups=n_groups)
    compare_with_loop(mixer, config, 2, tokens)


def test_mixer_with_biases_and_limits():
    mixer, config = build(Mamba2Mixer, use_bias=True, time_step_limit=(0.001, 0.7))
    compare_with_loop(mixer, config, 2, 11)


def test_mixer_without_conv_bias():
    mixer, config = build(Mamba2Mixer, use_conv_bias=False)
    compare_with_loop(mixer, config, 1, 5)


@pytest.mark.parametrize("lengths", [(11, 3), (9, 8), (11, 0)])
def test_mixer_with_padding(lengths):
    """Padding comes after the real tokens of a row here, and changes neither states nor gradients."""
    mixer, config = build(Mamba2Mixer)
    compare_with_loop(mixer, config, 2, 11, torch.arange(11) < torch.tensor(lengths)[:, None])


@settings(max_examples=10, deadline=None)
@given(tokens=st.integers(2, 2 * SEGMENT + 3), data=st.data())
def test_block_split_changes_nothing(tokens, data):
    """Cut anywhere: the same outputs, states and gradients, through both states that are handed on at the cut."""
    cut = data.draw(st.integers(1, tokens - 1))
    block, _ = build(Mamba2Block)
    inputs = [*mixer_inputs(block.mixer, 2, tokens), *block.parameters()]
    names = ["hidden_states", "conv_state", "ssm_state", *(name for name, _ in block.named_parameters())]
    whole, state = block(inputs[0], LayerState(*inputs[1:3]))
    expected = (whole, *state)
    first, state = block(inputs[0][:, :cut], LayerState(*inputs[1:3]))
    second, state = block(inputs[0][:, cut:], state)
    found = (torch.cat([first, second], dim=1), *state)
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=RTOL_64, atol=RTOL_64)
    expected_gradients = torch.autograd.grad(expected, inputs, cotangents(expected))
    assert_gradients_match(
        torch.autograd.grad(found, inputs, cotangents(found)), expected_gradients, names, rtol=RTOL_64
    )


def test_gradient_reaches_the_first_half_through_each_state_alone():
    block, _ = build(Mamba2Block)
    for kept in (0, 1):
        hidden, *state = mixer_inputs(block.mixer, 1, 6)
        _, border = block(hidden[:, :3], LayerState(*state))
        border = LayerState(*(t if i == kept else t.detach() for i, t in enumerate(border)))
        second, _ = block(hidden[:, 3:].detach(), border)
        (gradient,) = torch.autograd.grad(second.square().sum(), hidden)
        assert gradient[:, :3].abs().max() > 1e-3, LayerState._fields[kept]


@pytest.mark.parametrize("with_grad", [True, False])
@pytest.mark.parametrize("tokens", [1, 3, 2 * SEGMENT, 64])
def test_states_are_copies(tokens, with_grad):
    """A kept state is as large as itself: it does not keep the chunk alive that it came from."""
    block, _ = build(Mamba2Block, dtype=torch.float32)
    hidden = torch.randn(2, tokens, 32)
    with torch.set_grad_enabled(with_grad):
        _, state = block(hidden, block.mixer.new_state(2))
    for name, tensor in state._asdict().items():
        assert tensor.untyped_storage().nbytes() == tensor.nbytes, name


@pytest.mark.parametrize("residual_in_fp32", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_block_saves_in_proj_output_and_hidden_stream_alone(dtype, residual_in_fp32):
    """Counted between forward and backward: every tensor a fresh operation made and autograd still holds."""
    tokens = 4 * SEGMENT
    block, config = build(Mamba2Block, dtype=dtype, residual_in_fp32=residual_in_fp32)
    for name in ("A_log", "D", "dt_bias"):
        setattr(block.mixer, name, torch.nn.Parameter(getattr(block.mixer, name).float()))
    hidden = torch.randn(1, tokens, config.hidden_size, dtype=torch.float32 if residual_in_fp32 else dtype)
    hidden.requires_grad_()
    state = block.mixer.new_state(1)
    with Made(known=(hidden, *state, *block.parameters())) as made:
        out, new_state = block(hidden, state)
    projection = block.mixer.in_proj.out_features
    assert made.held_bytes(but=(out, *new_state)) == [tokens * projection * dtype.itemsize]
    # and it is enough: the backward pass runs
    (out.float().square().sum() + new_state.ssm_state.square().sum()).backward()
    assert hidden.grad.abs().max() > 0


def test_mixer_holds_one_segment_of_the_scan():
    """The largest tensor is in_proj's output; nothing with tokens x tokens, nor chunk x chunk x state x heads."""
    tokens, state_size = 4 * SEGMENT, 64
    mixer, _ = build(Mamba2Mixer, dtype=torch.float32, state_size=state_size)
    hidden = torch.randn(1, tokens, 32, requires_grad=True)
    with Largest() as largest:
        y, state = mixer(hidden, mixer.new_state(1))
        (y.sum() + state.ssm_state.sum()).backward()
    assert largest.numel == tokens * mixer.in_proj.out_features, largest.shape
    assert largest.numel < SEGMENT * SEGMENT * state_size * mixer.num_heads


def test_state_stays_float32_in_a_bfloat16_model():
    block, _ = build(Mamba2Block, dtype=torch.bfloat16)
    state = block.mixer.new_state(1)
    for _ in range(2):
        hidden, state = block(torch.randn(1, 3, 32, dtype=torch.bfloat16), state)
    assert {t.dtype for t in state} == {torch.float32}
    assert hidden.dtype == torch.float32  # the residual stream


def test_norm_saves_its_input_alone_and_is_right():
    torch.manual_seed(0)
    norm = mamba2.Mamba2RMSNorm(6, eps=1e-5).double()
    weight = torch.randn(6, dtype=torch.float64)
    norm.weight.data = weight
    (x,) = leaves(torch.randn(2, SEGMENT + 3, 6, dtype=torch.float64))
    expected = x / torch.sqrt(x.square().mean(-1, keepdim=True) + 1e-5) * norm.weight
    torch.testing.assert_close(norm(x), expected, rtol=RTOL_64, atol=RTOL_64)
    expected_gradients = torch.autograd.grad(expected.sin().sum(), (x, norm.weight))
    gradients = torch.autograd.grad(norm(x).sin().sum(), (x, norm.weight))
    assert_gradients_match(gradients, expected_gradients, ("x", "weight"), rtol=RTOL_64)
