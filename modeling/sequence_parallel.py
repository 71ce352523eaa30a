"""One long video over several devices: each rank of a group holds a contiguous span of its tokens and frames.

The whole past of a token is a state of fixed size per layer, so all that crosses from one rank to the next is what
crosses from one chunk to the next on one device: the states go right in the forward pass, their gradients go left in
the backward pass. The tower works on all ranks at once, each on its own frames.

In `layer_major` order a rank walks the layer blocks outside and its time blocks inside (`PipelinedRun`): it waits for
the states of one layer block alone, and while it works on that one, the rank before works on the next. With G layer
blocks and R ranks all is done after G + R - 1 turns instead of G, so a rank is idle for (R - 1) / (G + R - 1) of the
time. In `sequence_major` order, and without checkpointing, a rank waits for the states of all layers: exact, and one
after the other.

The loss of a rank is that of its own tokens; the sum over the ranks is that of one process. So all ranks of a group
must divide by one number of supervised tokens, `num_items_in_batch`, and gradients are summed over a group.
"""

import time
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import torch
from torch import distributed as dist
from torch.nn import functional as F

from .checkpointing import _Run


class SequenceGroup:
    """The ranks that share a video, in the order of its spans.

    Args:
        group: a `ProcessGroup`; None for all processes.
        trace: a list to note (rank, "forward" or "backward", layer block, start_s, end_s) in, of a clock that all
            processes of one machine share; None for none.
    """

    def __init__(self, group=None, trace=None):
        self.group, self.trace = group, trace
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        ranks = dist.get_process_group_ranks(group or dist.group.WORLD)
        self.left = ranks[self.rank - 1] if self.rank > 0 else None
        self.right = ranks[self.rank + 1] if self.rank + 1 < self.size else None
        self._on_their_way = []

    def executor(self, order):
        """The executor that hands states on while it works; None where a plan of this order has none."""
        return PipelinedRun if order == "layer_major" else None

    def longest(self, num_tokens):
        """The tokens of the longest span: what all ranks must plan for, as they hand on the same layer blocks."""
        device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else "cpu"
        longest = torch.tensor(num_tokens, device=device)
        dist.all_reduce(longest, dist.ReduceOp.MAX, group=self.group)
        return int(longest)

    def put(self, tensors, rank):
        """Send tensors of one dtype as one message, beside the work that follows; nothing where there is no rank."""
        if rank is None:
            return
        message = torch.cat([tensor.detach().reshape(-1) for tensor in tensors])
        self._on_their_way = [(work, kept) for work, kept in self._on_their_way if not work.is_completed()]
        self._on_their_way.append((dist.isend(message, rank, group=self.group), message))

    def get(self, like, rank):
        """Wait for tensors of the shapes of `like`."""
        message = like[0].new_empty(sum(tensor.numel() for tensor in like))
        dist.recv(message, rank, group=self.group)
        parts = message.split([tensor.numel() for tensor in like])
        return [part.view(tensor.shape) for part, tensor in zip(parts, like, strict=True)]

    def receive(self, states):
        """The states that enter this span, differentiable; `states` on the first rank, else only their shapes count."""
        if self.left is None:
            return states
        return _Receive.apply(self, torch.zeros((), requires_grad=True), *states)

    def send(self, out, states):
        """`out`, whose backward pass begins with the gradients that the next rank gives for `states`."""
        return out if self.right is None else _Send.apply(self, out, *states)

    @contextmanager
    def noted(self, what, block):
        start = time.monotonic()
        yield
        if self.trace is not None:
            self.trace.append((self.rank, what, block, start, time.monotonic()))


class _Receive(torch.autograd.Function):
    @staticmethod
    def forward(ctx, neighbours, anchor, *states):
        ctx.neighbours = neighbours
        return tuple(neighbours.get(states, neighbours.left))

    @staticmethod
    def backward(ctx, *grads):
        ctx.neighbours.put(grads, ctx.neighbours.left)
        return None, None, *(None for _ in grads)


class _Send(torch.autograd.Function):
    @staticmethod
    def forward(ctx, neighbours, out, *states):
        ctx.neighbours, ctx.like = neighbours, [(state.shape, state.dtype, state.device) for state in states]
        neighbours.put(states, neighbours.right)
        return out.view_as(out)

    @staticmethod
    def backward(ctx, grad_out):
        like = [torch.empty(shape, dtype=dtype, device=device) for shape, dtype, device in ctx.like]
        return None, grad_out, *ctx.neighbours.get(like, ctx.neighbours.right)


