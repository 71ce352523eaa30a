"""The core of a mixer on the Triton kernels of mamba_ssm and, where it is there, the convolution of causal_conv1d.

It does what `Mamba2Mixer._core` does in plain torch, and as there the backward pass starts from in_proj's output and
the incoming states; kept besides is the scan's output, so that the scan is not run again. It is put together from the
forward and backward pieces that mamba_ssm 2.3 releases: the released fused function has no convolution state, and the
released scan rounds the gradient of its states to the dtype of x. Here both states go in and out, with gradients in
float32.

The kernels address with 32 bits: past about 200,000 tokens of the 2.7B model in one call they would silently read and
write the wrong place (state-spaces/mamba#1015). No call here is longer than `tokens_per_call`; the states carry over.
"""

import importlib
import importlib.util
import sys
import types
from functools import lru_cache
from typing import Any, NamedTuple

import torch

from .segment_sizes import KERNEL_SEGMENT
from .ssd import convolve, last_inputs, last_inputs_backward

MAX_OFFSET = 2**31 - 1  # elements from the start of an operand


class CoreShape(NamedTuple):
    """The numbers that a mixer's core needs, besides its weights."""

    num_heads: int
    head_dim: int
    n_groups: int
    state_size: int
    chunk_size: int
    time_step_limit: tuple[float, float]
    epsilon: float

    @property
    def inner(self):
        return self.num_heads * self.head_dim

    @property
    def conv_dim(self):
        return self.inner + 2 * self.n_groups * self.state_size

    @property
    def projection(self):
        return self.inner + self.conv_dim + self.num_heads


@lru_cache
def scan_kernels():
    """The modules of mamba_ssm that are used here, imported past the package's own `__init__`, and `step_kernels`.

    That one needs `selective_scan_cuda`, a compiled part of Mamba-1, which is missing or broken on many machines. The
    package is taken out of `sys.modules` again: transformers would take it for its own Mamba-2, on any device.

    Raises:
        ImportError: mamba_ssm, triton or einops is missing.
    """
    package = sys.modules.get("mamba_ssm")
    if package is None:
        spec = importlib.util.find_spec("mamba_ssm")
        if spec is None:
            raise ImportError("the package mamba-ssm is not installed")
        stand_in = types.ModuleType("mamba_ssm")
        stand_in.__path__ = list(spec.submodule_search_locations or ())
        sys.modules["mamba_ssm"] = stand_in
    try:
        names = ("ssd_combined", "selective_state_update", "layernorm_gated")
        modules = [importlib.import_module(f"mamba_ssm.ops.triton.{name}") for name in names]
    finally:
        if package is None:
            del sys.modules["mamba_ssm"]
    from . import step_kernels

    scan, update, norm = modules
    return types.SimpleNamespace(scan=scan, update=update, norm=norm, steps=step_kernels)


@lru_cache
def conv_kernel():
    """The package causal_conv1d, 1.5 or later. Raises ImportError where it or its compiled part is missing."""
    importlib.import_module("causal_conv1d.cpp_functions")
    return importlib.import_module("causal_conv1d")


