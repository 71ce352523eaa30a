"""What `bench scan` compares: this library's scan, block, model and decode step, and the same of transformers' Mamba2.

Both sides of a pair have the same weights and inputs, and keep all activations for the backward pass.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.nn import functional as F
from transformers import Mamba2Config
from transformers.models.mamba2 import modeling_mamba2

from ..modeling.configuration_video_ma2mba import PRESETS, VideoMa2mbaConfig
from ..modeling.mamba2 import Mamba2Backbone, Mamba2Mixer, init_mamba2_weights
from ..modeling.recompute import keeping_activations, recompute_segments
from ..modeling.segment_sizes import SEGMENT
from ..modeling.ssd import ssd_scan
from ..modeling.ssd_kernels import scan_kernels

ROWS = ("scan", "block", "model", "decode")
SIZES = {"370m": "0.7b", "1.3b": "1.8b", "2.7b": "3.1b"}  # the backbones of these models
SCAN_NAMES = ("x", "dt", "A", "B", "C", "D", "state")
FLOAT32 = ("A_log", "D", "dt_bias")  # of our mixers, whatever the dtype


@dataclass
class Pair:
    """Two ways to one result.

    Attributes:
        ours: A function of `inputs`, whose results are tensors. theirs: By the chunk size of theirs.
        inputs: Tensors; those of a pass with gradients want them.
        names: Of the results and of the gradients, for what is compared.
        floor: Of a decode step, its products of a matrix and a vector and nothing else; None for other rows.
        peer: Whose they are.
    """

    ours: Callable
    theirs: dict[int, Callable]
    inputs: list[torch.Tensor]
    names: list[str]
    floor: Callable | None = None
    weights: list[torch.nn.Parameter] = field(default_factory=list)
    peer: str = "transformers"


def text_config(size: str, num_layers: int) -> Any:
    """The backbone's configuration of that size, "tiny" for a test, with so many layers."""
    if size == "tiny":
        return Mamba2Config(
            hidden_size=16, num_heads=4, head_dim=8, state_size=8, n_groups=1, expand=2, num_hidden_layers=num_layers,
            vocab_size=32, chunk_size=16, pad_token_id=0, bos_token_id=0, eos_token_id=0,
        )  # fmt: skip
    if SIZES[size] not in PRESETS:
        raise ValueError(f"no backbone of size {size!r}")
    config = VideoMa2mbaConfig.from_preset(SIZES[size]).text_config
    config.num_hidden_layers = num_layers
    return config


def make_pair(
    row: str, size: str, dtype: torch.dtype, tokens: int, layers: int, chunks: list[int], device: str, seed: int
) -> Pair:
    """One row of the benchmark.

    Args:
        row: Of `ROWS`, or "core". layers: Of "model" and "decode".
        chunks: Chunk sizes of theirs.
    """
    torch.manual_seed(seed)
    if row == "scan":
        return _scan_pair(text_config(size, 1), dtype, tokens, chunks, device)
    if row == "core":
        return _core_pair(text_config(size, 1), dtype, tokens, chunks, device)
    config = text_config(size, 1 if row == "block" else layers)
    ours = Mamba2Backbone(config, 10**9)
    for layer in ours.layers:
        init_mamba2_weights(layer.mixer, config)
    weights = ours.state_dict()
    ours = _cast(ours, dtype).to(device)

    def theirs(chunk: int) -> Any:
        config.chunk_size = chunk
        model = modeling_mamba2.Mamba2Model(config)
        model.load_state_dict(weights)
        return torch.nn.Module.to(model, device, dtype)

    peers = {chunk: theirs(chunk) for chunk in (chunks if row != "decode" else chunks[:1])}
    hidden = torch.randn(1, 1 if row == "decode" else tokens, config.hidden_size, device=device).to(dtype)
    if row == "decode":
        return _decode_pair(ours, peers, hidden)
    hidden.requires_grad_()
    state = ours.layers[0].mixer.new_state(1)

    @keeping_activations()
    def block(x):
        return (ours.layers[0](x, state)[0],)

    def their_way(peer: Any) -> Callable:
        if row == "block":
            return lambda x: (peer.layers[0](x),)
        return lambda x: (peer(inputs_embeds=x, use_cache=False)[0],)

    return Pair(
        block if row == "block" else lambda x: (ours(x, ours.new_cache(1)),),
        {chunk: their_way(peer) for chunk, peer in peers.items()},
        [hidden], ["out", "grad_hidden_states"], weights=list(ours.layers.parameters()),
    )  # fmt: skip


