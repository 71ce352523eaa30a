"""The compiled part of causal_conv1d 1.7 in torch: what its binding asks of tensors, and what its kernels compute."""

import torch
from torch.nn import functional as F


def causal_conv1d_fwd(x, weight, bias, seq_idx, initial_states, out, final_states_out, silu_activation):
    check(x, initial_states, out)
    assert seq_idx is None
    assert final_states_out is None
    assert silu_activation
    out.copy_(F.silu(run(x, weight, bias, initial_states)[1]))


def causal_conv1d_bwd(
    x, weight, bias, dout, seq_idx, initial_states, dfinal_states, dx, dweight, dbias, dinitial_states, silu_activation
):
    check(x, initial_states, dout, dx, dinitial_states)
    assert seq_idx is None
    assert dfinal_states is None
    assert silu_activation
    assert dweight.shape == weight.shape
    assert dweight.dtype == torch.float32
    assert (bias is None) == (dbias is None)
    window, y = run(x, weight, bias, initial_states)
    gate = torch.sigmoid(y)
    grad = dout * gate * (1 + y * (1 - gate))
    grad_window = F.conv_transpose1d(grad, weight[:, None], groups=x.shape[1])
    before = weight.shape[1] - 1
    if dinitial_states is not None:
        dinitial_states.copy_(grad_window[:, :, :before])
    dx.copy_(grad_window[:, :, before:])
    for place in range(weight.shape[1]):
        dweight[:, place] += (grad * window[:, :, place : place + x.shape[2]]).sum((0, 2))
    if bias is not None:
        dbias += grad.sum((0, 2))


def run(x, weight, bias, initial_states):
    """The inputs with those before, and the outputs before the activation.

    x: (batch, channels, tokens). weight: (channels, width). initial_states: (batch, channels, width - 1); None: zeros.
    """
    if initial_states is None:
        initial_states = x.new_zeros(*x.shape[:2], weight.shape[1] - 1)
    window = torch.cat([initial_states, x], dim=2)
    return window, F.conv1d(window, weight[:, None], bias, groups=x.shape[1])


def check(x, initial_states, *like_either):
    assert x.stride(2) > 1, "initial states need channels side by side"
    for tensor in filter(lambda tensor: tensor is not None, (x, initial_states, *like_either)):
        assert tensor.dtype == x.dtype
        assert tensor.stride(1) == 1
        assert tensor.shape == x.shape or tensor.shape == initial_states.shape
    assert x.shape[1] % 8 == 0
    assert x.stride(0) % 8 == 0
    assert x.stride(2) % 8 == 0
