"""Mamba-2 with its past in plain sight: layers that take states and hand on states.

The whole past of a layer is a `LayerState` of fixed size. The backbone is a loop of `run_layers` over chunks of tokens.
Parameter names are those of transformers' Mamba2, so that its checkpoints load.
"""

import math
from contextlib import nullcontext
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers import initialization as init
from transformers.activations import ACT2FN

from .autocast import autocast_dtype, autocast_to
from .checkpointing import run_checkpointed
from .host_copies import to_device
from .mamba2_cache import LayerState, Mamba2Cache, OwnLayerState
from .recompute import keeping_activations, recompute_segments, saved_as_recipe
from .run_layers import kept_tokens, run_layers
from .scan_backends import choose_backends, norm_on_kernels
from .segment_sizes import SCAN_CHUNK, SEGMENT
from .sharded_parameters import run_gathered, several_processes
from .ssd import causal_conv1d, ssd_scan, ssd_step, ssd_step_
from .ssd_kernels import CoreShape, kernel_core, kernel_rms_norm, kernel_step


class Mamba2RMSNorm(nn.Module):
    """Root-mean-square norm, computed in float32, given out in the dtype of the weight; saves its input alone."""

    def __init__(self, hidden_size, eps, scan_backend="auto"):
        super().__init__()
        self.scan_backend = scan_backend
        self.weight = nn.Parameter(torch.ones(hidden_size))
        self.variance_epsilon = eps

    def forward(self, hidden_states):
        """(batch, tokens, hidden) -> (batch, tokens, hidden)"""
        if norm_on_kernels(self.scan_backend, hidden_states.device, hidden_states.dtype, hidden_states.shape[-1]):
            return kernel_rms_norm(hidden_states, self.weight, self.variance_epsilon)

        def norm(sequence, states, params):
            x = sequence[0].to(torch.promote_types(sequence[0].dtype, torch.float32))
            x = F.rms_norm(x, x.shape[-1:], None, self.variance_epsilon)
            return params[0] * x.to(params[0].dtype), states

        if not torch.is_grad_enabled() and hidden_states.shape[1] <= SEGMENT:
            return norm((hidden_states,), (), (self.weight,))[0]
        segment = hidden_states.shape[1] if hidden_states.is_cuda else SEGMENT  # fused there: nothing to bound
        return recompute_segments(norm, segment, (hidden_states,), params=(self.weight,))[0]


class Mamba2RMSNormGated(nn.Module):
    """The weight of the norm at the end of a mixer, which computes it together with the scan.

    The mixer calls the module for the weight: so what wraps it, or brings its weight from elsewhere, acts.
    """

    def __init__(self, intermediate_size, eps):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(intermediate_size))
        self.variance_epsilon = eps

    def forward(self, hidden_states):
        """The weight, (intermediate,); of the mixer's input nothing is used."""
        return self.weight


class Mamba2Conv1d(nn.Conv1d):
    """The weights of a mixer's convolution, which continues from a state; called as `Mamba2RMSNormGated` is."""

    def forward(self, hidden_states):
        """weight (channels, 1, width), and bias (channels,) or None."""
        return self.weight, self.bias


