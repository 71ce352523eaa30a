"""The mixer on the kernels against the token-by-token loop in float64: outputs, both states, every gradient."""

import pytest
import torch

from video_ma2mba.modeling import ssd_kernels
from video_ma2mba.modeling.mamba2 import LayerState, Mamba2Mixer, init_mamba2_weights
from video_ma2mba.modeling.ssd import ssd_scan

from ..modeling.reference import assert_gradients_match, leaves, mixer_loop
from ..tiny import tiny_config

# The kernels' own error in float32: exp and softplus in single precision, sums over some tens of tokens.
RTOL_32 = 2e-5
CHUNK = 16


@pytest.fixture(autouse=True)
def forced(monkeypatch):
    """Never the torch path in silence; and several calls for one sequence."""
    monkeypatch.setenv("VIDEO_MA2MBA_BACKEND", "mamba_ssm")
    monkeypatch.setattr(ssd_kernels, "KERNEL_SEGMENT", 2 * CHUNK)


def build(device, **text):
    torch.manual_seed(0)
    config = tiny_config(text={"chunk_size": CHUNK, "state_size": 16, **text}).text_config
    mixer = Mamba2Mixer(config)
    init_mamba2_weights(mixer, config)
    with torch.no_grad():
        for parameter in mixer.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return mixer.to(device), config


def draw(seed, *shapes):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]


def masked(outputs, mask):
    return outputs if mask is None else (outputs[0] * mask[..., None].to(outputs[0]), *outputs[1:])


def compare_with_loop(mixer, config, batch, tokens, device, mask=None):
    names = ["hidden_states", "conv_state", "ssm_state", *(name for name, _ in mixer.named_parameters())]
    shapes = [(batch, tokens, config.hidden_size), *(state.shape for state in mixer.new_state(batch))]
    inputs = leaves(*draw(tokens, *shapes), *(p.double().cpu() for p in mixer.parameters()))
    expected = masked(
        mixer_loop(
            dict(zip(names[3:], inputs[3:], strict=True)), *inputs[:3], mask,
            n_groups=config.n_groups, eps=config.layer_norm_epsilon, time_step_limit=config.time_step_limit,
        ),
        mask,
    )  # fmt: skip
    cotangents = draw(5, *(out.shape for out in expected))
    expected_gradients = torch.autograd.grad(expected, inputs, cotangents)

    mine = [*(t.detach().float().to(device).requires_grad_() for t in inputs[:3]), *mixer.parameters()]
    y, state = mixer(mine[0], LayerState(*mine[1:3]), None if mask is None else mask.to(device))
    found = masked((y, *state), mask if mask is None else mask.to(device))
    for out, reference in zip(found, expected, strict=True):
        error = (out.double().cpu() - reference).abs().max()
        assert error <= RTOL_32 * reference.abs().max(), error
    gradients = torch.autograd.grad(found, mine, [c.float().to(device) for c in cotangents])
    assert_gradients_match([g.cpu() for g in gradients], expected_gradients, names, rtol=RTOL_32)


@pytest.mark.parametrize("tokens", [1, CHUNK - 1, CHUNK + 1, 2 * CHUNK, 2 * CHUNK + 3])
def test_mixer_is_the_loop(tokens, device):
    compare_with_loop(*build(device), 1, tokens, device)


def test_groups_and_a_batch(device):
    compare_with_loop(*build(device, n_groups=2), 2, 2 * CHUNK + 5, device)


def test_biases_and_an_upper_limit(device):
    compare_with_loop(*build(device, use_bias=True, time_step_limit=(0.0, 0.7)), 1, CHUNK + 2, device)


@pytest.mark.parametrize("text", [{}, {"time_step_limit": (0.01, 0.7)}], ids=str)
def test_padding(text, device):
    mask = torch.tensor([[True] * 19, [True] * 7 + [False] * 12])
    compare_with_loop(*build(device, **text), 2, 19, device, mask)


@pytest.mark.parametrize("use_conv_bias", [True, False])
def test_convolution_of_causal_conv1d(use_conv_bias, device):
    """Its shapes must be multiples of 8; those of the other tests are not."""
    mixer, config = build(device, num_heads=8, head_dim=8, use_conv_bias=use_conv_bias)
    assert mixer.backends(device, torch.float32).conv is not None
    mask = torch.tensor([[True] * (2 * CHUNK + 5), [True] * 7 + [False] * (2 * CHUNK - 2)])
    compare_with_loop(mixer, config, 2, 2 * CHUNK + 5, device, mask)


