"""The executor of a `CheckpointPlan`: Multi-Axis Gradient Checkpointing (paper, section 3.3, algorithms 1 and 2).

Layers and tokens make a grid. The forward pass walks the time blocks from first to last and keeps, without a graph,
what enters the cells: the states at the left border of each time block and, in `layer_major` order, the hidden states
at the lower border of each layer block. The backward pass walks the time blocks from last to first and in each the
layer blocks from last to first, computes the cell again with a graph, goes back through it, and hands the gradient of
the hidden states down and the gradient of the states left. In `sequence_major` order the lower borders are not kept
but computed again, chunk by chunk, so nothing but the states at chunk borders grows with the sequence; with `offload`
those wait in host memory. Where `GradientWindows` say so (see `gradient_horizon`), the gradient of the states stops at
a border, and time blocks without a gradient run once and keep nothing.

Rules:
    1. What crosses a border is kept as it was computed; a cell is computed again with the same cuts, the same autocast,
       and the random numbers it had.
    2. Each contribution to a parameter's gradient is added, in float32 or better, the moment it is found. No second set
       of gradients ever exists, and autograd sees one gradient per parameter, so hooks of data-parallel training fire
       once.
    3. Only tokens that the caller asked for leave the loop.
    4. The executor knows blocks and states (see `run_layers`), not Mamba-2.
    5. Parameters that are sharded over processes are gathered once for the forward pass and once for the backward pass
       (see `sharded_parameters`); hooks on blocks run once per cell, and again where it is computed again.
"""

from contextlib import ExitStack, contextmanager
from itertools import pairwise
from typing import Any

import torch
from torch import nn

from .autocast import autocast_dtype, autocast_to
from .host_copies import to_device, wait_for
from .host_memory import Borrowed
from .run_layers import kept_tokens, run_layers
from .sharded_parameters import engine_hooks_aside, run_gathered


def run_checkpointed(
    blocks, plan, inputs_embeds, states, mask=None, keep=None, store=None, device=None, windows=None, neighbours=None
):
    """Run all `blocks` on all tokens as `plan` says; the result and all gradients are those of `run_layers`.

    Args:
        blocks: the layers, each `block(hidden_states, state, mask) -> hidden_states, state`.
        plan: has `order`, `layer_interval`, `sequence_interval`, `offload`, maybe `predicted_host_bytes`; a
            `CheckpointPlan`.
        inputs_embeds: (batch, tokens, hidden); with `offload` it may lie in host memory, and its gradient then does.
        states: one tuple of tensors per block.
        mask: (batch, tokens) bool or None.
        keep: (batch, tokens) int64 on the CPU, the row of the result that a token becomes, -1 for none; None for all.
        store: where borders wait; None for what `plan.offload` says.
        device: where the blocks compute; None for where the states lie.
        windows: `GradientWindows` of these tokens, outside of which none has a gradient; None for all.
        neighbours: `SequenceGroup` whose ranks hold the tokens before and after; None where all are here.

    Returns:
        (kept, hidden), or (batch, tokens, hidden) where `keep` is None, and the list of final states.
    """
    run: Any = None
    sizes = [len(state) for state in states]
    device = states[0][0].device if device is None else device
    if store is None:
        store = DeviceStore()
        if plan.offload:  # borrows what is planned beside the embeddings, which are there already
            planned = getattr(plan, "predicted_host_bytes", 0) - inputs_embeds.nbytes
            store = HostStore(device, max(planned, 0))

    def run_all(inputs_embeds, *flat_states):
        nonlocal run
        names = _trainable(blocks)
        pipelined = neighbours and neighbours.executor(plan.order)
        run = (pipelined or _Run)(blocks, plan, mask, keep, store, device, sizes, names, windows)
        params = [module._parameters[name] for owners in names for module, name in owners[:1]]
        if neighbours is None or pipelined:
            run.neighbours = neighbours
            return _Checkpointed.apply(run, inputs_embeds, *flat_states, *params)
        flat_states = neighbours.receive(flat_states)
        out, *final = _Checkpointed.apply(run, inputs_embeds, *flat_states, *params)
        return neighbours.send(out, final), *final

    out, *final = run_gathered(blocks, run_all, inputs_embeds, *(tensor for state in states for tensor in state))
    return out, run.unflatten(final)