def elements_per_token(shape):
    """For every operand of the kernels, how many of its elements one token of one sequence takes, at most."""
    heads, chunk = shape.num_heads, shape.chunk_size
    return {
        "projected": shape.projection,  # the rows of what in_proj gave, of which gate, x, B, C, dt are slices
        "convolved": shape.conv_dim,
        "y": shape.inner,
        "states": -(-shape.inner * shape.state_size // chunk),  # at the start of each chunk
        "C B^T": shape.n_groups * chunk,
        "its gradient": heads * chunk,  # in up to one part per head
        "gradients of B and C": heads * shape.state_size,  # likewise
    }


def tokens_per_call(batch_size, shape):
    """Tokens of one call of the kernels, in whole chunks: no element of any operand lies beyond `MAX_OFFSET`.

    Raises:
        ValueError: the batch is so large that not even one chunk of it fits.
    """
    most = MAX_OFFSET // (batch_size * max(elements_per_token(shape).values()))
    tokens = min(KERNEL_SEGMENT, most) // shape.chunk_size * shape.chunk_size
    if tokens == 0:
        raise ValueError(f"{batch_size} sequences are too many for one call of the scan's kernels: use a smaller batch")
    return tokens


def kernel_core(shape, conv, projected, mask, states, params):
    """Convolution, scan and gated norm.

    Args:
        shape: `CoreShape`.
        conv: the package causal_conv1d, or None for the convolution in plain torch.
        projected: (batch, tokens, projection), what in_proj gave: float32, bfloat16 or float16.
        mask: (batch, tokens) bool, real tokens first in each row, or None.
        states: conv_state and ssm_state, float32.
        params: weight (conv_dim, 1, width) and bias of the convolution, dt_bias, A_log, D, weight of the gated norm.

    Returns:
        (batch, tokens, inner), the new states, and a function that computes the first again, as `recompute_segments`.
    """
    kept: list[torch.Tensor] = []

    def again():
        return _gated_norm(shape, kept[0], projected, params[-1])[0]

    y, *states = _KernelCore.apply(shape, conv, kept, projected, mask, *states, *params)
    return y, tuple(states), again


class _KernelCore(torch.autograd.Function):
    @staticmethod
    def forward(ctx, shape, conv, kept, projected, mask, conv_state, ssm_state, *params):
        conv_weight, conv_bias, dt_bias, A_log, D, norm_weight = params
        k = scan_kernels()
        scanned, borders = None, []
        for span in _spans(projected, shape):
            _, x_B_C, dt = _parts(_call(projected, span), shape)
            where, before = _cut(mask, span), conv_state.to(projected.dtype)
            borders += [before, ssm_state]
            x, B, C = _scanned(_convolve(conv, x_B_C, conv_weight[:, 0], conv_bias, before), shape)
            conv_state = last_inputs(x_B_C, conv_state, where)
            log_decay, step = k.steps.steps(dt, where, A_log, dt_bias, shape)
            states, ssm_state = _states(x, B, log_decay, step, ssm_state, C.dtype)
            scores = k.scan._bmm_chunk_fwd(C, B, shape.chunk_size, output_dtype=torch.float32)  # C B^T of each chunk
            out, _ = k.scan._chunk_scan_fwd(scores, x, step, log_decay, C, states, D=D.float())
            scanned = _put(scanned, out.flatten(2), span, projected)
        y, rstd = _gated_norm(shape, scanned, projected, norm_weight)
        ctx.shape, ctx.conv = shape, conv
        ctx.save_for_backward(projected, mask, scanned, rstd, *params, *borders)
        kept.append(scanned)
        return y, conv_state, ssm_state

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_y, grad_conv_state, grad_ssm_state):
        shape = ctx.shape
        projected, mask, scanned, rstd, *params = ctx.saved_tensors
        params, borders = params[:6], params[6:]
        conv_weight, conv_bias, dt_bias, A_log, D, norm_weight = params
        grad_projected = torch.empty_like(projected)
        sums: list = [None] * len(params)

        def add(index, grad):
            sums[index] = grad if sums[index] is None else sums[index].float() + grad

        # of the convolution: its kernel adds to what is there, so one tensor is filled and cast for both
        of_conv = [t for t in (conv_weight[:, 0], conv_bias) if t is not None]
        total = torch.zeros(sum(t.numel() for t in of_conv), dtype=torch.float32, device=projected.device)

        def parts(total):
            pieces = total.split([t.numel() for t in of_conv])
            return [piece.view(t.shape) for piece, t in zip(pieces, of_conv, strict=True)]

        for span in reversed(_spans(projected, shape)):
            ssm_state, conv_state = borders.pop(), borders.pop()
            piece, grad_piece = _call(projected, span), _call(grad_projected, span)
            gate, x_B_C, dt = _parts(piece, shape)
            grad_gate, grad_x_B_C, grad_dt = _parts(grad_piece, shape)
            where = _cut(mask, span)

            grad_scanned, grad_weight = _gated_norm_backward(
                shape, grad_y[:, span], scanned[:, span], gate, norm_weight, rstd[:, _rows(projected, span)], grad_gate
            )
            add(5, grad_weight)

            inputs = [x_B_C, conv_weight[:, 0], conv_bias, conv_state]
            inputs = [None if t is None else t.detach().requires_grad_(ctx.conv is None) for t in inputs]
            with torch.set_grad_enabled(ctx.conv is None):
                convolved = _convolve(ctx.conv, *inputs)
            grad_convolved = torch.empty(convolved.shape, dtype=convolved.dtype, device=convolved.device)
            of_steps = dt, where, A_log, dt_bias, shape
            grad_A_log, grad_D, grad_dt_bias, grad_ssm_state = _scan_backward(
                grad_scanned, _scanned(convolved.detach(), shape), of_steps, D.float(), ssm_state, grad_ssm_state,
                _split_scanned(grad_convolved, shape), grad_dt,
            )  # fmt: skip
            add(2, grad_dt_bias)
            add(3, grad_A_log)
            add(4, grad_D)
            grad_before = _convolve_backward(ctx.conv, convolved, inputs, grad_convolved, grad_x_B_C, parts(total))
            grad_conv_state = last_inputs_backward(grad_conv_state, grad_x_B_C, grad_before, where)
            if grad_piece.data_ptr() != grad_projected[:, span].data_ptr():
                grad_projected[:, span] = grad_piece
        sums[: len(of_conv)] = parts(total.to(conv_weight.dtype))
        sums[0] = sums[0][:, None]
        sums = [None if p is None else s.to(p.dtype) for p, s in zip(params, sums, strict=True)]
        return None, None, None, grad_projected, None, grad_conv_state, grad_ssm_state, *sums


