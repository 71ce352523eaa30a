"""Two ways to keep less for the backward pass, used inside one layer.

`recompute_segments` runs a recurrent function over a sequence and keeps only what went in. `saved_as_recipe` lets a
module that wants to keep its input (a linear layer does) keep the way to compute that input instead. Inside
`keeping_activations` both leave all to autograd, which keeps what it needs and computes nothing twice.
"""

from contextlib import contextmanager, nullcontext
from contextvars import ContextVar

import torch

from .autocast import autocast_to
from .segment_sizes import KEPT_SEGMENT

_keeping = ContextVar("keeping", default=False)


@contextmanager
def keeping_activations():
    """Inside, nothing is computed again in the backward pass: faster, where the memory is there."""
    token = _keeping.set(True)
    try:
        yield
    finally:
        _keeping.reset(token)


def recompute_segments(fn, segment, sequence, states=(), params=()):
    """Run `fn` over segments of a sequence, handing its states on, and recompute each segment in the backward pass.

    Args:
        fn: `fn(sequence, states, params) -> (y, states)`, where the sequence tensors are slices along dimension 1. It
            must be deterministic and is run with autocast off.
        segment: tokens of one segment, which bounds what `fn` holds at any time.
        sequence: tuple of (batch, tokens, ...) tensors or None. states, params: tuples of tensors or None.

    Returns:
        y (batch, tokens, ...), the final states, and a function that computes y again from the saved inputs.
        Gradients of `params` are summed over the segments in float32 or better.
    """
    # the states entering each segment: found by whoever computes forward in the backward pass, used once
    borders: list = []

    def again():
        y, _, borders[:] = _forward(fn, segment, sequence, states, params)
        return y

    if not torch.is_grad_enabled():
        y, states_out, _ = _forward(fn, segment, sequence, states, params)
        return y, tuple(states_out), again
    if _keeping.get():
        y, states_out = _kept(fn, segment, sequence, states, params)
        return y, tuple(states_out), None
    y, *states_out = _RecomputeSegments.apply(
        fn, segment, len(sequence), len(states), borders, *sequence, *states, *params
    )
    return y, tuple(states_out), again


class _RecomputeSegments(torch.autograd.Function):
    @staticmethod
    def forward(ctx, fn, segment, num_sequence, num_states, borders, *tensors):
        ctx.fn, ctx.segment, ctx.borders = fn, segment, borders
        ctx.parts = num_sequence, num_sequence + num_states
        ctx.save_for_backward(*tensors)
        y, states, _ = _forward(fn, segment, *_split(tensors, ctx.parts))
        return y, *states

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_y, *grad_states):
        tensors, needed = ctx.saved_tensors, ctx.needs_input_grad[5:]
        num_sequence, num_carried = ctx.parts
        if not ctx.borders and not grad_states:
            ctx.borders[:] = [()] * max(1, -(-grad_y.shape[1] // ctx.segment))  # no states: nothing to find
        elif not ctx.borders:
            ctx.borders[:] = _forward(ctx.fn, ctx.segment, *_split(tensors, ctx.parts))[2]
        grads: list = [
            None if not need else torch.empty_like(t) if i < num_sequence else torch.zeros_like(t, dtype=_wide(t.dtype))
            for i, (t, need) in enumerate(zip(tensors, needed, strict=True))
        ]
        carried = list(grad_states)
        starts = range(0, max(grad_y.shape[1], 1), ctx.segment)
        for start in reversed(starts):
            span = slice(start, start + ctx.segment)
            local = [t if t is None or i >= num_sequence else t[:, span] for i, t in enumerate(tensors)]
            local[num_sequence:num_carried] = ctx.borders.pop()
            # between segments the states' gradient must flow even where the first states need none
            wanted = [need or (start > 0 and num_sequence <= i < num_carried) for i, need in enumerate(needed)]
            local = [t if t is None else t.detach().requires_grad_(want) for t, want in zip(local, wanted, strict=True)]
            with torch.enable_grad(), autocast_to(grad_y.device.type, None):
                y, states = ctx.fn(*_split(local, ctx.parts))
            inputs = [i for i, want in enumerate(wanted) if want]
            # a state may depend on nothing that is trained, and an input may be left unused by this segment
            outputs = [
                (out, grad)
                for out, grad in zip((y, *states), (grad_y[:, span], *carried), strict=True)
                if out.requires_grad and grad is not None
            ]
            gradients = torch.autograd.grad(
                [out for out, _ in outputs],
                [local[i] for i in inputs],
                [grad for _, grad in outputs],
                allow_unused=True,
                materialize_grads=True,
            )
            found = dict(zip(inputs, gradients, strict=True))
            carried = [found.get(i) for i in range(num_sequence, num_carried)]
            for i in inputs:
                if i < num_sequence:
                    grads[i][:, span] = found[i]
                elif i >= num_carried:
                    grads[i] += found[i]
            del local, y, states, outputs, gradients, found  # before the next segment, or the casts, take their place
        grads[num_sequence:num_carried] = carried
        return (
            None,
            None,
            None,
            None,
            None,
            *(g if g is None else g.to(t.dtype) for g, t in zip(grads, tensors, strict=True)),
        )


def _kept(fn, segment, sequence, states, params):
    """One pass under autograd: the numbers of the other way, up to the order in which gradients are added."""
    pieces, segment = [], min(segment, KEPT_SEGMENT)
    # cut by split, whose backward pass joins the gradients once: that of a slice makes and adds a tensor of full length
    count = max(1, -(-sequence[0].shape[1] // segment))
    spans = [[None] * count if s is None else s.split(segment, dim=1) for s in sequence]
    with autocast_to(sequence[0].device.type, None):
        for span in zip(*spans, strict=True):
            piece, states = fn(span, states, params)
            pieces.append(piece)
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=1), states


def _forward(fn, segment, sequence, states, params):
    """One pass without a graph. Returns y, the final states, and the states entering each segment."""
    num_tokens = sequence[0].shape[1]
    y, borders = None, []
    with torch.no_grad(), autocast_to(sequence[0].device.type, None):
        for start in range(0, max(num_tokens, 1), segment):  # no tokens: one empty segment, which says the shapes
            borders.append(states)
            span = slice(start, start + segment)
            piece, states = fn(tuple(None if s is None else s[:, span] for s in sequence), states, params)
            if num_tokens <= segment:
                return piece, states, borders
            if y is None:
                y = piece.new_empty(piece.shape[0], num_tokens, *piece.shape[2:])
            y[:, span] = piece
    return y, states, borders


def _split(tensors, parts):
    return tuple(tensors[: parts[0]]), tuple(tensors[parts[0] : parts[1]]), tuple(tensors[parts[1] :])


def _wide(dtype):
    return torch.promote_types(dtype, torch.float32)


def saved_as_recipe(tensor, recipe):
    """Inside, autograd saves the call `recipe()` wherever it would save `tensor` or a view of it.

    `recipe` must return the same numbers in the same layout. Works through any module, also an adapter around a linear
    layer, because it looks at the storage of what is saved and not at who saves it.
    """
    if not torch.is_grad_enabled() or _keeping.get():
        return nullcontext()
    storage = tensor.untyped_storage()._cdata

    def pack(saved):
        if saved.untyped_storage()._cdata == storage:
            return saved.size(), saved.stride(), saved.storage_offset()
        return saved

    def unpack(packed):
        return recipe().as_strided(*packed) if isinstance(packed, tuple) else packed

    return torch.autograd.graph.saved_tensors_hooks(pack, unpack)
