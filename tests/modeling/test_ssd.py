"""The scan and the convolution against the token-by-token loop."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from video_ma2mba.modeling.ssd import SMALL_STATE, causal_conv1d, ssd_scan, ssd_step, ssd_step_

from .reference import Largest, assert_gradients_match, leaves, scan_loop

CHUNK = 8
NAMES = ("x", "dt", "A", "B", "C", "D", "ssm_state")
LENGTHS = [1, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK + 3, 23]
# Products and sums in another order: some hundred roundings of 1.1e-16 each at the sizes used here.
RTOL_64 = 1e-11


def scan_inputs(batch, tokens, heads=4, head_dim=3, groups=1, state=5, dtype=torch.float64, seed=0):
    draw = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=draw, dtype=torch.float64).to(dtype)

    return [
        normal(batch, tokens, heads, head_dim),
        torch.nn.functional.softplus(normal(batch, tokens, heads)),
        -torch.exp(normal(heads)),
        normal(batch, tokens, groups, state),
        normal(batch, tokens, groups, state),
        normal(heads),
        normal(batch, heads, head_dim, state),
    ]


def results_and_gradients(scan, inputs):
    """Outputs, final state, and the gradients that fixed random cotangents of both give to all inputs."""
    inputs = leaves(*inputs)
    y, state = scan(*inputs)
    draw = torch.Generator().manual_seed(1)
    cotangents = [torch.randn(t.shape, generator=draw, dtype=torch.float64).to(t.dtype) for t in (y, state)]
    return (y, state), torch.autograd.grad((y, state), inputs, cotangents)


def chunked(*inputs):
    return ssd_scan(*inputs, chunk_size=CHUNK)


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize(
    ("batch", "state"), [(1, 5), (3, 5), (3, SMALL_STATE // 12 + 1)], ids=["one", "small", "large"]
)
def test_step_in_place_is_the_recurrence(batch, state, groups):
    inputs = scan_inputs(batch, 1, heads=4 * groups, groups=groups, state=state)
    expected, expected_state = scan_loop(*inputs)
    written = inputs[-1].clone()
    y = ssd_step_(*inputs[:-1], written)
    torch.testing.assert_close(y, expected, rtol=RTOL_64, atol=RTOL_64)
    torch.testing.assert_close(written, expected_state, rtol=RTOL_64, atol=RTOL_64)


@pytest.mark.parametrize("tokens", LENGTHS)
@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("batch", [1, 3])
def test_scan_is_the_recurrence(batch, groups, tokens):
    inputs = scan_inputs(batch, tokens, groups=groups)
    expected, expected_gradients = results_and_gradients(scan_loop, inputs)
    found, gradients = results_and_gradients(chunked, inputs)
    for mine, theirs in zip(found, expected, strict=True):
        assert mine.shape == theirs.shape
        torch.testing.assert_close(mine, theirs, rtol=RTOL_64, atol=RTOL_64)
    assert_gradients_match(gradients, expected_gradients, NAMES, rtol=RTOL_64)


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("batch", [1, 3])
def test_step_is_the_recurrence(batch, groups):
    inputs = scan_inputs(batch, 1, groups=groups)
    expected, expected_gradients = results_and_gradients(scan_loop, inputs)
    found, gradients = results_and_gradients(ssd_step, inputs)
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=RTOL_64, atol=RTOL_64)
    assert_gradients_match(gradients, expected_gradients, NAMES, rtol=RTOL_64)


@pytest.mark.parametrize("tokens", [CHUNK + 1, 67])
@pytest.mark.parametrize("groups", [1, 2])
def test_float32_error_is_that_of_the_recurrence(groups, tokens):
    """Against float64, the matrix form in float32 may be no worse than four times the loop in float32."""
    exact = scan_inputs(2, tokens, groups=groups)
    single = [t.float() for t in exact]
    exact = [t.double() for t in single]
    truth = results_and_gradients(scan_loop, exact)
    loop = results_and_gradients(scan_loop, single)
    found = results_and_gradients(chunked, single)
    for name, true, theirs, mine in zip(
        ("y", "state", *NAMES), truth[0] + truth[1], loop[0] + loop[1], found[0] + found[1], strict=True
    ):
        scale = true.abs().max()
        assert scale > 0, name
        allowed = 4 * (theirs - true).abs().max() + 8 * torch.finfo(torch.float32).eps * scale
        assert (mine - true).abs().max() <= allowed, name


def test_strong_decay_gives_no_nan():
    """Decays that underflow to zero inside one chunk: finite outputs and gradients, and still those of the loop."""
    inputs = scan_inputs(1, 2 * CHUNK + 1)
    inputs[2] = inputs[2] * 200
    expected, expected_gradients = results_and_gradients(scan_loop, inputs)
    found, gradients = results_and_gradients(chunked, inputs)
    torch.testing.assert_close(found, expected, rtol=RTOL_64, atol=RTOL_64)
    # Here the gradient of A is a small difference of terms of the size of the others', hence an absolute bound.
    torch.testing.assert_close(gradients, expected_gradients, rtol=RTOL_64, atol=RTOL_64)
    assert all(gradient.any() for gradient in gradients[:6])


@settings(max_examples=25, deadline=None)
@given(tokens=st.integers(2, 3 * CHUNK), data=st.data())
def test_split_changes_nothing(tokens, data):
    """Cut anywhere: outputs, final state and all gradients, also those that flow through the state at the cut."""
    cut = data.draw(st.integers(1, tokens - 1))
    inputs = scan_inputs(2, tokens, groups=2, seed=tokens)

    def split(x, dt, A, B, C, D, state):
        first, state = chunked(x[:, :cut], dt[:, :cut], A, B[:, :cut], C[:, :cut], D, state)
        second, state = chunked(x[:, cut:], dt[:, cut:], A, B[:, cut:], C[:, cut:], D, state)
        return torch.cat([first, second], dim=1), state

    expected, expected_gradients = results_and_gradients(chunked, inputs)
    found, gradients = results_and_gradients(split, inputs)
    torch.testing.assert_close(found, expected, rtol=RTOL_64, atol=RTOL_64)
    assert_gradients_match(gradients, expected_gradients, NAMES, rtol=RTOL_64)


def test_tokens_with_zero_dt_leave_the_state():
    inputs = scan_inputs(2, 11)
    inputs[1][:, 4:] = 0
    shorter = [t[:, :4] if i in (0, 1, 3, 4) else t for i, t in enumerate(inputs)]
    assert torch.equal(chunked(*shorter)[1], ssd_scan(*shorter, chunk_size=4)[1])
    torch.testing.assert_close(chunked(*inputs)[1], chunked(*shorter)[1], rtol=RTOL_64, atol=RTOL_64)


def test_no_tensor_has_a_square_of_tokens_and_a_state_axis():
    batch, tokens, heads, state, head_dim = 1, 256, 4, 64, 8
    inputs = leaves(*scan_inputs(batch, tokens, heads, head_dim, 1, state, dtype=torch.float32))
    with Largest() as largest:
        y, final = ssd_scan(*inputs, chunk_size=64)
        (y.sum() + final.sum()).backward()
    # the decays of all chunks, times the factor that autograd holds; with the state axis it would be 64 times that
    assert largest.numel <= tokens * 64 * heads, largest.shape


def conv_loop(x, weight, bias, conv_state):
    window = torch.cat([conv_state, x], dim=1)
    y = [(window[:, t : t + weight.shape[1]] * weight.T).sum(1) + bias for t in range(x.shape[1])]
    return torch.stack(y, dim=1), window[:, x.shape[1] :]


def conv_inputs(tokens, batch=2, channels=6, width=4):
    draw = torch.Generator().manual_seed(tokens)
    shapes = [(batch, tokens, channels), (channels, width), (channels,), (batch, width - 1, channels)]
    return [torch.randn(*shape, generator=draw, dtype=torch.float64) for shape in shapes]


@pytest.mark.parametrize("tokens", [1, 2, 3, 4, 13])
def test_conv_is_the_sum_over_its_window(tokens):
    expected, expected_gradients = results_and_gradients(conv_loop, conv_inputs(tokens))
    found, gradients = results_and_gradients(causal_conv1d, conv_inputs(tokens))
    torch.testing.assert_close(found, expected, rtol=RTOL_64, atol=RTOL_64)
    assert_gradients_match(gradients, expected_gradients, ("x", "weight", "bias", "conv_state"), rtol=RTOL_64)


@pytest.mark.parametrize("cut", range(1, 7))
def test_conv_split_changes_nothing(cut):
    def split(x, weight, bias, state):
        first, state = causal_conv1d(x[:, :cut], weight, bias, state)
        second, state = causal_conv1d(x[:, cut:], weight, bias, state)
        return torch.cat([first, second], dim=1), state

    expected, expected_gradients = results_and_gradients(causal_conv1d, conv_inputs(7))
    found, gradients = results_and_gradients(split, conv_inputs(7))
    torch.testing.assert_close(found, expected, rtol=RTOL_64, atol=RTOL_64)
    assert_gradients_match(gradients, expected_gradients, ("x", "weight", "bias", "conv_state"), rtol=RTOL_64)


@pytest.mark.parametrize("lengths", [(5, 5), (5, 2), (1, 4), (0, 3)])
def test_conv_state_ends_at_the_last_real_token(lengths):
    x, weight, bias, state = conv_inputs(5)
    mask = torch.arange(5) < torch.tensor(lengths)[:, None]
    y, found = causal_conv1d(x, weight, bias, state, mask)
    for row, length in enumerate(lengths):
        alone, expected = conv_loop(x[row : row + 1, :length], weight, bias, state[row : row + 1]) if length else (
            y[row : row + 1, :0], state[row : row + 1])  # fmt: skip
        torch.testing.assert_close(found[row], expected[0], rtol=0, atol=0)
        torch.testing.assert_close(y[row : row + 1, :length], alone, rtol=RTOL_64, atol=RTOL_64)