class DeviceStore:
    """Borders wait where they were computed."""

    def put(self, tensor):
        return tensor.detach()

    def get(self, kept):
        return kept

    def empty_like(self, tensor):
        return torch.empty_like(tensor)

    def wait(self):
        pass


class HostStore:
    """Borders wait in host memory, which is pinned where the device is a GPU.

    There copies run beside the work, those to the host and those from it each on a stream of its own.

    Args:
        device: where the blocks compute.
        num_bytes: that are to wait, as planned.
    """

    def __init__(self, device, num_bytes=0):
        self.device, self.memory = device, Borrowed(num_bytes)
        self.leaving: Any = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.coming: Any = torch.cuda.Stream(device) if device.type == "cuda" else None

    def put(self, tensor):
        """Copy to the host."""
        host = self.memory.empty(tensor.shape, tensor.dtype)
        if self.leaving is None:
            return host.copy_(tensor.detach())
        self.leaving.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.leaving):
            host.copy_(tensor.detach(), non_blocking=True)
        tensor.record_stream(self.leaving)
        return host

    def get(self, kept):
        """Copy to the device. Call `wait` before using it."""
        if self.coming is None:
            return kept.to(self.device)
        self.coming.wait_stream(self.leaving)
        with torch.cuda.stream(self.coming):
            tensor = kept.to(self.device, non_blocking=True)
        tensor.record_stream(torch.cuda.current_stream(self.device))
        return tensor

    def empty_like(self, tensor):
        on_host = tensor.device.type == "cpu" and tensor.device != self.device
        return self.memory.empty(tensor.shape, tensor.dtype) if on_host else torch.empty_like(tensor)

    def wait(self):
        """Let the work that follows wait for the copies to the device that were asked for so far."""
        if self.coming is not None:
            torch.cuda.current_stream(self.device).wait_stream(self.coming)