def _states(x, B, log_decay, step, ssm_state, dtype):
    """The states at the start of each chunk, (b, c, h, p, n) in `dtype`, and the last of all in float32."""
    k = scan_kernels().scan
    added = k._chunk_state_fwd(B, x, step, log_decay, states_in_fp32=True)
    states, last = k._state_passing_fwd(
        added.flatten(-2), log_decay[..., -1], initial_states=ssm_state.flatten(-2), out_dtype=dtype
    )
    return states.unflatten(-1, ssm_state.shape[-2:]), last.view(ssm_state.shape)


def _scan_backward(grad_y, operands, of_steps, D, ssm_state, grad_final, grads, grad_dt):
    """The backward pass of the scan, piece by piece as mamba_ssm does it, with states and their gradients in float32.

    `of_steps`: the arguments of `step_kernels.steps`. Writes into `grads`, those of x, B and C, and into `grad_dt`.
    Returns the gradients of A_log, D, dt_bias, ssm_state.
    """
    k, shape = scan_kernels().scan, of_steps[-1]
    x, B, C = operands
    grad_x, grad_B, grad_C = grads
    grad_y = grad_y.view(x.shape)
    log_decay, step = scan_kernels().steps.steps(*of_steps)  # (b, h, c, q) each
    states, _ = _states(x, B, log_decay, step, ssm_state, torch.float32)
    grad_states = k._chunk_scan_bwd_dstates(C, log_decay, grad_y, dtype=torch.float32)
    grad_states, grad_of_chunk, grad_initial = k._state_passing_bwd(
        states.flatten(-2), log_decay[..., -1], grad_states.flatten(-2), dfinal_states=grad_final.flatten(-2),
        has_initial_states=True,
    )  # fmt: skip
    # the kernels that take these in matrix products turn them into the dtype of x as they read them
    grad_states = grad_states.view(states.shape)
    scores = k._bmm_chunk_fwd(C, B, shape.chunk_size, output_dtype=torch.float32)
    _, grad_step, grad_D = k._chunk_scan_chunk_state_bwd_dx(
        x, step, log_decay, B, scores, grad_y, grad_states, D=D, dx=grad_x
    )
    part_B, to_end = k._chunk_state_bwd_db(x, step, log_decay, grad_states, B=B, ngroups=shape.n_groups)
    part_C, since_start = k._chunk_scan_bwd_dC(states, log_decay, grad_y, C=C, ngroups=shape.n_groups)
    grad_scores = k._chunk_scan_bwd_dcb(x, step, log_decay, grad_y, ngroups=shape.n_groups).to(scores.dtype)
    k._bmm_chunk_bwd(C, grad_scores, residual=part_B, out=grad_B)
    k._bmm_chunk_bwd(B, grad_scores.transpose(-1, -2), residual=part_C, out=grad_C)
    inside = k._chunk_scan_bwd_ddAcs_stable(x, step, log_decay, grad_y, scores)
    grad_A_log, grad_dt_bias = scan_kernels().steps.steps_backward(
        (since_start, grad_of_chunk, inside, to_end, grad_step), *of_steps, grad_dt
    )
    return grad_A_log, grad_D, grad_dt_bias, grad_initial.view(ssm_state.shape)