class Mamba2Mixer(nn.Module):
    """in_proj -> causal convolution -> SSD scan -> gated norm -> out_proj, with states in and out.

    For the backward pass it keeps what in_proj gave and the incoming states, on the kernels also what the scan gave;
    the rest is computed again. The projections stay ordinary modules, so adapters and quantised layers may take their
    place.
    """

    def __init__(self, config, scan_backend="auto"):
        super().__init__()
        self.scan_backend, self.hidden_act = scan_backend, config.hidden_act
        self.shape = CoreShape(
            config.num_heads, config.head_dim, config.n_groups, config.state_size, config.chunk_size,
            tuple(config.time_step_limit), config.layer_norm_epsilon,
        )  # fmt: skip
        self.num_heads, self.head_dim = config.num_heads, config.head_dim
        self.n_groups, self.state_size = config.n_groups, config.state_size
        self.conv_kernel = config.conv_kernel
        self.intermediate_size = self.num_heads * self.head_dim
        self.conv_dim = self.intermediate_size + 2 * self.n_groups * self.state_size
        self.time_step_limit = tuple(config.time_step_limit)
        # Not as a module: it runs once per segment, and engines count on every process calling the same modules.
        self.activation = ACT2FN[config.hidden_act].forward

        projection_size = self.intermediate_size + self.conv_dim + self.num_heads  # gate, (x, B, C), dt
        self.in_proj = nn.Linear(config.hidden_size, projection_size, bias=config.use_bias)
        self.conv1d = Mamba2Conv1d(
            self.conv_dim, self.conv_dim, self.conv_kernel, groups=self.conv_dim, bias=config.use_conv_bias
        )
        # these three decide how fast the state decays: float32 whatever the dtype of the model
        self.dt_bias = nn.Parameter(torch.empty(self.num_heads, dtype=torch.float32))
        self.A_log = nn.Parameter(torch.empty(self.num_heads, dtype=torch.float32))
        self.D = nn.Parameter(torch.empty(self.num_heads, dtype=torch.float32))
        self.norm = Mamba2RMSNormGated(self.intermediate_size, config.layer_norm_epsilon)
        self.out_proj = nn.Linear(self.intermediate_size, config.hidden_size, bias=config.use_bias)

    def _apply(self, fn, recurse=True):
        """As in torch, which moves and casts this way; A_log, D and dt_bias never become narrower than float32."""

        def wide(tensor):
            moved = fn(tensor)
            if moved.dtype not in (torch.float16, torch.bfloat16) or moved.dtype == tensor.dtype:
                return moved
            return tensor.to(moved.device, torch.float32)

        if recurse:
            for child in self.children():
                child._apply(fn)
        return super()._apply(wide, recurse=False)

    def new_state(self, batch_size, device=None, dtype=None):
        """The state before the first token: zeros, in float32 or better.

        `device`, `dtype`: of the tokens; None for those of D, which may lie where nothing is computed.
        """
        where: Any = {
            "device": self.D.device if device is None else device,
            "dtype": torch.promote_types(self.D.dtype if dtype is None else dtype, torch.float32),
        }
        return LayerState(
            torch.zeros(batch_size, self.conv_kernel - 1, self.conv_dim, **where),
            torch.zeros(batch_size, self.num_heads, self.head_dim, self.state_size, **where),
        )

    def forward(self, hidden_states, state, mask=None):
        """
        Args:
            hidden_states: (batch, tokens, hidden).
            state: `LayerState` left by the tokens before.
            mask: (batch, tokens) bool, True for real tokens, which come first in each row; None if all are real.

        Returns:
            (batch, tokens, hidden) and the new `LayerState`.
        """
        projected = self.in_proj(hidden_states)  # (b, t, intermediate + conv_dim + heads)
        if type(self.conv1d) is not Mamba2Conv1d and hasattr(self.conv1d, "base_layer"):
            raise ValueError(
                "adapters on conv1d cannot act: the mixer takes its weights into the scan; leave conv1d out of "
                "target_modules, or train it whole with modules_to_save=['conv1d']"
            )
        params = (
            *self.conv1d(hidden_states), self.dt_bias, self.A_log, self.D, self.norm(hidden_states),
        )  # fmt: skip
        if projected.shape[1] == 1 and mask is None and not torch.is_grad_enabled():
            if not isinstance(state, OwnLayerState):
                state = LayerState(*(tensor.clone(memory_format=torch.contiguous_format) for tensor in state))
            return self.out_proj(self._step(projected, state, params)), state
        y, state, again = self._run_core(projected, mask, state, params)
        with saved_as_recipe(y, again):
            return self.out_proj(y), LayerState(*state)

    def backends(self, device, dtype):
        """The `Backends` that run what in_proj gives on this device in this dtype."""
        return choose_backends(self.scan_backend, device, dtype, self.shape, self.conv_kernel, self.hidden_act)

    def _run_core(self, projected, mask, state, params):
        """Everything between the projections, on the chosen backend: as `recompute_segments` gives it."""
        backends = self.backends(projected.device, projected.dtype)
        if backends.scan == "torch" or projected.shape[1] == 0:
            return recompute_segments(self._core, SEGMENT, (projected, mask), state, params)
        with autocast_to(projected.device.type, None):
            return kernel_core(self.shape, backends.conv, projected, mask, state, params)

    def _step(self, projected, state, params):
        """The core on one token, on the chosen backend; writes the states in place."""
        backends = self.backends(projected.device, projected.dtype)
        with autocast_to(projected.device.type, None):
            if backends.scan == "torch" or self.time_step_limit != (0.0, math.inf):
                return self._core_step(projected, state, params)
            return kernel_step(self.shape, backends.conv, projected, state, params)

    def _core_step(self, projected, state, params):
        """`_core` on one token, in place."""
        conv_state, ssm_state = state
        conv_weight, conv_bias, dt_bias, A_log, D, norm_weight = params
        b, wide, g = len(projected), ssm_state.dtype, self.n_groups
        gate, x_B_C, dt = (
            projected[:, 0].to(wide).split([self.intermediate_size, self.conv_dim, self.num_heads], dim=-1)
        )
        window = torch.cat([conv_state, x_B_C[:, None]], dim=1)
        conv_state.copy_(window[:, 1:])
        # weights that lie as the window does: a transposed view takes three times as long from some 32 rows on
        x_B_C = window.mul_(conv_weight[:, 0].T.to(wide).contiguous()).sum(1)
        x_B_C = self.activation(x_B_C if conv_bias is None else x_B_C.add_(conv_bias))
        x, B, C = x_B_C.split([self.intermediate_size] + [g * self.state_size] * 2, dim=-1)
        y = ssd_step_(
            x.view(b, 1, self.num_heads, self.head_dim),
            F.softplus(dt + dt_bias).clamp_(*self.time_step_limit)[:, None],
            -A_log.to(wide).exp(),
            B.view(b, 1, g, self.state_size),
            C.view(b, 1, g, self.state_size),
            D.to(wide),
            ssm_state,
        )
        y = F.rms_norm(
            (y.view(b, -1) * F.silu(gate)).view(b, g, -1), (self.intermediate_size // g,), None, self.shape.epsilon
        )
        return (y.view(b, 1, -1) * norm_weight).to(projected.dtype)

    def _core(self, sequence, states, params):
        """Everything between the projections, on one segment: (b, t, projection) -> (b, t, intermediate)."""
        projected, mask = sequence
        conv_state, ssm_state = states
        conv_weight, conv_bias, dt_bias, A_log, D, norm_weight = params
        b, t = projected.shape[:2]
        wide = ssm_state.dtype
        gate, x_B_C, dt = projected.split([self.intermediate_size, self.conv_dim, self.num_heads], dim=-1)

        x_B_C, conv_state = causal_conv1d(x_B_C, conv_weight[:, 0], conv_bias, conv_state, mask)
        x_B_C = self.activation(x_B_C).to(wide)
        x, B, C = x_B_C.split([self.intermediate_size] + [self.n_groups * self.state_size] * 2, dim=-1)
        dt = F.softplus(dt.to(wide) + dt_bias.to(wide)).clamp(*self.time_step_limit)
        if mask is not None:
            dt = dt * mask[..., None]

        scan = ssd_step if t == 1 else ssd_scan
        y, ssm_state = scan(
            x.view(b, t, self.num_heads, self.head_dim),
            dt,
            -A_log.to(wide).exp(),
            B.view(b, t, self.n_groups, self.state_size),
            C.view(b, t, self.n_groups, self.state_size),
            D.to(wide),
            ssm_state,
        )

        y = y.reshape(b, t, self.n_groups, -1) * F.silu(gate.to(wide)).view(b, t, self.n_groups, -1)
        y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + self.shape.epsilon)
        return (y.view(b, t, -1) * norm_weight.to(wide)).to(projected.dtype), (conv_state, ssm_state)


