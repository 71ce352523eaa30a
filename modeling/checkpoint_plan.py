"""Which plan Multi-Axis Gradient Checkpointing takes: plain Python, no torch. What plans cost: `checkpoint_costs`."""

import math
from dataclasses import dataclass, replace
from functools import partial

from .checkpoint_costs import Costs, is_whole_number

ORDERS = ("layer_major", "sequence_major")
AXES = ("layer", "sequence")
HOST_TO_DEVICE = 8  # machines have several times as much host memory as device memory


class InfeasibleMemoryBudget(ValueError):
    """No plan fits the budget; the message names the smallest that would, and with which options.

    That takes another search, which is made when the message is read.
    """

    def __str__(self):
        return self.args[0]() if callable(self.args[0]) else super().__str__()


@dataclass(frozen=True)
class CheckpointPlan:
    """How a forward and backward pass is cut, and what that costs.

    Attributes:
        order: "layer_major" keeps the lower borders of all cells, "sequence_major" computes them again.
        layer_interval, sequence_interval: layers and tokens of a cell.
        offload: what crosses a border waits in host memory.
        predicted_peak_bytes: device memory over the weights and the gradients of parameters. predicted_host_bytes: with
            `offload`.
        recompute_factor: compute units over the 3 of a pass without recompute; 4/3 is one recompute.
        num_watched_tokens: of each row, those before the gradient horizon, which run once and keep nothing.
    """

    order: str
    layer_interval: int
    sequence_interval: int
    offload: bool
    predicted_peak_bytes: int = 0
    predicted_host_bytes: int = 0
    recompute_factor: float = 4 / 3
    num_watched_tokens: int = 0

    def __str__(self):
        host = f" and {format_bytes(self.predicted_host_bytes)} of host memory" if self.offload else ""
        return (
            f"{self.order}{' + offload' if self.offload else ''}, cells of {self.layer_interval} layers x "
            f"{self.sequence_interval} tokens: {format_bytes(self.predicted_peak_bytes)} of activations{host}, "
            f"{self.recompute_factor:.2f} x the compute of no checkpointing"
            + (f", without a gradient in the first {self.num_watched_tokens} tokens" if self.num_watched_tokens else "")
        )


@dataclass(frozen=True)
class CheckpointOptions:
    """What is asked of a plan: see `gradient_checkpointing_enable`. Any order goes with any axes, offload with all."""

    axes: tuple[str, ...] = AXES
    layer_interval: int | None = None
    sequence_interval: int | None = None
    order: str | None = None
    offload: bool = False
    memory_budget_bytes: float | None = None
    host_memory_budget_bytes: float | None = None
    gradient_horizon: int | None = None

    def check(self, num_layers):
        """Refuse nonsense for a model of so many layers.

        Raises:
            ValueError: says which option, what it was, and what it may be.
        """
        axes = self.axes
        if isinstance(axes, str) or not axes or not set(axes) <= set(AXES):
            raise ValueError(f"axes={axes!r} must be a non-empty selection of {AXES}")
        for name in ("layer_interval", "sequence_interval"):
            value = getattr(self, name)
            if value is not None and (not is_whole_number(value) or value < 1):
                raise ValueError(f"{name}={value!r} must be a positive integer, or None to let the planner decide")
        horizon = self.gradient_horizon
        if horizon is not None and (not is_whole_number(horizon) or horizon < 1):
            raise ValueError(f"gradient_horizon={horizon!r} must be a positive number of tokens, or None for all")
        if self.layer_interval is not None and self.layer_interval > num_layers:
            raise ValueError(f"layer_interval={self.layer_interval} is more than the model's {num_layers} layers")
        if "layer" not in axes and self.layer_interval not in (None, num_layers):
            raise ValueError(
                f"layer_interval={self.layer_interval} contradicts axes={tuple(axes)}, which keeps all {num_layers} "
                "layers in one cell: leave it out, or add 'layer' to axes"
            )
        if "sequence" not in axes and self.sequence_interval is not None:
            raise ValueError(
                f"sequence_interval={self.sequence_interval} contradicts axes={tuple(axes)}, which keeps all tokens in "
                "one cell: leave it out, or add 'sequence' to axes"
            )
        if self.order is not None and self.order not in ORDERS:
            raise ValueError(f"order={self.order!r} must be one of {ORDERS}, or None to let the planner decide")
        if not isinstance(self.offload, bool):
            raise ValueError(f"offload={self.offload!r} must be True or False")
        for name in ("memory_budget_bytes", "host_memory_budget_bytes"):
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, (int, float)) or not value > 0):
                raise ValueError(f"{name}={value!r} must be a positive number of bytes, or None for no bound")