def _convolve_backward(conv, convolved, inputs, grad, grad_x, totals):
    """Back through `_convolve`: writes `grad_x`, adds to `totals`, and returns the gradient of the conv state.

    Args:
        convolved: what it gave, in plain torch with the graph of `inputs`: x, weight, bias, conv_state.
        totals: float32, of weight and bias, or of the weight alone.
    """
    if conv is None:
        found = torch.autograd.grad(convolved, [t for t in inputs if t is not None], grad)
        grad_x.copy_(found[0])
        for total, one in zip(totals, found[1:], strict=False):
            total += one
        return found[-1]
    cast: Any = [None if t is None else t.to(grad.dtype) for t in inputs]
    x, weight, bias, conv_state = cast
    grad_state = torch.empty_like(conv_state)
    conv.cpp_functions._causal_conv1d_bwd_cpp(
        x=x.transpose(1, 2), weight=weight, bias=bias, dout=grad.transpose(1, 2), seq_idx=None,
        initial_states=conv_state.transpose(1, 2), dfinal_states=None, dx=grad_x.transpose(1, 2), dweight=totals[0],
        dbias=None if bias is None else totals[1], dinitial_states=grad_state.transpose(1, 2), silu_activation=True,
    )  # fmt: skip
    return grad_state


def kernel_step(shape, conv, projected, states, params):
    """The core on one token, without gradient; arguments and the first result as of `kernel_core`.

    Both states are written in place, so each is read and written once.
    """
    conv_weight, conv_bias, dt_bias, A_log, D, norm_weight = params
    conv_state, ssm_state = states
    gate, x_B_C, dt = _parts(projected[:, 0], shape)
    if conv is None:
        convolved = _convolve(conv, x_B_C[:, None], conv_weight[:, 0], conv_bias, conv_state)[:, 0]
        conv_state.copy_(last_inputs(x_B_C[:, None], conv_state))
    else:
        convolved = conv.causal_conv1d_update(
            x_B_C.to(conv_state.dtype), conv_state.transpose(1, 2), conv_weight[:, 0], conv_bias, "silu"
        )
    x, B, C = _split_scanned(convolved, shape)

    def of_heads(value, *tail):  # the kernel knows by the strides of 0 that a head shares one number
        return value.view(*value.shape, *(1,) * len(tail)).expand(*value.shape, *tail)

    scanned = scan_kernels().update.selective_state_update(
        ssm_state, x, of_heads(dt, shape.head_dim), of_heads(-A_log.exp(), shape.head_dim, shape.state_size), B, C,
        of_heads(D, shape.head_dim), dt_bias=of_heads(dt_bias, shape.head_dim), dt_softplus=True,
    )  # fmt: skip
    y = projected.new_empty(len(projected), shape.inner)
    scan_kernels().norm._layer_norm_fwd(
        scanned.flatten(1), norm_weight, None, shape.epsilon, z=gate, out=y,
        group_size=shape.inner // shape.n_groups, norm_before_gate=False, is_rms_norm=True,
    )  # fmt: skip
    return y[:, None]


def kernel_rms_norm(hidden_states, weight, epsilon):
    """Root-mean-square norm in float32: (..., hidden) of any dtype -> (..., hidden) in the dtype of the weight."""
    return _KernelRMSNorm.apply(hidden_states, weight, epsilon)


class _KernelRMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden_states, weight, epsilon):
        rows = hidden_states.reshape(-1, hidden_states.shape[-1])
        y = torch.empty(rows.shape, dtype=weight.dtype, device=rows.device)
        _, _, rstd = scan_kernels().norm._layer_norm_fwd(rows, weight, None, epsilon, out=y, is_rms_norm=True)
        ctx.save_for_backward(hidden_states, weight, rstd)
        ctx.epsilon = epsilon
        return y.view(hidden_states.shape)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        hidden_states, weight, rstd = ctx.saved_tensors
        width = hidden_states.shape[-1]
        grad_rows, grad_weight, *_ = scan_kernels().norm._layer_norm_bwd(
            grad.reshape(-1, width), hidden_states.reshape(-1, width), weight, None, ctx.epsilon, None, rstd,
            is_rms_norm=True,
        )  # fmt: skip
        return grad_rows.view(hidden_states.shape), grad_weight, None


