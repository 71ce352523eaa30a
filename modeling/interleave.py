"""Text and frames become one sequence."""

import torch


class Interleave(torch.autograd.Function):
    """Rows of several tensors into one sequence: `out[masks[i]] = values[i]`, each position in exactly one mask."""

    @staticmethod
    def forward(ctx, masks, dtype, pin_memory, *values):
        ctx.masks, ctx.dtypes = masks, [value.dtype for value in values]
        shape, device = (*masks[0].shape, values[0].shape[-1]), values[0].device
        out = torch.empty(shape, dtype=dtype, device=device, pin_memory=pin_memory)
        for mask, value in zip(masks, values, strict=True):
            out[mask] = value.to(dtype)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        wanted = zip(ctx.masks, ctx.dtypes, ctx.needs_input_grad[3:], strict=True)
        return None, None, None, *(grad[mask].to(dtype) if need else None for mask, dtype, need in wanted)