class _Run:
    """One forward and backward pass over the grid."""

    def __init__(self, blocks, plan, mask, keep, store, device, state_sizes, names, windows):
        self.blocks, self.mask, self.keep, self.store, self.device = list(blocks), mask, keep, store, device
        self.state_sizes, self.names, self.windows = state_sizes, names, windows
        num_layers, self.chunk = len(self.blocks), plan.sequence_interval
        self.groups = [
            slice(i, min(i + plan.layer_interval, num_layers)) for i in range(0, num_layers, plan.layer_interval)
        ]
        self.keeps_lower_borders = plan.order == "layer_major"
        self.autocast_dtype = autocast_dtype(device.type)
        self.has_dropout = any(
            isinstance(module, nn.modules.dropout._DropoutNd) and module.p > 0 and module.training
            for block in self.blocks
            for module in block.modules()
        )
        self.rng, self.left_borders, self.lower_borders = {}, [], []

    def unflatten(self, tensors):
        tensors = iter(tensors)
        return [tuple(next(tensors) for _ in range(size)) for size in self.state_sizes]

    def spans(self, num_tokens):
        borders = pairwise([0, *(self.windows.cuts if self.windows else ()), num_tokens])
        return [slice(a, min(a + self.chunk, end)) for start, end in borders for a in range(start, end, self.chunk)]

    def goes_back(self, span):
        """Whether any token of a time block has a gradient."""
        return self.windows is None or bool(self.windows.live[:, span].any())

    def fetch(self, tensor):
        """A tensor that may lie on the host, on the device."""
        return tensor if tensor.device == self.device else self.store.get(tensor)

    def cell(self, time, group, hidden_states, states, span):
        """One cell of the grid, with the autocast and the random numbers it had the first time."""
        mask = None if self.mask is None else self.mask[:, span]
        with self._same_random_numbers((time, group.start)), autocast_to(self.device.type, self.autocast_dtype):
            return run_layers(self.blocks[group], hidden_states, states, mask)

    @contextmanager
    def _same_random_numbers(self, key):
        if not self.has_dropout:
            yield
            return
        on_gpu = self.device.type == "cuda"
        if key not in self.rng:
            self.rng[key] = torch.get_rng_state(), torch.cuda.get_rng_state(self.device) if on_gpu else None
            yield
            return
        with torch.random.fork_rng(devices=[self.device] if on_gpu else []):
            cpu_state, gpu_state = self.rng[key]
            torch.set_rng_state(cpu_state)
            if on_gpu:
                torch.cuda.set_rng_state(gpu_state, self.device)
            yield

    def forward(self, inputs_embeds, states):
        num_tokens, out = inputs_embeds.shape[1], None
        spans = self.spans(num_tokens)
        coming = self.fetch(inputs_embeds[:, spans[0]])
        for time, span in enumerate(spans):
            goes_back = self.goes_back(span)
            if goes_back:
                self.left_borders.append([[self.store.put(tensor) for tensor in state] for state in states])
            self.store.wait()
            hidden_states = coming
            coming = self.fetch(inputs_embeds[:, spans[time + 1]]) if time + 1 < len(spans) else None
            lower = []
            for group in self.groups:
                if goes_back and self.keeps_lower_borders and group.start > 0:
                    lower.append(self.store.put(hidden_states))
                hidden_states, states[group] = self.cell(time, group, hidden_states, states[group], span)
            if goes_back:
                self.lower_borders.append(lower)
            out = self.keep_wanted(out, hidden_states, span, num_tokens)
        return out, states

    def keep_wanted(self, out, hidden_states, span, num_tokens):
        """The result, None at first, with what the caller asked for of a time block's last hidden states."""
        if out is None:
            shape = (len(hidden_states), num_tokens) if self.keep is None else (int(self.keep.max()) + 1,)
            out = hidden_states.new_empty(*shape, hidden_states.shape[-1])
        if self.keep is None:
            out[:, span] = hidden_states
        else:
            positions, rows = (to_device(index, self.device) for index in kept_tokens(self.keep, span))
            out[rows] = hidden_states.flatten(0, 1)[positions]
        return out

    def backward(self, inputs_embeds, grad_out, grad_states, needs_grad_embeds):
        grad_embeds: Any = self.store.empty_like(inputs_embeds) if needs_grad_embeds else None
        every = list(enumerate(self.spans(inputs_embeds.shape[1])))
        blocks = [(time, span) for time, span in every if self.goes_back(span)]
        if needs_grad_embeds:
            for _, span in every:
                if not self.goes_back(span):
                    grad_embeds[:, span].zero_()
        coming = self._fetch_borders(inputs_embeds, blocks, len(blocks) - 1)
        for index in reversed(range(len(blocks))):
            time, span = blocks[index]
            self.store.wait()
            hidden_states, states, lower = coming
            coming = self._fetch_borders(inputs_embeds, blocks, index - 1) if index else None
            lower = [hidden_states, *(lower or self._lower_borders_again(time, span, hidden_states, states))]
            del hidden_states
            grad_hidden = self.grad_of_wanted(grad_out, span, lower[-1])
            for group in reversed(self.groups):
                grad_hidden, grad_states[group] = self.cell_backward(
                    time, group, span, lower.pop(), states[group], grad_hidden, grad_states[group],
                    group.start > 0 or needs_grad_embeds,
                )  # fmt: skip
            if needs_grad_embeds:
                grad_embeds[:, span].copy_(grad_hidden, non_blocking=True)
            if self.windows is not None and (stops := self.windows.starts[:, span.start]).any():
                goes_on = to_device(~stops, self.device)
                grad_states = [tuple(g * goes_on.view(-1, *[1] * (g.ndim - 1)) for g in grads) for grads in grad_states]
        if needs_grad_embeds and grad_embeds.device != self.device:
            wait_for(self.device)  # the copies must be done before the host reads them
        return grad_embeds, grad_states

    def cell_backward(self, time, group, span, hidden_states, states, grad_hidden, grad_states, needs_grad_hidden):
        """Compute a cell again and go back through it: the gradients of what entered, None of what needs none."""
        entering = hidden_states.detach().requires_grad_(needs_grad_hidden)
        entering_states = [tuple(t.detach().requires_grad_() for t in state) for state in states]
        with torch.enable_grad():
            leaving, leaving_states = self.cell(time, group, entering, entering_states, span)
        outputs = [leaving, *(t for state in leaving_states for t in state)]
        gradients = [grad_hidden, *(g for grads in grad_states for g in grads)]
        # the last chunk's final states have no gradient, unless the caller uses them
        used = [i for i, gradient in enumerate(gradients) if gradient is not None]
        torch.autograd.backward([outputs[i] for i in used], [gradients[i] for i in used])
        return entering.grad, [tuple(t.grad for t in state) for state in entering_states]

    def _fetch_borders(self, inputs_embeds, blocks, index):
        """What enters a time block from the left and, as far as it was kept, from below. It is let go of here."""
        left, lower = self.left_borders[index], self.lower_borders[index]
        states = [tuple(self.store.get(kept) for kept in state) for state in left]
        lower = [self.store.get(kept) for kept in lower]
        if any(left):  # blocks without a state left nothing to let go of, and may be gone through again
            self.left_borders[index] = self.lower_borders[index] = None
        return self.fetch(inputs_embeds[:, blocks[index][1]]), states, lower

    def _lower_borders_again(self, time, span, hidden_states, states):
        """`sequence_major`: the hidden states that enter each layer block but the first, without a graph."""
        lower = []
        with torch.no_grad():
            for group in self.groups[:-1]:
                hidden_states, _ = self.cell(time, group, hidden_states, states[group], span)
                lower.append(hidden_states)
        return lower

    def grad_of_wanted(self, grad_out, span, like):
        """The gradient that reaches the last layer's hidden states of a time block from the result."""
        if self.keep is None:
            return grad_out[:, span]
        positions, rows = (to_device(index, self.device) for index in kept_tokens(self.keep, span))
        grad = grad_out.new_zeros(like.shape)
        grad.flatten(0, 1)[positions] = grad_out[rows]
        return grad

    @contextmanager
    def summed_gradients(self):
        """Stand-ins take the parameters' places; yields the list of their gradient sums, being filled (rule 2)."""
        sums = [None] * len(self.names)
        with ExitStack() as stack:
            for index, owners in enumerate(self.names):
                module, name = owners[0]
                original = module._parameters[name]
                stand_in = original.detach().requires_grad_()
                stand_in.register_post_accumulate_grad_hook(_adder(sums, index))
                for module, name in owners:
                    module._parameters[name] = stand_in
                    stack.callback(module._parameters.__setitem__, name, original)
            yield sums


