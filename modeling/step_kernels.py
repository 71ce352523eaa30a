"""How far the scan goes at each token, and back: one Triton kernel each, beside those of mamba_ssm.

    step[t]      = clamp(softplus(dt[t] + dt_bias)), 0 where the token is padding
    log_decay[t] = A * (sum of step[u] for the tokens u <= t of the chunk), with A = -exp(A_log)

mamba_ssm's own pieces take three launches for this and ten for the way back. Nothing is summed by atomic additions, so
the same inputs give the same gradients.

Letters: b batch, t tokens, h heads, c chunks, q tokens of a chunk.
"""

import torch

try:
    import triton
    import triton.language as tl
except ImportError as error:  # reached on the way to the kernels alone
    raise ImportError("the package triton is not installed") from error

TILE = 4096  # numbers that a program holds of each tensor at a time


@triton.jit
def _step(dt, dt_bias, low, high, real):
    """The step, its value before the clamp, and what goes into the softplus."""
    x = dt.to(tl.float32) + dt_bias
    # log(1 + e) to the last bits also where e is far below 1
    e = tl.exp(-tl.abs(x))
    u = 1.0 + e
    log1p = tl.where(u == 1.0, e, tl.log(u) * e / tl.where(u == 1.0, 1.0, u - 1.0))
    wide = tl.maximum(x, 0.0) + log1p
    return tl.where(real, tl.minimum(tl.maximum(wide, low), high), 0.0), wide, x