def plan_checkpoints(
    config, batch_size, sequence_length, *, dtype_bytes=2, num_supervised_tokens=None, num_frames=0, trains_vision=True,
    scan_backend="torch", num_gradient_tokens=None, compute_bytes=None, **options,
):  # fmt: skip
    """The best plan for a batch of this shape.

    Without a memory budget: the least device memory at one recompute. With one: the least recompute that fits; among
    equals the least host memory, all of which goes there and back once; then the fewest time blocks, each of which
    costs a round of the states and smaller matrix products; then the least device memory. Where `offload` has no budget
    at all, host memory counts an eighth, or hundreds of GiB there would be taken to save the last one on the device.
    On the kernels cells so small that launches take longer than the work come last (see `Costs.slowdown`). The search
    is exact over all l and over s in multiples of the SSD chunk, and S itself.

    Args:
        config: `VideoMa2mbaConfig`, or whatever has its fields.
        batch_size, sequence_length: the batch as padded.
        dtype_bytes: of the weights and embeddings. compute_bytes: of what linear layers give, under autocast; None for
            the same.
        num_supervised_tokens: tokens of the batch with a loss; None for one chunk of the loss.
        num_frames: frames of the batch, 0 where embeddings are given. trains_vision: their tower trains.
        scan_backend: "torch" or "mamba_ssm", which keeps the scan's output too and works on longer segments.
        num_gradient_tokens: columns of the batch from the first that has a gradient on; None for `gradient_horizon`,
            as where only the end of a row is supervised. The plan cuts these; those before are watched.
        options: the fields of `CheckpointOptions`. axes=("layer",) means one time block and, unless it is given, l = 1;
            ("sequence",) means l = L. A given interval, order or offload is kept.

    Raises:
        ValueError: nonsense, or a sequence_interval above sequence_length.
        InfeasibleMemoryBudget: no plan fits.
    """
    asked = CheckpointOptions(**options)
    asked.check(config.text_config.num_hidden_layers)
    costs = Costs(
        config, batch_size, sequence_length, dtype_bytes, num_supervised_tokens, num_frames, trains_vision,
        scan_backend, asked.gradient_horizon if num_gradient_tokens is None else num_gradient_tokens, compute_bytes,
    )  # fmt: skip
    if (interval := asked.sequence_interval) is not None:
        if interval > sequence_length:
            raise ValueError(
                f"sequence_interval={interval} is more than the {sequence_length} tokens of the batch: s > S"
            )
        asked = replace(asked, sequence_interval=min(interval, costs.num_tokens))
    budget, host_budget = asked.memory_budget_bytes, asked.host_memory_budget_bytes
    best = None
    for candidate in _candidates(config, costs, asked):
        order, layers, tokens, _ = candidate
        host = costs.host_bytes(*candidate)
        if host_budget is not None and host > host_budget:
            continue
        peak, num_chunks = costs.peak_bytes(*candidate), -(-costs.num_tokens // tokens)
        units, slowdown = costs.units(order, layers), costs.slowdown(num_chunks)
        if budget is None:
            # one recompute is all that is asked for, unless the options given need more
            weighed = peak if host_budget is not None else peak + host / HOST_TO_DEVICE
            rank: tuple = (max(units, 4) * slowdown, weighed, num_chunks)
        elif peak <= budget:
            rank = (units * slowdown, host, num_chunks, peak)
        else:
            continue
        if best is None or rank < best[0]:
            best = rank, candidate
    if best is None:
        raise InfeasibleMemoryBudget(partial(_why_not, config, costs, asked))
    return plan_of(costs, *best[1])


def _candidates(config, costs, asked):
    """All (order, l, s, offload) that the options allow, less those which another one beats in every respect.

    For a given G, peak and host bytes and units never fall when l rises; for a given n, never when s rises. So of the l
    with the same G, and of the s with the same n, only the smallest is worth a look.
    """
    num_layers, S = config.text_config.num_hidden_layers, costs.num_tokens
    if "layer" not in asked.axes:
        intervals = [num_layers]
    elif asked.layer_interval is not None:
        intervals = [asked.layer_interval]
    elif "sequence" not in asked.axes:
        intervals = [1]
    else:
        intervals = smallest_intervals(num_layers, 1)
    if "sequence" not in asked.axes:
        chunks = [S]
    elif asked.sequence_interval is not None:
        chunks = [asked.sequence_interval]
    else:
        chunks = smallest_intervals(S, config.text_config.chunk_size)
    for layers in intervals:
        # with all layers in one cell both orders are the same
        default = ORDERS[::-1] if layers < num_layers else ("sequence_major",)
        for order in (asked.order,) if asked.order else default:
            for tokens in chunks:
                yield order, layers, tokens, asked.offload


def smallest_intervals(length, step):
    """For each number of pieces that multiples of `step` cut `length` into, the smallest piece; `length` at last."""
    intervals, interval = [], step
    while interval < length:
        intervals.append(interval)
        pieces = -(-length // interval)
        interval = step * -(-length // (step * (pieces - 1)))
    return [*intervals, length]


def plan_of(costs, order, layer_interval, sequence_interval, offload):
    """The plan that cuts a batch so."""
    cut = order, layer_interval, sequence_interval, offload
    units = (costs.num_watched + costs.num_tokens * costs.units(*cut[:2])) / costs.sequence_length
    return CheckpointPlan(*cut, costs.peak_bytes(*cut), costs.host_bytes(*cut), units / 3, costs.num_watched)


def _why_not(config, costs, asked):
    """What would fit instead."""
    budget, host_budget = asked.memory_budget_bytes, asked.host_memory_budget_bytes
    problem = f"no plan for {costs.batch_size} x {costs.sequence_length} tokens with the options given fits"
    if budget is not None:
        problem += f" {format_bytes(budget)} of activations"
    if host_budget is not None:
        problem += f"{' and' if budget is not None else ''} {format_bytes(host_budget)} of host memory"
    advice = []
    for offload in (asked.offload, True):
        wanted = replace(asked, offload=offload)
        found = [
            plan_of(costs, *candidate)
            for candidate in _candidates(config, costs, wanted)
            if host_budget is None or costs.host_bytes(*candidate) <= host_budget
        ]
        if found:
            plan = min(found, key=lambda plan: (plan.predicted_peak_bytes, plan.recompute_factor))
            advice.append(f"the smallest {'with' if offload else 'without'} offload is {plan}")
        else:
            host = min(costs.host_bytes(*candidate) for candidate in _candidates(config, costs, wanted))
            advice.append(f"with offload at least {format_bytes(host)} of host memory are needed")
    return f"{problem}; {'; '.join(dict.fromkeys(advice))}"


def peak_bytes_without(config, batch_size, sequence_length, **batch):
    """Device memory over weights and gradients of a pass without checkpointing."""
    return Costs(config, batch_size, sequence_length, **batch).peak_bytes_without()


def watching_bytes(config, batch_size, sequence_length, **batch):
    """Device memory over the weights where a video is watched and asked about; beyond one chunk it does not grow."""
    return Costs(config, batch_size, sequence_length, **batch).watching_bytes(sequence_length)


def pipeline_idle(plan, num_layers, ranks):
    """The part of a step in which each of the ranks that share a sequence is idle (see `sequence_parallel`).

    In `layer_major` order it is (R - 1) / (G + R - 1) for G layer blocks; else the ranks work one after the other.
    """
    blocks = -(-num_layers // plan.layer_interval) if plan is not None and plan.order == "layer_major" else 1
    return (ranks - 1) / (blocks + ranks - 1)


def format_bytes(num_bytes):
    """Bytes as people read them, in binary units.

    >>> format_bytes(10 * 2**30)
    '10.0 GiB'
    """
    for unit, size in (("TiB", 2**40), ("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if num_bytes >= size:
            return f"{num_bytes / size:.1f} {unit}"
    return f"{math.ceil(num_bytes)} bytes"