class _Checkpointed(torch.autograd.Function):
    @staticmethod
    def forward(ctx, run, inputs_embeds, *tensors):
        num_states = sum(run.state_sizes)
        out, states = run.forward(inputs_embeds.detach(), run.unflatten(tensors[:num_states]))
        ctx.run, ctx.param_dtypes = run, [p.dtype for p in tensors[num_states:]]
        ctx.save_for_backward(inputs_embeds)
        ctx.set_materialize_grads(False)  # where the final states are not used, their gradient takes no memory
        ctx.out_shape, ctx.out_dtype = out.shape, out.dtype
        return out, *(tensor for state in states for tensor in state)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_out, *grad_states):
        run, (inputs_embeds,) = ctx.run, ctx.saved_tensors
        if None in run.left_borders:
            raise RuntimeError(
                "the borders kept for this backward pass are used up: a checkpointed forward pass can be gone back "
                "through once; call the model again instead of using retain_graph=True"
            )
        if grad_out is None:
            grad_out = torch.zeros(ctx.out_shape, dtype=ctx.out_dtype, device=run.device)
        with engine_hooks_aside(run.blocks), run.summed_gradients() as sums:
            grad_embeds, grad_states = run.backward(
                inputs_embeds, grad_out, run.unflatten(grad_states), ctx.needs_input_grad[1]
            )
        flat_states = [grad for grads in grad_states for grad in grads]
        for index, dtype in enumerate(ctx.param_dtypes):
            if sums[index] is not None:
                sums[index] = sums[index].to(dtype)  # one at a time: each float32 sum goes as its cast comes
        return None, grad_embeds, *flat_states, *sums


def _trainable(blocks):
    """The parameters to be trained, each as the list of the places that hold it (a shared one has several)."""
    owners: dict[nn.Parameter, list] = {}
    for block in blocks:
        for module in block.modules():
            for name, param in module._parameters.items():
                if param is not None and param.requires_grad:
                    owners.setdefault(param, []).append((module, name))
    return list(owners.values())


def _adder(sums, index):
    def add(stand_in):
        grad, stand_in.grad = stand_in.grad, None
        if sums[index] is None:
            sums[index] = grad.to(torch.promote_types(grad.dtype, torch.float32))
        else:
            sums[index] += grad

    return add