class Mamba2Block(nn.Module):
    """Pre-norm residual around a mixer: a `block(hidden_states, state, mask) -> hidden_states, state`."""

    def __init__(self, config, scan_backend="auto"):
        super().__init__()
        self.residual_in_fp32 = config.residual_in_fp32
        self.norm = Mamba2RMSNorm(config.hidden_size, config.layer_norm_epsilon, scan_backend)
        self.mixer = Mamba2Mixer(config, scan_backend)

    def forward(self, hidden_states, state, mask=None):
        """Arguments and results as `Mamba2Mixer.forward`; the residual stream is float32 if the config says so."""
        if self.residual_in_fp32:
            hidden_states = hidden_states.to(torch.promote_types(hidden_states.dtype, torch.float32))
        normed = self.norm(hidden_states)
        if (dtype := autocast_dtype(normed.device.type)) is not None:
            normed = normed.to(dtype)  # cast here, so that in_proj saves `normed` and no cast of it
        with saved_as_recipe(normed, lambda dtype=normed.dtype: self.norm(hidden_states).to(dtype)):
            mixed, state = self.mixer(normed, state, mask)
        return hidden_states + mixed, state


class Mamba2Backbone(nn.Module):
    """Embeddings, layers and final norm.

    Args:
        config: transformers' `Mamba2Config`.
        prefill_chunk_size: tokens that go through all layers at a time where no gradient is asked for.
        scan_backend: "auto", "torch" or "mamba_ssm"; see `scan_backends`.
    """

    def __init__(self, config, prefill_chunk_size, scan_backend="auto"):
        super().__init__()
        self.prefill_chunk_size = prefill_chunk_size
        self.neighbours: Any = None  # `SequenceGroup` that holds the tokens before and after, while it trains
        self.embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers: Any = nn.ModuleList([Mamba2Block(config, scan_backend) for _ in range(config.num_hidden_layers)])
        self.norm_f = Mamba2RMSNorm(config.hidden_size, config.layer_norm_epsilon, scan_backend)

    def new_cache(self, batch_size, device=None, dtype=None):
        """The `Mamba2Cache` before the first token; device and dtype as of `Mamba2Mixer.new_state`."""
        return Mamba2Cache([layer.mixer.new_state(batch_size, device, dtype) for layer in self.layers])

    def planned_tokens(self, num_tokens):
        """For how many tokens a checkpoint plan is made: those here, or of the longest span over all ranks."""
        return num_tokens if self.neighbours is None else self.neighbours.longest(num_tokens)

    def forward(
        self, inputs_embeds, cache, mask=None, keep=None, chunk_size=None, plan=None, every_layer=None, windows=None
    ):
        """
        Args:
            inputs_embeds: (batch, tokens, hidden).
            cache: `Mamba2Cache` left by the tokens before; it is moved on in place.
            mask: (batch, tokens) bool, real tokens first in each row; None if all are real.
            keep: (batch, tokens) int64 on the CPU, the row of the result that the token's hidden state becomes, -1 for
                none; None gives all of them out.
            chunk_size: tokens per step without gradient; None means `prefill_chunk_size`.
            plan: `CheckpointPlan` to carry out; None for no checkpointing.
            every_layer: list to which the hidden states of all tokens are added, layers + 1 entries: the embeddings,
                those after each layer, the last one after the final norm. Not with a plan, which keeps none of them.
            windows: `GradientWindows` of a plan, or None.

        Returns:
            (kept, hidden), or (batch, tokens, hidden) where `keep` is None: after the final norm.
        """
        if plan is not None:
            hidden_states, cache.layers = run_checkpointed(
                self.layers, plan, inputs_embeds, cache.layers, mask, keep, None, None, windows, self.neighbours
            )
        else:
            chunk_size = chunk_size or self.prefill_chunk_size
            hidden_states = self._loop(inputs_embeds, cache, mask, keep, chunk_size, every_layer)
        cache.advance(inputs_embeds.shape[1])
        normed = self.norm_f(hidden_states if keep is None else hidden_states[None]).view_as(hidden_states)
        if every_layer is not None:
            every_layer[-1] = normed if keep is None else self.norm_f(every_layer[-1])
        return normed

    def _loop(self, inputs_embeds, cache, mask, keep, chunk_size, every_layer=None):
        if not torch.is_grad_enabled():
            (hidden_states,) = run_gathered(
                self.layers, lambda: (self._chunks(inputs_embeds, cache, mask, keep, chunk_size, every_layer),)
            )
            return hidden_states
        with keeping_activations() if self._may_keep(inputs_embeds) else nullcontext():
            return self._loop_with_graph(inputs_embeds, cache, mask, keep, every_layer)

    def _may_keep(self, inputs_embeds):
        """Whether autograd may keep all that the layers compute: on a CPU, where computing it again costs most.

        Only where it takes at most half of the memory that is free, and in float32, in which alone autograd sums the
        gradients of parameters without loss. Not where several processes train: each would decide for itself, and
        DeepSpeed adds up gradients in the order in which they come. Per token and layer it keeps in float32: what
        in_proj gave, three tensors as wide as the convolution, nine as wide as the scan, two rows of scores per head,
        two states per block of the scan, and two tensors as wide as the stream besides that itself.
        """
        dtype, device_type = inputs_embeds.dtype, inputs_embeds.device.type
        if several_processes() or device_type != "cpu":
            return False
        mixer = self.layers[0].mixer
        if autocast_dtype("cpu") or dtype != mixer.D.dtype or dtype.itemsize < 4:
            return False
        shape, hidden_size = mixer.shape, inputs_embeds.shape[2]
        numbers = shape.projection + 3 * shape.conv_dim + 9 * shape.inner + 2 * shape.num_heads * SCAN_CHUNK
        numbers += 2 * shape.inner * shape.state_size // SCAN_CHUNK + 3 * hidden_size
        num_bytes = inputs_embeds[..., 0].numel() * len(self.layers) * numbers * inputs_embeds.element_size()
        return num_bytes <= free_bytes() / 2

    def _loop_with_graph(self, inputs_embeds, cache, mask, keep, every_layer):
        num_tokens = inputs_embeds.shape[1]
        if self.neighbours is None:
            return self._chunks(inputs_embeds, cache, mask, keep, num_tokens, every_layer)

        def run_span(inputs_embeds):
            states = iter(self.neighbours.receive([tensor for state in cache.layers for tensor in state]))
            cache.layers = [LayerState(next(states), next(states)) for _ in self.layers]
            out = self._chunks(inputs_embeds, cache, mask, keep, num_tokens, every_layer)
            return (self.neighbours.send(out, [tensor for state in cache.layers for tensor in state]),)

        (hidden_states,) = run_gathered(self.layers, run_span, inputs_embeds)
        return hidden_states

    def _chunks(self, inputs_embeds, cache, mask, keep, step, every_layer):
        num_tokens = inputs_embeds.shape[1]
        kept, kept_rows, seen = [], [], []
        for start in range(0, num_tokens, step):
            span = slice(start, start + step)
            mask_here = None if mask is None else mask[:, span]
            hidden_states = inputs_embeds if step >= num_tokens else inputs_embeds[:, span]
            if every_layer is None:
                hidden_states, cache.layers = run_layers(self.layers, hidden_states, cache.layers, mask_here)
            else:
                entering, states = [hidden_states], []
                for block, state in zip(self.layers, cache.layers, strict=True):
                    hidden_states, new_states = run_layers([block], hidden_states, [state], mask_here)
                    entering.append(hidden_states)
                    states += new_states
                cache.layers = states
                seen.append(entering)
            if keep is not None:
                positions, rows = kept_tokens(keep, span)
                kept_rows.append(rows)
                hidden_states = hidden_states.flatten(0, 1)[to_device(positions, hidden_states.device)]
            kept.append(hidden_states)
        if every_layer is not None:
            every_layer += [_joined(chunks, dim=1) for chunks in zip(*seen, strict=True)]
        if keep is None:
            return _joined(kept, dim=1)
        return _joined(kept)[to_device(torch.cat(kept_rows).argsort(), inputs_embeds.device)]


