"""Count the bytes that live on the meta device: what a model of any size would hold, on a machine that could not.

Meta tensors have shapes and storages but no memory behind them. `LiveBytes` sees every operation, so it sees every new
storage, and a weak reference tells when one is gone: the difference is what a real run would hold, less what the
kernels of an operation take for themselves and the slack of an allocator.
"""

import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from math import prod
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from ..modeling import checkpointing, mamba2, recompute

# Shapes alone matter here, and for these two, which are called most, torch takes long to find them.
_ADD, _ADD_IN_PLACE = torch.ops.aten.add.Tensor, torch.ops.aten.add_.Tensor
KINDS = ("device", "host", "gradients", "weights")


class LiveBytes(TorchDispatchMode):
    """Counts the storages of meta tensors while active.

    Attributes:
        live: bytes held now, by kind. "device" is all that is none of the others: the activations.
        peak: the most each kind has held.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = dict.fromkeys(KINDS, 0)
        self.peak = dict.fromkeys(KINDS, 0)
        self._kind = "device"
        self._known: dict[int, tuple[weakref.ref, str, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is _ADD and _alike(*args[:2]):
            out = torch.empty(args[0].shape, dtype=torch.promote_types(args[0].dtype, args[1].dtype), device="meta")
        elif func is _ADD_IN_PLACE and args[0].is_meta:
            return args[0]
        else:
            out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor):
            # a cast of a gradient is a gradient
            copies = func is torch.ops.aten._to_copy.default and self._is(args[0], "gradients")
            self.count(out, "gradients" if copies else self._kind)
        elif isinstance(out, (tuple, list)):
            for one in out:
                if isinstance(one, torch.Tensor):
                    self.count(one, self._kind)
        return out

    def count(self, tensor: torch.Tensor | None, kind: str) -> None:
        """Count the tensor's storage, unless it is known or not of the meta device."""
        if tensor is None or tensor.device.type != "meta":
            return
        storage = tensor.untyped_storage()
        key = id(storage)
        if key in self._known:
            return
        num_bytes = storage.nbytes()
        self._known[key] = weakref.ref(storage, partial(self._forget, key)), kind, num_bytes
        self._add(kind, num_bytes)

    def count_as(self, tensor: torch.Tensor, kind: str) -> None:
        """Count a storage as another kind from now on."""
        key = id(tensor.untyped_storage())
        ref, old, num_bytes = self._known[key]
        self._known[key] = ref, kind, num_bytes
        self.live[old] -= num_bytes
        self._add(kind, num_bytes)

    def touch(self, num_bytes: int) -> None:
        """Count bytes that the device holds for a moment."""
        self.peak["device"] = max(self.peak["device"], self.live["device"] + num_bytes)

    @contextmanager
    def placing(self, kind: str) -> Iterator[None]:
        """New storages are of this kind."""
        before, self._kind = self._kind, kind
        try:
            yield
        finally:
            self._kind = before

    def _is(self, tensor: torch.Tensor, kind: str) -> bool:
        known = self._known.get(id(tensor.untyped_storage()))
        return known is not None and known[1] == kind

    def _add(self, kind: str, num_bytes: int) -> None:
        self.live[kind] += num_bytes
        if self.live[kind] > self.peak[kind]:
            self.peak[kind] = self.live[kind]

    def _forget(self, key: int, _: weakref.ref) -> None:
        _, kind, num_bytes = self._known.pop(key)
        self.live[kind] -= num_bytes


def _alike(one: Any, other: Any) -> bool:
    both = isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor)
    return both and one.is_meta and one.shape == other.shape and one.is_contiguous() and other.is_contiguous()


class CountedHostStore:
    """In place of the executor's `HostStore`: what waits is counted as host memory."""

    def __init__(self, counter: LiveBytes) -> None:
        self.counter = counter

    def put(self, tensor: torch.Tensor) -> torch.Tensor:
        with self.counter.placing("host"):
            return tensor.detach().clone()

    def get(self, kept: torch.Tensor) -> torch.Tensor:
        return kept.clone()

    def empty_like(self, tensor: torch.Tensor) -> torch.Tensor:
        with self.counter.placing("host"):
            return torch.empty_like(tensor)

    def wait(self) -> None:
        pass


@contextmanager
def counting(counter: LiveBytes, offload: bool = False, stand_in: bool = True) -> Iterator[None]:
    """Run what is inside under `counter`, with the gradient sums of the executor counted as gradients.

    Args:
        offload: the executor's embeddings lie on the host, too: each chunk of them is copied to the device.
        stand_in: replace the inside of `recompute_segments` by `SegmentsStandIn`, some twenty times faster.
    """
    adder = checkpointing._adder

    def counted_adder(sums: list, index: int) -> Callable:
        add = adder(sums, index)

        def counted_add(param: torch.Tensor) -> None:
            with counter.placing("gradients"):
                add(param)
            counter.count_as(sums[index], "gradients")  # in float32 the first gradient itself becomes the sum

        return counted_add

    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(checkpointing, "_adder", counted_adder))
        if offload:
            stack.enter_context(mock.patch.object(checkpointing._Run, "fetch", lambda run, t: run.store.get(t)))
        if stand_in:
            stack.enter_context(mock.patch.object(mamba2, "recompute_segments", SegmentsStandIn(counter)))
        stack.enter_context(counter)
        yield


