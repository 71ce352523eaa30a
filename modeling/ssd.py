"""The two recurrences of a Mamba-2 layer in plain torch: the causal convolution and the state-space (SSD) scan.

Both take the state left by the tokens before and hand on the state left by their own: a sequence may be cut anywhere.

Letters in shapes: b batch, t tokens, c chunks, q tokens of a chunk, h heads, g groups, r heads of a group (h = g * r),
p head dimension, n state size, d channels of the convolution, w its width.

The scan computes, for every head, with a_i = exp(dt_i * A):

    state_i = a_i * state_{i-1} + dt_i * x_i B_i^T          # (p, n)
    y_i     = state_i C_i + D * x_i                         # (p,)

Source: Dao and Gu, "Transformers are SSMs" (arXiv 2405.21060), section 6. No tensor with both a chunk x chunk and a
state axis is ever made.
"""

import torch
from torch.nn import functional as F

from .segment_sizes import SCAN_CHUNK

SMALL_STATE = 2**15  # numbers of a row and group


def causal_conv1d(x, weight, bias, conv_state, mask=None):
    """Depthwise causal convolution that continues from `conv_state`.

    Args:
        x: (batch, tokens, channels), any floating dtype.
        weight: (channels, width). bias: (channels,) or None.
        conv_state: (batch, width - 1, channels), the inputs before `x`, oldest first; zeros at the start of a sequence.
        mask: (batch, tokens) bool, True for real tokens, which come first in each row; None if all are real.

    Returns:
        (batch, tokens, channels) in the dtype of `x`, and the new conv state: a copy, not a view that keeps `x` alive.
    """
    return convolve(x, weight, bias, conv_state), last_inputs(x, conv_state, mask)


def convolve(x, weight, bias, conv_state):
    """The first of `causal_conv1d`."""
    window = torch.cat([conv_state.to(x.dtype), x], dim=1)
    y = F.conv1d(
        window.transpose(1, 2),
        weight.to(x.dtype)[:, None],
        None if bias is None else bias.to(x.dtype),
        groups=x.shape[2],
    )
    return y.transpose(1, 2)


def last_inputs(x, conv_state, mask=None):
    """The conv state after `x`: its last real inputs, (batch, width - 1, channels); arguments as `causal_conv1d`."""
    num_kept, num_tokens = conv_state.shape[1], x.shape[1]
    if mask is not None:
        window = torch.cat([conv_state.to(x.dtype), x], dim=1)
        return window.gather(1, _places(mask, window, num_kept)).to(conv_state.dtype)
    if num_tokens >= num_kept:
        return x[:, num_tokens - num_kept :].to(conv_state.dtype, copy=True)
    return torch.cat([conv_state[:, num_tokens:], x.to(conv_state.dtype)], dim=1)


def last_inputs_backward(grad, grad_x, grad_conv_state, mask=None):
    """Back through `last_inputs`: adds to `grad_x`, and returns `grad_conv_state` with its part.

    Args:
        grad: (batch, width - 1, channels), of what it gave. grad_x, grad_conv_state: what x and the conv state got
            elsewhere.
    """
    num_kept, num_tokens = grad.shape[1], grad_x.shape[1]
    grad_conv_state = grad_conv_state.to(grad.dtype)
    if mask is not None:
        window = torch.cat([grad_conv_state, torch.zeros_like(grad_x, dtype=grad.dtype)], dim=1)
        window.scatter_add_(1, _places(mask, window, num_kept), grad)
        grad_x += window[:, num_kept:]
        return window[:, :num_kept]
    if num_tokens >= num_kept:
        grad_x[:, num_tokens - num_kept :].add_(grad)
        return grad_conv_state
    grad_x += grad[:, num_kept - num_tokens :]
    return torch.cat(
        [grad_conv_state[:, :num_tokens], grad_conv_state[:, num_tokens:] + grad[:, : num_kept - num_tokens]], 1
    )


def _places(mask, window, num_kept):
    """Where in the conv state followed by the tokens the last real inputs of each row stand."""
    last = mask.sum(dim=1, keepdim=True) + torch.arange(num_kept, device=window.device)  # (b, w - 1)
    return last[..., None].expand(-1, -1, window.shape[2])