def free_bytes():
    """Memory that Linux can give at once, what it holds of files among it; 0 on other systems."""
    try:
        with open("/proc/meminfo", encoding="ascii") as lines:
            return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        return 0


def _joined(chunks, dim=0):
    return chunks[0] if len(chunks) == 1 else torch.cat(chunks, dim=dim)


@torch.no_grad()
def init_mamba2_weights(module, config):
    """Initialise a `Mamba2Mixer` as its authors do: A in 1..heads, dt log-uniform, residual branches scaled down."""
    heads = torch.arange(1, module.num_heads + 1, dtype=torch.float32, device=module.A_log.device)
    init.copy_(module.A_log, heads.log())
    init.ones_(module.D)
    low, high = math.log(config.time_step_min), math.log(config.time_step_max)
    dt = torch.exp(torch.rand_like(heads) * (high - low) + low).clamp(min=config.time_step_floor)
    init.copy_(module.dt_bias, dt + torch.log(-torch.expm1(-dt)))  # the inverse of softplus
    init.kaiming_uniform_(module.conv1d.weight, a=math.sqrt(5))
    if module.conv1d.bias is not None:
        init.zeros_(module.conv1d.bias)
    bound = 1 / math.sqrt(
        module.intermediate_size * (config.num_hidden_layers if config.rescale_prenorm_residual else 1)
    )
    init.uniform_(module.out_proj.weight, -bound, bound)
