"""What Multi-Axis Gradient Checkpointing will cost, and which plan to take: plain Python, no torch.

Letters: L layers, S tokens, l layers and s tokens of a cell, n = ceil(S / s) time blocks, G = ceil(L / l) layer
blocks. A forward and backward pass without recompute takes 3 compute units: one forward, two backward. `layer_major`
and a cell of all layers take one unit more. `sequence_major` with l < L also computes the lower borders of each time
block again: one more forward pass of all layers but those of the last layer block.

Tokens before a gradient horizon take one unit, and the memory of a chunk that is watched; S is then the rest.

`peak_bytes` follows the executor (see `checkpointing`) to the few moments that can be its worst and adds up what lives
there. Weights, and the gradients of parameters summed in float32, are not in it.

On the kernels a layer takes a fixed number of launches, whatever the tokens: a cell of fewer tokens than the host can
launch for takes the time of one that has them, and plans are weighed so.
"""

import math
from dataclasses import dataclass, replace
from functools import partial

from .segment_sizes import KERNEL_SEGMENT, SCAN_CHUNK, SEGMENT

ORDERS = ("layer_major", "sequence_major")
AXES = ("layer", "sequence")
HOST_TO_DEVICE = 8  # machines have several times as much host memory as device memory
# Of a layer: forward, forward again and backward, on the kernels. The rest is of an H100: a launch, and products of
# matrices in bfloat16 and traffic of its memory as they are reached.
LAUNCHES, LAUNCH_S = 80, 6e-6
FLOPS_PER_S, BYTES_PER_S = 650e12, 3e12


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
            if value is not None and (not _is_int(value) or value < 1):
                raise ValueError(f"{name}={value!r} must be a positive integer, or None to let the planner decide")
        horizon = self.gradient_horizon
        if horizon is not None and (not _is_int(horizon) or horizon < 1):
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
    return costs.plan(*best[1])


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
            costs.plan(*candidate)
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


