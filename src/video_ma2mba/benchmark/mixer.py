"""The GPU half of `bench scan`: the core of a mixer, forward and backward, on the kernels.

Ours (convolution, scan and gated norm with both states in and out) against mamba_ssm's own fused function, which has no
convolution state, and against the mixer of the installed transformers, which has the projections besides: so ours is
timed both without and with its projections. All in one process, in turns, bfloat16.
"""

import argparse
import statistics
from typing import Any

import torch
from transformers import Mamba2Config
from transformers.models.mamba2.modeling_mamba2 import Mamba2Mixer as TheirMixer

from ..modeling.mamba2 import Mamba2Mixer, init_mamba2_weights
from ..modeling.ssd_kernels import scan_kernels
from ..planning.measured import peak_bytes, restart_peak
from .machine import describe


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Medians of `args.repeats` runs after one that is not timed, and the peak bytes above the inputs."""
    config = Mamba2Config(
        num_heads=args.heads, head_dim=args.head_dim, state_size=args.state, n_groups=1, expand=2,
        hidden_size=args.heads * args.head_dim // 2, chunk_size=args.their_chunk, num_hidden_layers=1,
    )  # fmt: skip
    torch.manual_seed(args.seed)
    mixer = Mamba2Mixer(config)
    init_mamba2_weights(mixer, config)
    weights = mixer.state_dict()
    mixer = _in_bfloat16(mixer)
    theirs = TheirMixer(config, layer_idx=0)
    theirs.load_state_dict(weights)
    theirs = _in_bfloat16(theirs)
    state = mixer.new_state(args.batch)
    hidden_states = torch.randn(args.batch, args.tokens, config.hidden_size, device="cuda", dtype=torch.bfloat16)
    projected = torch.randn(args.batch, args.tokens, mixer.shape.projection, device="cuda", dtype=torch.bfloat16)
    core = (mixer.conv1d.weight, mixer.conv1d.bias, mixer.dt_bias, mixer.A_log, mixer.D, mixer.norm.weight)
    fused = scan_kernels().scan.mamba_split_conv1d_scan_combined

    def run_fused(x):
        return fused(
            x, mixer.conv1d.weight[:, 0], mixer.conv1d.bias, mixer.dt_bias, -mixer.A_log.exp(), mixer.D,
            config.chunk_size, rmsnorm_weight=mixer.norm.weight, rmsnorm_eps=config.layer_norm_epsilon,
            headdim=args.head_dim, ngroups=1, norm_before_gate=False,
        )  # fmt: skip

    subjects = {
        "ours, core": (lambda x: mixer._run_core(x, None, state, core)[0], projected),
        "mamba_ssm, fused core": (run_fused, projected),
        "ours, mixer": (lambda x: mixer(x, state)[0], hidden_states),
        "transformers, mixer": (theirs, hidden_states),
    }
    times: dict[str, list[float]] = {name: [] for name in subjects}
    peaks, failures = {}, {}
    for turn in range(args.repeats + 1):
        for name, (function, inputs) in subjects.items():
            if name in failures:
                continue
            try:
                seconds, peak = _forward_backward(function, inputs)
            except Exception as error:  # a peer may need a package that is not here: the others are still measured
                failures[name] = f"{type(error).__name__}: {error}"[:500]
                continue
            if turn > 0:
                times[name].append(seconds)
                peaks[name] = peak
    rows = {
        name: {"median_s": statistics.median(times[name]), "peak_bytes": peaks[name]}
        for name in subjects
        if name not in failures
    }
    ratios = {}
    for mine, peer in (("ours, core", "mamba_ssm, fused core"), ("ours, mixer", "transformers, mixer")):
        if mine in rows and peer in rows:
            ratios[f"{mine} over {peer}"] = {key: rows[mine][key] / rows[peer][key] for key in rows[mine]}
    return {
        "benchmark": "scan",
        "what": "forward and backward, bfloat16, on the GPU",
        "shape": {name: getattr(args, name) for name in ("batch", "tokens", "heads", "head_dim", "state")},
        "backends": str(mixer.backends("cuda", torch.bfloat16)),
        "rows": rows,
        "ratios": ratios,
        "failures": failures,
        "machine": describe("cuda"),
    }


def _in_bfloat16(mixer: Any) -> Any:
    mixer = mixer.to("cuda")
    for name, parameter in mixer.named_parameters():
        if name not in ("A_log", "D", "dt_bias"):
            parameter.data = parameter.data.bfloat16()
    return mixer


def _forward_backward(function: Any, inputs: torch.Tensor) -> tuple[float, int]:
    inputs = inputs.detach().requires_grad_()
    torch.cuda.synchronize()
    before = restart_peak(inputs.device)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    y = function(inputs)
    y.backward(torch.ones_like(y))
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 1000, peak_bytes(inputs.device) - before