def _gated_norm(shape, scanned, projected, weight):
    """RMS norm of `scanned` times silu(gate) over each group: (batch, tokens, inner), and 1 / root-mean-square."""
    y, rstd = None, []
    for span in _spans(projected, shape):
        gate = _call(projected, span)[..., : shape.inner]
        out, _, one = scan_kernels().norm._layer_norm_fwd(
            scanned[:, span].reshape(-1, shape.inner), weight, None, shape.epsilon, z=gate.reshape(-1, shape.inner),
            group_size=shape.inner // shape.n_groups, norm_before_gate=False, is_rms_norm=True,
        )  # fmt: skip
        y = _put(y, out.view(gate.shape), span, projected)
        rstd.append(one.view(shape.n_groups, -1))
    return y, rstd[0] if len(rstd) == 1 else torch.cat(rstd, dim=1)


def _gated_norm_backward(shape, grad_y, scanned, gate, weight, rstd, grad_gate):
    """Gradients of `scanned` (batch, tokens, inner), and of the weight; that of the gate goes to `grad_gate`."""
    rows = [t.reshape(-1, shape.inner) for t in (grad_y, scanned, gate)]
    grad_rows = grad_gate.reshape(-1, shape.inner)
    grad_scanned, grad_weight = scan_kernels().norm._layer_norm_bwd(
        rows[0], rows[1], weight, None, shape.epsilon, None, rstd.flatten().contiguous(), z=rows[2], dz=grad_rows,
        group_size=shape.inner // shape.n_groups, norm_before_gate=False, is_rms_norm=True,
    )[:2]  # fmt: skip
    if grad_rows.data_ptr() != grad_gate.data_ptr():
        grad_gate.copy_(grad_rows.view(grad_gate.shape))
    return grad_scanned.view(scanned.shape), grad_weight


def _convolve(conv, x, weight, bias, conv_state):
    """Convolution and silu: (batch, tokens, conv_dim). weight: (conv_dim, width)."""
    if conv is None:
        return torch.nn.functional.silu(convolve(x, weight, bias, conv_state))
    y = conv.causal_conv1d_fn(
        x.transpose(1, 2), weight.to(x.dtype), None if bias is None else bias.to(x.dtype),
        initial_states=conv_state.to(x.dtype).transpose(1, 2), activation="silu",
    )  # fmt: skip
    return y.transpose(1, 2)


def _put(whole, piece, span, like):
    """`piece` in its place of `whole`, None at first; where it is all tokens of `like` it is the whole."""
    if piece.shape[1] == like.shape[1]:
        return piece
    if whole is None:
        whole = piece.new_empty(piece.shape[0], like.shape[1], piece.shape[2])
    whole[:, span] = piece
    return whole


def _spans(projected, shape):
    """The slices of tokens that the kernels get one after another."""
    step = tokens_per_call(projected.shape[0], shape)
    return [slice(start, start + step) for start in range(0, projected.shape[1], step)]


def _call(tensor, span):
    """A slice of tokens, copied where its rows lie further apart than the kernels can address."""
    piece = tensor[:, span]
    return piece if piece.shape[0] == 1 or tensor.numel() <= MAX_OFFSET else piece.contiguous()


def _rows(projected, span):
    """Where the statistics of a slice of tokens stand: slice by slice, in each sequence by sequence."""
    b = projected.shape[0]
    return slice(b * span.start, b * min(span.stop, projected.shape[1]))


def _cut(mask, span):
    return None if mask is None else mask[:, span]


def _parts(projected, shape):
    """gate, (x, B, C) and dt."""
    return projected.split([shape.inner, shape.conv_dim, shape.num_heads], dim=-1)


def _split_scanned(convolved, shape):
    """Views x (batch, ..., heads, head_dim), B and C (batch, ..., groups, state)."""
    x, B, C = convolved.split([shape.inner] + [shape.n_groups * shape.state_size] * 2, dim=-1)
    B, C = (t.unflatten(-1, (shape.n_groups, shape.state_size)) for t in (B, C))
    return x.unflatten(-1, (shape.num_heads, shape.head_dim)), B, C


def _scanned(convolved, shape):
    """The operands x, B, C of the scan."""
    x, B, C = _split_scanned(convolved, shape)
    return x, *(t if t.stride(-1) == 1 else t.contiguous() for t in (B, C))