@triton.jit
def _forward_kernel(
    dt_ptr, mask_ptr, A_log_ptr, dt_bias_ptr, log_decay_ptr, step_ptr,
    t, h, c, low, high, dt_batch, dt_token, mask_batch,
    HAS_MASK: tl.constexpr, Q: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    batch, chunk = tl.program_id(0), tl.program_id(1)
    head = tl.program_id(2) * BLOCK_H + tl.arange(0, BLOCK_H)[:, None]
    place = tl.arange(0, BLOCK_Q)[None, :]
    token = chunk * Q + place
    real = (head < h) & (place < Q) & (token < t)
    dt = tl.load(dt_ptr + batch * dt_batch + token * dt_token + head, mask=real, other=0.0)
    if HAS_MASK:
        real = real & tl.load(mask_ptr + batch * mask_batch + token, mask=real, other=0)
    dt_bias = tl.load(dt_bias_ptr + head, mask=head < h, other=0.0).to(tl.float32)
    A = -tl.exp(tl.load(A_log_ptr + head, mask=head < h, other=0.0).to(tl.float32))
    step, _, _ = _step(dt, dt_bias, low, high, real)
    here = ((batch * h + head) * c + chunk) * Q + place
    tl.store(step_ptr + here, step, mask=(head < h) & (place < Q))
    tl.store(log_decay_ptr + here, tl.cumsum(step * A, axis=1), mask=(head < h) & (place < Q))


@triton.jit
def _backward_kernel(
    since_start_ptr, of_chunk_ptr, inside_ptr, to_end_ptr, grad_step_ptr,
    dt_ptr, mask_ptr, A_log_ptr, dt_bias_ptr, grad_dt_ptr, grad_A_log_ptr, grad_dt_bias_ptr,
    b, t, h, c, low, high, dt_batch, dt_token, grad_batch, grad_token, mask_batch,
    HAS_MASK: tl.constexpr, Q: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(0)
    place = tl.arange(0, BLOCK_Q)[None, :]
    dt_bias = tl.load(dt_bias_ptr + head).to(tl.float32)
    A = -tl.exp(tl.load(A_log_ptr + head).to(tl.float32))
    of_A = tl.zeros((BLOCK_C,), dtype=tl.float32)
    of_bias = tl.zeros((BLOCK_C,), dtype=tl.float32)
    for start in range(0, b * c, BLOCK_C):  # chunks of all sequences, one after another
        row = start + tl.arange(0, BLOCK_C)[:, None]
        batch, chunk = row // c, row % c
        token = chunk * Q + place
        real = (row < b * c) & (place < Q) & (token < t)
        row = (batch * h + head) * c + chunk
        here = row * Q + place
        # of a chunk's log decay since its start, which every step up to there is part of
        since_start = tl.load(since_start_ptr + here, mask=real, other=0.0)
        of_chunk = tl.load(of_chunk_ptr + row, mask=batch < b, other=0.0)
        grad = tl.cumsum(since_start, axis=1, reverse=True) + of_chunk
        grad += tl.load(inside_ptr + here, mask=real, other=0.0)
        grad += tl.load(to_end_ptr + here, mask=real, other=0.0)
        dt = tl.load(dt_ptr + batch * dt_batch + token * dt_token + head, mask=real, other=0.0)
        there = grad_dt_ptr + batch * grad_batch + token * grad_token + head
        exists = real
        if HAS_MASK:
            real = real & tl.load(mask_ptr + batch * mask_batch + token, mask=real, other=0)
        step, wide, x = _step(dt, dt_bias, low, high, real)
        grad_dt = grad * A + tl.load(grad_step_ptr + here, mask=real, other=0.0)
        grad_dt = tl.where(real & (wide >= low) & (wide <= high), grad_dt * tl.sigmoid(x), 0.0)
        tl.store(there, grad_dt, mask=exists)
        of_A += tl.sum(grad * step, axis=1)
        of_bias += tl.sum(grad_dt, axis=1)
    tl.store(grad_A_log_ptr + head, tl.sum(of_A, axis=0) * A)
    tl.store(grad_dt_bias_ptr + head, tl.sum(of_bias, axis=0))


def steps(dt, mask, A_log, dt_bias, shape):
    """Two float32 tensors (b, h, c, q), log_decay and step; beyond the last token the step is 0.

    Args:
        dt: (b, t, h), before the bias. mask: (b, t) bool, True for real tokens, or None. A_log, dt_bias: (h,).
        shape: `CoreShape`.
    """
    (b, t, h), q = dt.shape, shape.chunk_size
    c, block_q = triton.cdiv(t, q), triton.next_power_of_2(q)
    log_decay, step = (torch.empty(b, h, c, q, dtype=torch.float32, device=dt.device) for _ in range(2))
    block_h = max(1, min(16, TILE // block_q))
    with torch.cuda.device(dt.device.index):
        _forward_kernel[b, c, triton.cdiv(h, block_h)](
            dt, mask, A_log, dt_bias, log_decay, step,
            t, h, c, *shape.time_step_limit, *dt.stride()[:2], 0 if mask is None else mask.stride(0),
            HAS_MASK=mask is not None, Q=q, BLOCK_Q=block_q, BLOCK_H=block_h, num_warps=8,
        )  # fmt: skip
    return log_decay, step


def steps_backward(grads, dt, mask, A_log, dt_bias, shape, grad_dt):
    """Gradients of A_log and dt_bias, float32; writes that of dt into `grad_dt`, strided as it likes.

    Args:
        grads: contiguous float32 tensors (b, h, c, q): of log_decay where the state at a chunk's start is read, at its
            end (b, h, c), of the sums of step * A between two tokens of a chunk, of those up to its end; and of step.
        dt to shape: as of `steps`.
    """
    (b, t, h), q = dt.shape, shape.chunk_size
    block_q = triton.next_power_of_2(q)
    grad_A_log, grad_dt_bias = torch.empty(2, h, dtype=torch.float32, device=dt.device)
    with torch.cuda.device(dt.device.index):
        _backward_kernel[h,](
            *grads, dt, mask, A_log, dt_bias, grad_dt, grad_A_log, grad_dt_bias,
            b, t, h, triton.cdiv(t, q), *shape.time_step_limit, *dt.stride()[:2], *grad_dt.stride()[:2],
            0 if mask is None else mask.stride(0),
            HAS_MASK=mask is not None, Q=q, BLOCK_Q=block_q, BLOCK_C=max(1, TILE // block_q), num_warps=8,
        )  # fmt: skip
    return grad_A_log, grad_dt_bias