def ssd_scan(x, dt, A, B, C, D, ssm_state, chunk_size=SCAN_CHUNK):
    """The scan in blocks of matrix products; differentiable in every argument but `chunk_size`.

    Args:
        x: (batch, tokens, heads, head_dim). dt: (batch, tokens, heads), after softplus and limits; zero where a token
            is padding, which then leaves the state as it was.
        A: (heads,), negative. B, C: (batch, tokens, groups, state). D: (heads,).
        ssm_state: (batch, heads, head_dim, state).

    All of it in one dtype, float32 or float64.

    Returns:
        y (batch, tokens, heads, head_dim) and the new SSM state, shaped as the one given.
    """
    b, t, h, p = x.shape
    g, n = B.shape[2:]
    r = h // g
    q = min(chunk_size, t)
    if pad := -t % q:
        x, B, C = (F.pad(value, (0, 0, 0, 0, 0, pad)) for value in (x, B, C))
        dt = F.pad(dt, (0, 0, 0, pad))
    c = (t + pad) // q
    skip = (x * D[:, None]).view(b, c, q, g, r, p)
    x_dt = (x * dt[..., None]).view(b, c, q, g, r, p)
    B = B.view(b, c, q, g, n).transpose(2, 3)  # (b, c, g, q, n)
    C = C.view(b, c, q, g, n).transpose(2, 3)
    log_decay = (dt * A).view(b, c, q, g, r).cumsum(2)  # since the chunk began

    # 1. Inside each chunk: attention-like, with the decay from token j to token i as the causal mask.
    scores = (C @ B.transpose(-1, -2))[:, :, :, None] * _decay_between(log_decay.permute(0, 1, 3, 4, 2))
    y = scores @ x_dt.permute(0, 1, 3, 4, 2, 5)  # (b, c, g, r, q, p)

    # 2. What each chunk adds to the state by its end. One product serves all heads that share B.
    decay_to_end = (log_decay[:, :, -1:] - log_decay).exp()
    inputs = (x_dt * decay_to_end[..., None]).reshape(b, c, q, g, r * p).permute(0, 1, 3, 4, 2)
    added = (inputs @ B).view(b, c, h, p, n)

    # 3. From chunk to chunk: the state at the start of each, and after the last.
    chunk_decay = log_decay[:, :, -1].exp().reshape(b, c, h, 1, 1)
    at_start = []
    for own, decay in zip(added.unbind(1), chunk_decay.unbind(1), strict=True):
        at_start.append(ssm_state)
        ssm_state = torch.addcmul(own, decay, ssm_state)
    starts = at_start[0] if c == 1 else torch.stack(at_start, dim=1)

    # 4. What the state at the start of a chunk says at each of its tokens.
    from_state = (C @ starts.reshape(b, c, g, r * p, n).transpose(-1, -2)).view(b, c, g, q, r, p).transpose(2, 3)
    y = torch.addcmul(skip, from_state, log_decay.exp()[..., None]) + y.permute(0, 1, 4, 2, 3, 5)
    return y.reshape(b, c * q, h, p)[:, :t], ssm_state


def ssd_step(x, dt, A, B, C, D, ssm_state):
    """The scan of a single token, straight from the recurrence; arguments and results as `ssd_scan` with tokens = 1."""
    r = x.shape[2] // B.shape[2]
    x_t, dt_t = x[:, 0], dt[:, 0]  # (b, h, p), (b, h)
    B_t, C_t = (value[:, 0].repeat_interleave(r, dim=1) for value in (B, C))  # (b, h, n)
    decay = (dt_t * A).exp()[..., None, None]
    ssm_state = ssm_state * decay + (x_t * dt_t[..., None])[..., None] * B_t[:, :, None]
    y = (ssm_state @ C_t[..., None])[..., 0] + x_t * D[:, None]
    return y[:, None], ssm_state


def ssd_step_(x, dt, A, B, C, D, ssm_state):
    """As `ssd_step`, without gradient: writes `ssm_state` in place and returns y alone."""
    b, _, h, p = x.shape
    g, n = B.shape[2:]
    ssm_state.mul_((dt * A).exp_().view(b, h, 1, 1))
    by_group = ssm_state.view(b * g, -1, n)
    by_group.addcmul_((x * dt[..., None]).view(b * g, -1, 1), B.reshape(b * g, 1, n))
    # one row alone, as here the rows of a projection are read: the step of a 2.7B model takes 4 % less. Several: C as a
    # row, from small states; from large ones that took three times as long on one machine, and half as long on another
    C = C.reshape(b * g, 1, n)
    if b * g == 1:
        y = F.linear(C[0], by_group[0])
    else:
        y = torch.bmm(C, by_group.mT) if by_group[0].numel() <= SMALL_STATE else torch.bmm(by_group, C.mT)
    return y.view(b, 1, h, p).addcmul_(x, D[:, None])


def _decay_between(log_decay):
    """exp(log_decay[i] - log_decay[j]) for i >= j, zero above the diagonal. (..., q) -> (..., q, q)."""
    q = log_decay.shape[-1]
    difference = log_decay[..., :, None] - log_decay[..., None, :]
    above = torch.ones(q, q, dtype=torch.bool, device=log_decay.device).triu(1)
    # masked before exp: above the diagonal the difference is positive and could overflow to inf, whose gradient is nan
    return difference.masked_fill(above, -torch.inf).exp()