def test_one_token_at_a_time_is_the_loop(device):
    """The decode kernel, and that it leaves the state it was given as it was."""
    mixer, config = build(device)
    shapes = [(2, 5, config.hidden_size), *(state.shape for state in mixer.new_state(2))]
    inputs = draw(1, *shapes)
    weights = {name: p.detach().double().cpu() for name, p in mixer.named_parameters()}
    expected = mixer_loop(
        weights, *inputs, n_groups=1, eps=config.layer_norm_epsilon, time_step_limit=config.time_step_limit
    )
    hidden_states, *first = (t.float().to(device) for t in inputs)
    state, kept = LayerState(*first), [t.clone() for t in first]
    with torch.no_grad():
        outputs = []
        for t in range(5):
            y, state = mixer(hidden_states[:, t : t + 1], state)
            outputs.append(y)
    for out, reference in zip((torch.cat(outputs, dim=1), *state), expected, strict=True):
        assert (out.double().cpu() - reference).abs().max() <= RTOL_32 * reference.abs().max()
    for now, before in zip(first, kept, strict=True):
        assert torch.equal(now, before)


def test_gradient_of_the_state_keeps_its_bits(device):
    """In half precision the released scan rounds the gradient of the first state; ours comes in float32.

    float16, because the interpreter knows no bfloat16. The reference rounds what goes in as the kernels do.
    """
    mixer, _ = build(device)
    shape, b, t = mixer.shape, 1, 3 * CHUNK
    x, dt, B, C, D, state, grad_y, grad_final = draw(
        2, (b, t, shape.num_heads, shape.head_dim), (b, t, shape.num_heads), (b, t, 1, shape.state_size),
        (b, t, 1, shape.state_size), (shape.num_heads,), mixer.new_state(b).ssm_state.shape,
        (b, t, shape.num_heads, shape.head_dim), mixer.new_state(b).ssm_state.shape,
    )  # fmt: skip
    A, grad_y = -torch.rand(shape.num_heads).double() * 0.05, grad_y * 1e-4  # most of it comes from the far end
    x, dt, B, C, grad_y = (v.half() for v in (x, dt, B, C, grad_y))
    leaf = state.clone().requires_grad_()
    step = torch.nn.functional.softplus(dt.double())
    y, final = ssd_scan(x.double(), step, A, B.double(), C.double(), D, leaf)
    (expected,) = torch.autograd.grad((y, final), leaf, (grad_y.double(), grad_final))
    operands, of_dt = [v.to(device) for v in (x, B, C)], dt.to(device)
    of_steps = of_dt, None, (-A).log().float().to(device), torch.zeros(shape.num_heads, device=device), shape
    *_, found = ssd_kernels._scan_backward(
        grad_y.to(device), operands, of_steps, D.float().to(device), state.float().to(device),
        grad_final.float().to(device), [torch.empty_like(v) for v in operands], torch.empty_like(of_dt),
    )  # fmt: skip
    assert found.dtype == torch.float32
    error = (found.double().cpu() - expected).abs().max() / expected.abs().max()
    assert 0 < error < 2**-13, f"{error:.1e}: no better than a gradient rounded to half precision"


@pytest.mark.parametrize("rows", [(1, 5), (2, 3)])
def test_norm_before_a_mixer(rows, device):
    hidden_states, weight, grad = draw(3, (*rows, 24), (24,), (*rows, 24))
    ours = [t.float().to(device).requires_grad_() for t in (hidden_states, weight)]
    y = ssd_kernels.kernel_rms_norm(*ours, 1e-5)
    found = torch.autograd.grad(y, ours, grad.float().to(device))
    leaves = [t.requires_grad_() for t in (hidden_states, weight)]
    expected = torch.nn.functional.rms_norm(leaves[0], (24,), leaves[1], 1e-5)
    for mine, theirs in zip((y, *found), (expected, *torch.autograd.grad(expected, leaves, grad)), strict=True):
        assert (mine.double().cpu() - theirs).abs().max() <= RTOL_32 * theirs.abs().max()