class PipelinedRun(_Run):
    """The grid with the layer blocks outside: the numbers are those of any other walk through it."""

    neighbours: SequenceGroup

    def forward(self, inputs_embeds, states):
        num_tokens, out = inputs_embeds.shape[1], None
        spans = self.spans(num_tokens)
        entering = None
        for number, group in enumerate(self.groups):
            carried = states[group]
            if self.neighbours.left is not None:
                carried = self._as_states(self.neighbours.get(_flat(carried), self.neighbours.left), carried)
            left, leaving = [], []
            with self.neighbours.noted("forward", number):
                for turn, span in enumerate(spans):
                    left.append([[self.store.put(tensor) for tensor in state] for state in carried])
                    source = inputs_embeds[:, span] if entering is None else entering[turn]
                    hidden_states = self.fetch(source) if entering is None else self.store.get(source)
                    self.store.wait()
                    hidden_states, carried = self.cell(turn, group, hidden_states, carried, span)
                    if group.stop < len(self.blocks):
                        leaving.append(self.store.put(hidden_states))
                    else:
                        out = self.keep_wanted(out, hidden_states, span, num_tokens)
            self.left_borders.append(left)
            self.lower_borders.append(entering)
            self.neighbours.put(_flat(carried), self.neighbours.right)
            states[group] = carried
            entering = leaving
        return out, states

    def backward(self, inputs_embeds, grad_out, grad_states, needs_grad_embeds):
        spans = self.spans(inputs_embeds.shape[1])
        grads = [None] * len(spans)  # of the hidden states between two layer blocks
        grad_embeds: Any = self.store.empty_like(inputs_embeds) if needs_grad_embeds else None
        for number, group in reversed(list(enumerate(self.groups))):
            left, entering = self.left_borders[number], self.lower_borders[number]
            self.left_borders[number] = self.lower_borders[number] = None  # let go of here
            carried = [tuple(None for _ in state) for state in left[-1]]
            if self.neighbours.right is not None:
                like = [torch.empty_like(tensor, device=self.device) for tensor in _flat(left[-1])]
                carried = self._as_states(self.neighbours.get(like, self.neighbours.right), carried)
            with self.neighbours.noted("backward", number):
                for turn, span in reversed(list(enumerate(spans))):
                    is_first = entering is None
                    source = self.fetch(inputs_embeds[:, span]) if is_first else self.store.get(entering[turn])
                    states = [tuple(self.store.get(kept) for kept in state) for state in left.pop()]
                    grad = None if grads[turn] is None else self.store.get(grads[turn])
                    self.store.wait()
                    if grad is None:
                        grad = self.grad_of_wanted(grad_out, span, source)
                    grad, carried = self.cell_backward(
                        turn, group, span, source, states, grad, carried, needs_grad_embeds or not is_first
                    )
                    if not is_first:
                        grads[turn] = self.store.put(grad)
                    elif needs_grad_embeds:
                        grads[turn] = None
                        grad_embeds[:, span].copy_(grad)
            self.neighbours.put(_flat(carried), self.neighbours.left)
        return grad_embeds, [tuple(None for _ in range(size)) for size in self.state_sizes]

    @staticmethod
    def _as_states(tensors, like):
        tensors = iter(tensors)
        return [tuple(next(tensors) for _ in state) for state in like]


def _flat(states):
    return [tensor for state in states for tensor in state]


def set_sequence_group(model, neighbours):
    """Let the backbone of `model` work on spans from now on; None: on whole sequences again.

    Args:
        model: a `VideoMa2mbaForConditionalGeneration`, wrapped or not.
        neighbours: `SequenceGroup`. Without gradient each process works on what it is given, as ever.
    """
    for module in model.modules():
        if hasattr(module, "neighbours"):
            module.neighbours = neighbours


def cut_span(batch, rank, size, tokens_per_frame, placeholders):
    """The span of one rank of a batch of one row: about as many tokens for each, cut between frames.

    Args:
        batch: `input_ids` (1, tokens) with what belongs to them: `attention_mask`, whose padding is left out; `labels`;
            `pixel_values_videos` and `pixel_values` (1, frames, 3, height, width).
        placeholders: the ids of video and image placeholders by these last names; `tokens_per_frame` of them make a
            frame.

    Returns:
        A batch for the model, with `shift_labels`, and (first, last + 1, all) of the tokens.

    Raises:
        ValueError: more than one row, or fewer places to cut than ranks.
    """
    ids, mask = batch["input_ids"], batch.get("attention_mask")
    if ids.shape[0] != 1:
        raise ValueError(f"sequence parallel takes one row at a time, got {ids.shape[0]}: let device_batch_size be 1")
    real = torch.ones_like(ids[0], dtype=torch.bool) if mask is None else mask[0].bool()
    ids = ids[:, real]
    # frames that end before each token, and whether none is open there
    counts = {name: F.pad((ids[0] == token_id).cumsum(0), (1, 0)) for name, token_id in placeholders.items()}
    between = torch.stack([count % tokens_per_frame == 0 for count in counts.values()]).all(dim=0)
    places = between.nonzero()[:, 0]
    num_tokens = ids.shape[1]
    cuts = [int(places[(places - r * num_tokens / size).abs().argmin()]) for r in range(size + 1)]
    if any(a >= b for a, b in pairwise(cuts)):
        raise ValueError(
            f"{num_tokens} tokens cannot be shared by {size} ranks: each needs a frame or a word of its own; let "
            "sequence_parallel be smaller, or leave short samples out"
        )
    first, last = cuts[rank], cuts[rank + 1]
    targets = F.pad(batch["labels"][:, real][:, 1:], (0, 1), value=-100)[:, first:last]
    span = {"input_ids": ids[:, first:last], "labels": targets, "shift_labels": targets}
    for name, count in counts.items():
        begin, end = (int(count[place]) // tokens_per_frame for place in (first, last))
        if batch.get(name) is not None and end > begin:
            span[name] = batch[name][:, begin:end]
    return span, (first, last, num_tokens)