class Costs:
    """The cost model for a batch of one shape, in bytes."""

    def __init__(
        self,
        config,
        batch_size,
        sequence_length,
        dtype_bytes=2,
        num_supervised_tokens=None,
        num_frames=0,
        trains_vision=True,
        scan_backend="torch",
        num_gradient_tokens=None,
        compute_bytes=None,
    ):
        for name, value in (("batch_size", batch_size), ("sequence_length", sequence_length)):
            if not _is_int(value) or value < 1:
                raise ValueError(f"{name}={value!r} must be a positive integer")
        # e: of a number in weights and embeddings, c: in what linear layers give
        text, b, e, c = config.text_config, batch_size, dtype_bytes, compute_bytes or dtype_bytes
        self.config, self.batch_size, self.sequence_length = config, batch_size, sequence_length
        # the tokens that the plan cuts; those before are watched, a chunk at a time
        self.num_tokens = min(sequence_length, num_gradient_tokens or sequence_length)
        self.num_watched = sequence_length - self.num_tokens
        self.num_layers = text.num_hidden_layers
        heads, inner, wide = text.num_heads, text.num_heads * text.head_dim, max(4, e)
        conv_dim = inner + 2 * text.n_groups * text.state_size

        # --- per token -----------------------------------------------------------------------------------------------
        self.embedding = b * text.hidden_size * e
        # the residual stream between blocks, which a block's norm keeps
        self.stream = b * text.hidden_size * (wide if text.residual_in_fp32 else e)
        self.casts_embeddings = self.stream != self.embedding  # the first block keeps a cast of them
        # in_proj's output (gate, x, B, C, dt), which a mixer keeps
        self.projected = b * (inner + conv_dim + heads) * c
        self.inner = b * inner * c  # out_proj's input, not kept
        self.scanned = self.inner if scan_backend == "mamba_ssm" else 0  # the scan's output, which the kernels keep
        # While one layer goes back: the gradients of its output, of out_proj's input, and of in_proj's output. When
        # in_proj goes back, its input, computed again, and the gradient of that take no more room than these.
        self.going_back = self.stream + self.inner + self.projected
        # While one layer goes forward without a graph: its input, the normed input, in_proj's output, out_proj's input,
        # and its output
        self.going_forward = 2 * self.stream + self.embedding + self.projected + self.inner + self.scanned

        # --- per layer -----------------------------------------------------------------------------------------------
        ssm_state = b * inner * text.state_size * wide
        self.state = ssm_state + b * (text.conv_kernel - 1) * conv_dim * wide
        self._core_sizes = heads, b * wide, b * c, inner, conv_dim, ssm_state
        self._chunk_size = text.chunk_size
        self.segment, self._core, self.busy_tokens = SEGMENT, self._core_of_torch, 0.0
        if scan_backend == "mamba_ssm":
            self.segment, self._core = KERNEL_SEGMENT, self._core_of_kernels
            # of a cell, from which on its work takes longer than its launches
            products = 2 * b * text.hidden_size * (2 * inner + conv_dim + heads)
            traffic = 4 * (self.stream + self.projected) + 6 * self.inner + 2 * self.embedding
            self.busy_tokens = LAUNCHES * LAUNCH_S / (4 * (products / FLOPS_PER_S + traffic / BYTES_PER_S))
        self._core_of_a_segment = self._core(self.segment)

        # --- the ends of the model -----------------------------------------------------------------------------------
        # The loss: of the supervised tokens the hidden states before and after the final norm and their gradients; of
        # one chunk the logits three times in float32 (themselves, their log-softmax, their gradient), or once in the
        # dtype of the head beside the chunk's contribution to its gradient; the head's gradient in float32.
        supervised = b * sequence_length if num_supervised_tokens is None else num_supervised_tokens
        if num_supervised_tokens is None:
            supervised = min(supervised, config.loss_chunk_size)
        chunk = min(supervised, config.loss_chunk_size)
        vocab, head = text.vocab_size, text.vocab_size * text.hidden_size
        logits = chunk * vocab
        self.kept = supervised * text.hidden_size * (wide if text.residual_in_fp32 else e)  # their gradient stays
        self.loss = head * 4 + max(logits * 3 * 4, logits * c + head * c) + 2 * self.kept
        self.vision = _vision_bytes(config, num_frames, e, trains_vision)
        self.watching_vision = _vision_bytes(config, num_frames, e, trains=False)
        self.watching = self.watching_bytes(self.num_watched)

    def plan(self, order, layer_interval, sequence_interval, offload):
        cut = order, layer_interval, sequence_interval, offload
        units = (self.num_watched + self.num_tokens * self.units(*cut[:2])) / self.sequence_length
        return CheckpointPlan(*cut, self.peak_bytes(*cut), self.host_bytes(*cut), units / 3, self.num_watched)

    def core(self, num_tokens):
        """What the core of a mixer (convolution, scan, gated norm) takes for one segment: forward, and backward."""
        return self._core_of_a_segment if num_tokens >= self.segment else self._core(num_tokens)

    def _core_of_kernels(self, q):
        """Derived from the shapes that the kernels' wrappers allocate; not counted."""
        heads, wide, narrow, inner, conv_dim, ssm_state = self._core_sizes
        c = -(-q // self._chunk_size)
        conv = 3 * q * conv_dim * narrow  # its input beside the conv state, its output, and that after the activation
        states = c * ssm_state  # at the start of each chunk, float32
        scores = c * self._chunk_size**2 * wide
        steps = q * heads * wide
        forward = conv + 2 * states + scores + 2 * steps + q * inner * narrow
        # the states, their gradients before and after they are handed on, those of x, B and C, and the norm's two
        backward = conv + 3 * states + 2 * scores + 6 * steps + q * (conv_dim + 2 * inner) * narrow
        return forward, backward

    def _core_of_torch(self, q):
        heads, wide, narrow, inner, conv_dim, ssm_state = (
            self._core_sizes
        )  # wide and narrow: bytes of a batch of numbers
        c = -(-q // SCAN_CHUNK)  # blocks of the scan
        x = q * inner * wide  # a tensor like x, y or the gate
        scores = c * min(q, SCAN_CHUNK) ** 2 * heads * wide  # the matrix form inside the blocks
        conv = q * conv_dim * wide  # its output after the activation
        # Forward, worst where the scan gives its output: the states at the block starts and what each block adds, the
        # new state, a score matrix, and of tensors like x: x, x dt, the two halves of y, what they come from, the skip.
        forward = (2 * c + 1) * ssm_state + scores + conv + 7 * x
        # Backward, the worse of two moments: in the gated norm, with all that the scan keeps for its own backward pass,
        in_norm = (2 * c + 1) * ssm_state + (12 if narrow < wide else 11) * x
        # or in the hand-over of the states, with the gradients of all of them.
        in_states = 5 * c * ssm_state + 3 * x + q * self.inner
        both = 3 * scores + conv + 2 * q * conv_dim * narrow + q * self.inner + 8 * q * heads * wide
        return forward, both + max(in_norm, in_states)

    def watching_bytes(self, num_tokens):
        """What is watched goes through the tower and the layers a chunk at a time, with the states before and after."""
        chunk = min(num_tokens, self.config.prefill_chunk_size)
        if chunk == 0:
            return 0
        inner_states = (-(-chunk // self.segment) - 1) * self.state
        forward = max(chunk * self.going_forward + inner_states + self.core(chunk)[0], self.watching_vision)
        return chunk * self.embedding + 2 * self.num_layers * self.state + forward

    def slowdown(self, num_chunks):
        """By how much launches hold up a pass in so many time blocks: 1 where the GPU always has work."""
        return max(1.0, num_chunks * self.busy_tokens / self.num_tokens)

    def units(self, order, layer_interval):
        """Compute units of a forward and backward pass."""
        if order == "layer_major":
            return 4.0
        blocks = -(-self.num_layers // layer_interval)
        return 4 + (blocks - 1) * layer_interval / self.num_layers

    def host_bytes(self, order, layer_interval, sequence_interval, offload):
        """Host memory with `offload`: embeddings and their gradient, states at chunk borders, and lower borders."""
        if not offload:
            return 0
        L, S, n = self.num_layers, self.num_tokens, -(-self.num_tokens // sequence_interval)
        lower = (-(-L // layer_interval) - 1) * S * self.stream if order == "layer_major" else 0
        return 2 * S * self.embedding + n * L * self.state + lower

    def peak_bytes(self, order, layer_interval, sequence_interval, offload):
        """Device memory over weights and gradients: the worst of the moments in which the executor holds most.

        A last time or layer block that is shorter than the others counts as a whole one.
        """
        L, S, s = self.num_layers, self.num_tokens, sequence_interval
        n, G = -(-S // s), -(-L // layer_interval)
        keeps_lower = order == "layer_major"
        inner_states = (-(-s // self.segment) - 1) * self.state  # between the segments of the layer at work
        core_forward, core_backward = self.core(s)
        # A cell keeps its layers' streams and in_proj outputs and its final states; on top one layer goes back.
        cell = layer_interval * (s * (self.stream + self.projected + self.scanned) + self.state)
        cell += s * self.going_back + inner_states + core_backward + self.kept
        cell_of_first = cell + (s * self.stream if self.casts_embeddings else 0)
        lower_of_chunk = (G - 1) * s * self.stream
        forward = s * self.going_forward + inner_states + core_forward + self.kept
        states = L * self.state
        if offload:
            borders = s * self.embedding + states + (lower_of_chunk if keeps_lower else 0)
            # on the way forward the next time block's embeddings are being fetched
            entering = (1 + (n > 1)) * s * self.embedding
            moments = [entering + 2 * states + forward, self.loss, self.vision, self.watching]
            # The last time block, which goes back first: the next one's borders are being fetched; of the states it has
            # gradients only where they came from the layer blocks above. Then the one before it, which has them all.
            blocks = [(n > 1, 0, (L - layer_interval) * self.state)] + [(n > 2, states, states)] * (n > 1)
            for fetches, grads_at_last, grads_at_first in blocks:
                at_work = s * self.embedding + states + fetches * borders
                moments.append(at_work + grads_at_last + lower_of_chunk + cell)
                moments.append(at_work + grads_at_first + cell_of_first)
            return max(moments)
        # Embeddings and their gradient, and the states entering each time block
        kept = 2 * S * self.embedding + n * states
        # The last layer block of the last time block, with all lower borders
        moments = [kept + ((G - 1) * S * self.stream if keeps_lower else lower_of_chunk) + cell]
        # its first layer block, with those of the time blocks before, and the gradients of the states above
        before = (n - 1) * lower_of_chunk if keeps_lower else 0
        moments.append(kept + before + (L - layer_interval) * self.state + cell_of_first)
        moments.append(self.watching)
        # the end of the forward pass, and the loss: no gradient of the embeddings yet
        kept += (G - 1) * S * self.stream if keeps_lower else 0
        kept -= S * self.embedding
        return max(*moments, kept + states + forward, kept + self.loss, S * self.embedding + self.vision)

    def peak_bytes_without(self):
        """As `peak_bytes`, of a pass that keeps what all layers need."""
        S, L = self.num_tokens, self.num_layers
        of_a_layer = S * (self.stream + self.projected + self.scanned) + self.state
        kept = S * self.embedding + L * of_a_layer + S * self.stream
        inner_states = (-(-S // self.segment) - 1) * self.state
        back = S * self.going_back + inner_states + self.core(S)[1] + self.kept
        return max(kept + max(back, self.loss), 2 * S * self.embedding + self.vision)


def pipeline_idle(plan, num_layers, ranks):
    """The part of a step in which each of the ranks that share a sequence is idle (see `sequence_parallel`).

    In `layer_major` order it is (R - 1) / (G + R - 1) for G layer blocks; else the ranks work one after the other.
    """
    blocks = -(-num_layers // plan.layer_interval) if plan is not None and plan.order == "layer_major" else 1
    return (ranks - 1) / (blocks + ranks - 1)


def _vision_bytes(config, num_frames, e, trains):
    """What a micro-batch of frames takes; a tower that trains keeps the activations of all its layers."""
    frames = min(num_frames, config.vision_chunk_size)
    vision = config.vision_config
    tokens = frames * ((vision.image_size // vision.patch_size) ** 2 + 1)
    pixels = (
        frames * 3 * vision.image_size**2 * (4 + 4 + e)
    )  # on two steps of the normalisation, and in the tower's dtype
    # a layer keeps: two norm inputs, two norm outputs, q, k, v, the attention's output; and the wide activation twice
    layer = tokens * (8 * vision.hidden_size + 2 * vision.intermediate_size) * e
    return pixels + layer * (config.num_vision_layers if trains else 1)


def format_bytes(num_bytes):
    """Bytes as people read them, in binary units.

    >>> format_bytes(10 * 2**30)
    '10.0 GiB'
    """
    for unit, size in (("TiB", 2**40), ("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if num_bytes >= size:
            return f"{num_bytes / size:.1f} {unit}"
    return f"{math.ceil(num_bytes)} bytes"


def _is_int(value):
    return isinstance(value, int) and not isinstance(value, bool)