class SegmentsStandIn:
    """In place of `recompute_segments`: keeps and gives out the same, holds as much at its peak, in a dozen operations.

    What the function itself takes for one segment is counted with the real thing, once per shape.
    """

    def __init__(self, counter: LiveBytes) -> None:
        self.counter = counter
        self._costs: dict[tuple, _Cost] = {}

    def __call__(self, fn: Callable, segment: int, sequence: tuple, states: tuple = (), params: tuple = ()) -> tuple:
        call = _Call(fn, segment, sequence, states, params)
        borders: list[torch.Tensor] = []

        def again() -> torch.Tensor:
            y = self.forward(call)[0]
            borders[:] = [call.empty(((call.num_segments - 1) * call.state_bytes,), torch.uint8)]
            return y

        if not torch.is_grad_enabled():
            y, states_out = self.forward(call)
            return y, states_out, again
        y, *states_out = _StandInFunction.apply(self, call, borders, *sequence, *states, *params)
        return y, tuple(states_out), again

    def cost(self, call: "_Call", trains: tuple[bool, ...]) -> "_Cost":
        """What `fn` takes for one segment of this call."""
        key = call.key, trains
        if key not in self._costs:
            with _disable_current_modes():
                self._costs[key] = call.count(trains)
        return self._costs[key]

    def forward(self, call: "_Call") -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
        """Holds what `recompute._forward` holds. Returns y and the final states."""
        cost = self.cost(call, (False,) * len(call.specs))
        y = call.empty((call.batch, call.num_tokens, *cost.width), cost.dtype)
        states = tuple(call.empty(*spec) for spec in call.state_specs)
        # one segment gives its output into y itself; of several, each is copied there, and their states are kept
        kept = (call.num_segments - 2) * call.state_bytes if call.num_segments > 1 else -y.nbytes - call.state_bytes
        self.counter.touch(cost.forward + kept)
        return y, states


class _Cost(NamedTuple):
    """Peak bytes over what goes in, and what comes out, of one segment."""

    forward: int
    backward: int
    width: tuple[int, ...]
    dtype: torch.dtype


class _Call:
    """The shapes of one call of `recompute_segments`."""

    def __init__(self, fn: Callable, segment: int, sequence: tuple, states: tuple, params: tuple) -> None:
        tensors = *sequence, *states, *params
        self.fn, self.device = fn, sequence[0].device
        self.specs: list[Any] = [None if t is None else (tuple(t.shape), t.dtype) for t in tensors]
        self.parts = len(sequence), len(sequence) + len(states)
        self.batch, self.num_tokens = sequence[0].shape[:2]
        self.num_segments = -(-self.num_tokens // segment)
        self.state_bytes = sum(prod(shape) * dtype.itemsize for shape, dtype in self.state_specs)
        self.length = min(segment, self.num_tokens)  # tokens of the longest segment
        self.key = fn.__qualname__, self.length, self.parts, tuple(map(self._of_a_segment, range(len(self.specs))))

    @property
    def state_specs(self) -> list:
        return self.specs[slice(*self.parts)]

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device=self.device)

    def sequence_bytes(self, index: int) -> int:
        """Bytes of one segment of a sequence tensor."""
        shape, dtype = self._of_a_segment(index)
        return prod(shape) * dtype.itemsize

    def _of_a_segment(self, index: int) -> Any:
        """Shape and dtype, or None."""
        if self.specs[index] is None or index >= self.parts[0]:
            return self.specs[index]
        (batch, _, *rest), dtype = self.specs[index]
        return (batch, self.length, *rest), dtype

    def count(self, trains: tuple[bool, ...]) -> _Cost:
        tensors: list[Any] = [spec and self.empty(*spec) for spec in map(self._of_a_segment, range(len(self.specs)))]
        for tensor, train in zip(tensors, trains, strict=True):
            if train:
                tensor.requires_grad_()
        forward, backward = LiveBytes(), LiveBytes()
        split = recompute._split(tensors, self.parts)
        for tensor in tensors:
            forward.count(tensor, "weights")  # what goes in is not to be counted
            backward.count(tensor, "weights")
        with torch.no_grad(), forward:
            y, *_ = recompute.recompute_segments(self.fn, self.length, *split)
        if any(trains):
            with torch.enable_grad():  # this may be asked from inside a backward pass
                y, states, again = recompute.recompute_segments(self.fn, self.length, *split)
            again()  # as a mixer does: the states entering the segments are found before
            outputs = [out for out in (y, *states) if out.requires_grad]
            grads = [torch.empty_like(out) for out in outputs]
            for tensor in (*outputs, *grads):
                backward.count(tensor, "weights")
            with backward:
                torch.autograd.grad(outputs, [t for t, train in zip(tensors, trains, strict=True) if train], grads)
        return _Cost(forward.peak["device"], backward.peak["device"], tuple(y.shape[2:]), y.dtype)


class _StandInFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, stand_in, call, borders, *tensors):
        ctx.stand_in, ctx.call, ctx.borders = stand_in, call, borders
        ctx.save_for_backward(*tensors)
        y, states = stand_in.forward(call)
        return y, *states

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_y, *grad_states):
        _ = ctx.saved_tensors  # as they are fetched, a tensor saved as a recipe is computed again
        stand_in, call, needed = ctx.stand_in, ctx.call, ctx.needs_input_grad[3:]
        num_sequence = call.parts[0]
        wanted = [spec if need else None for spec, need in zip(call.specs, needed, strict=True)]
        grads = [spec and call.empty(*spec) for spec in wanted[:num_sequence]]
        of_one_segment = sum(call.sequence_bytes(i) for i in range(num_sequence) if needed[i])
        stand_in.counter.touch(stand_in.cost(call, needed).backward - of_one_segment)
        ctx.borders.clear()
        grads += [spec and call.empty(*spec) for spec in wanted[num_sequence:]]
        return None, None, None, *grads