def _cast(module: Any, dtype: torch.dtype) -> Any:
    for name, parameter in module.named_parameters():
        if not name.endswith(FLOAT32):
            parameter.data = parameter.data.to(dtype)
    return module


def _scan_pair(config: Any, dtype: torch.dtype, tokens: int, chunks: list[int], device: str) -> Pair:
    h, p, n = config.num_heads, config.head_dim, config.state_size

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, device=device)

    inputs = [
        normal(1, tokens, h, p).to(dtype), F.softplus(normal(1, tokens, h) - 3), -torch.exp(normal(h)),
        normal(1, tokens, 1, n).to(dtype), normal(1, tokens, 1, n).to(dtype), normal(h), normal(1, h, p, n),
    ]  # fmt: skip

    @keeping_activations()
    def ours(x, dt, A, B, C, D, state):
        def segment(sequence, states, params):
            (x, dt, B, C), (A, D) = sequence, params
            y, new_state = ssd_scan(x.float(), dt, A, B.float(), C.float(), D, *states)
            return y.to(x.dtype), (new_state,)

        y, (state,), _ = recompute_segments(segment, SEGMENT, (x, dt, B, C), (state,), (A, D))
        return y, state

    scan = inspect.unwrap(modeling_mamba2.mamba2_chunk_scan)

    def theirs(chunk: int) -> Callable:
        def run_theirs(x, dt, A, B, C, D, state):
            return scan(x, dt, A, B, C, chunk, D=D, initial_states=state, return_final_states=True)

        return run_theirs

    names = ["y", "final_state", *(f"grad_{name}" for name in SCAN_NAMES)]
    return Pair(ours, {chunk: theirs(chunk) for chunk in chunks}, [t.requires_grad_() for t in inputs], names)


def _core_pair(config: Any, dtype: torch.dtype, tokens: int, chunks: list[int], device: str) -> Pair:
    """What lies between the projections; theirs starts the convolution from zeros, as ours does here."""
    mixer = Mamba2Mixer(config, "mamba_ssm")
    init_mamba2_weights(mixer, config)
    mixer = _cast(mixer, dtype).to(device)
    weights = (mixer.conv1d.weight, mixer.conv1d.bias, mixer.dt_bias, mixer.A_log, mixer.D, mixer.norm.weight)
    projected = torch.randn(1, tokens, mixer.shape.projection, device=device).to(dtype).requires_grad_()
    fused = scan_kernels().scan.mamba_split_conv1d_scan_combined

    def theirs(chunk: int) -> Callable:
        conv_weight, bias, dt_bias, A_log, D, norm_weight = weights
        return lambda x: (
            fused(
                x, conv_weight[:, 0], bias, dt_bias, -A_log.exp(), D, chunk, rmsnorm_weight=norm_weight,
                rmsnorm_eps=config.layer_norm_epsilon, headdim=config.head_dim, ngroups=config.n_groups,
                norm_before_gate=False,
            ),
        )  # fmt: skip

    return Pair(
        lambda x: (mixer._run_core(x, None, mixer.new_state(1), weights)[0],),
        {chunk: theirs(chunk) for chunk in chunks},
        [projected], ["out", "grad_projected"], weights=list(weights), peer="mamba_ssm",
    )  # fmt: skip


def _decode_pair(ours: Any, peers: dict[int, Any], token: torch.Tensor) -> Pair:
    """One token through all layers, after some that filled the states."""
    past = torch.randn(1, 8, token.shape[-1], device=token.device).to(token.dtype)
    named = "cache" if "cache" in inspect.signature(modeling_mamba2.Mamba2Model.forward).parameters else "cache_params"
    with torch.no_grad():
        cache = ours.new_cache(1)
        ours(past, cache)
    cache.own()  # as a decode loop does, and as theirs is: written in place

    def step(x):
        return (ours(x, cache),)

    def their_step(peer: Any) -> Callable:
        with torch.no_grad():
            their_cache = peer(inputs_embeds=past, use_cache=True)[named]
        return lambda x: (peer(inputs_embeds=x, use_cache=True, **{named: their_cache})[0],)

    products = [layer.mixer for layer in ours.layers]

    def floor(x):
        for mixer in products:
            y = F.linear(x, mixer.in_proj.weight)
            F.linear(y[..., : mixer.intermediate_size], mixer.out_proj.weight)
        return (x,)

    return Pair(step, {chunk: their_step(peer) for chunk, peer in peers.items()}, [token], ["out"], floor)
