"""Memory of training by checkpointing method and length: counted on the meta device, or measured.

By default the real executor runs at full size on the meta device, where tensors have shapes but no memory, and the
bytes of live storages are counted (see `counting`): a backbone of the paper in bfloat16, one sequence, the loss on its
last 512 tokens. "device_bytes" is the peak of all that is neither weights nor gradients of parameters. The executor
sums those in float32: "gradients_bytes", given apart, beside what they come to in bfloat16. With `--device cpu` or
`cuda` a small model trains for real under the stock Trainer, each point in a process of its own.
"""

import argparse
import gc
import json
import time
from functools import partial
from typing import Any

import torch

from ..files import new_figure, write_json, write_png
from ..loading import choose_device, natural, output_file, refuse
from ..modeling.checkpoint_plan import CheckpointPlan, peak_bytes_without, plan_checkpoints
from ..modeling.checkpoint_plan import smallest_intervals as possible_intervals
from ..modeling.checkpointing import run_checkpointed
from ..modeling.configuration_video_ma2mba import PRESETS, VideoMa2mbaConfig
from ..modeling.head_loss import head_loss
from ..modeling.mamba2 import Mamba2Backbone
from ..planning import fitting
from .counting import CountedHostStore, LiveBytes, counting

METHODS = (*fitting.METHODS, "sequence_major, two recomputes")
NUM_SUPERVISED = 512
HOST_BUDGET_BYTES = 128 * 2**30
BACKBONES = {"0.7b": "0.37B", "1.8b": "1.3B", "3.1b": "2.7B"}

# Video-Ma2mba (arXiv 2411.19460), table 3: GB = 1e9 bytes over weights and gradients, bf16, batch 1, one A100-80GB, at
# 2**10 tokens and each doubling of them.
PAPER_GB = {
    "0.7b": {
        "off": [0.9, 1.7, 3.3, 6.6, 13.3, 26.5, 52.9],
        "per layer": [0.4, 0.7, 1.3, 2.7, 5.5, 10.9, 21.9, 43.7],
        "sqrt": [0.2, 0.4, 0.8, 1.6, 3.1, 6.2, 12.3, 24.6, 49.3],
        "MA-GC": [0.3, 0.5, 0.6, 1.1, 1.6, 2.4, 3.8, 5.5, 8.8, 15.4, 23.1, 40.2],
    },
    "1.8b": {
        "off": [1.7, 3.3, 6.5, 13.1, 26.0, 52.1],
        "per layer": [0.7, 1.4, 2.7, 5.5, 10.9, 21.8, 43.5],
        "sqrt": [0.4, 0.8, 1.5, 3.1, 6.1, 12.1, 24.3, 48.5],
        "MA-GC": [0.5, 0.9, 1.2, 2.1, 3.7, 4.8, 7.4, 11.3, 17.7, 30.8, 45.8],
    },
    "3.1b": {
        "off": [2.7, 5.4, 10.7, 21.4, 42.6],
        "per layer": [1.1, 2.2, 4.4, 8.7, 17.4, 34.7, 69.3],
        "sqrt": [0.6, 1.1, 2.2, 4.4, 8.7, 17.3, 34.6, 69.3],
        "MA-GC": [0.7, 1.1, 1.8, 2.7, 4.2, 6.9, 10.5, 17.2, 25.9, 42.2],
    },
}
COLORS = dict(zip(METHODS, ["#555555", "#c0392b", "#e67e22", "#2471a3", "#7d3c98", "#1e8449", "#16a085"], strict=True))
PAPER_COLORS = {name: COLORS[name] for name in ("off", "per layer", "sqrt")} | {"MA-GC": "black"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", choices=["meta", "cpu", "cuda"], default="meta", help="meta: count (default)")
    parser.add_argument("--models", nargs="+", choices=PRESETS, default=list(PRESETS), help="what to count")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS), metavar="METHOD")
    parser.add_argument(
        "--lengths", nargs="+", type=natural, metavar="TOKENS", help="default: 2**10 ... 2**22 to count"
    )
    parser.add_argument("--resume", action="store_true", help="keep the rows that the file given with -o has")
    parser.add_argument(
        "--plot", type=output_file, metavar="PNG", help="draw memory against length, beside the paper's table 3"
    )


def run(args: argparse.Namespace) -> dict[str, Any]:
    output = getattr(args, "output", None)
    if args.resume and output is None:
        raise ValueError("--resume needs the file to go on with: name it with -o")
    if args.device != "meta":
        counted = {"models": list(PRESETS), "methods": list(METHODS), "plot": None, "resume": False}
        refuse(args, counted, f"of what is counted; with --device {args.device} leave it out")
        from . import resident

        return resident.measure(choose_device(args.device).type, args.lengths or [2**n for n in range(13, 17)])
    rows = json.loads(output.read_text())["rows"] if args.resume and output is not None and output.is_file() else []
    done = {(row["model"], row["method"], row["tokens"]) for row in rows}
    for num_tokens in args.lengths or [2**n for n in range(10, 23)]:
        for model in args.models:
            for method in args.methods:
                if (model, method, num_tokens) in done:
                    continue
                rows.append(count_row(model, method, num_tokens))
                if output is not None:
                    write_json(output, _result(rows))
    result = _result(rows)
    if args.plot is not None:
        write_png(args.plot, draw(result))
    return result


def _result(rows: list[dict[str, Any]]) -> dict[str, Any]:
    places = {name: place for place, name in enumerate((*PRESETS, *METHODS))}
    return {
        "benchmark": "memory",
        "device": "meta",
        "dtype": "bfloat16",
        "batch_size": 1,
        "num_supervised_tokens": NUM_SUPERVISED,
        "host_budget_bytes": HOST_BUDGET_BYTES,
        "torch": torch.__version__,
        "rows": sorted(rows, key=lambda row: (places[row["model"]], places[row["method"]], row["tokens"])),
    }


def choose_plan(config: VideoMa2mbaConfig, method: str, num_tokens: int, budget_bytes: float) -> CheckpointPlan | None:
    """The plan of a method for one sequence; None for no checkpointing.

    The methods without offload take the least memory. With offload, memory is what one allows: the fastest plan within
    `budget_bytes`, and `HOST_BUDGET_BYTES` of host memory.
    """
    options, num_layers = fitting.METHODS.get(method, {}), config.text_config.num_hidden_layers
    if options is None:
        return None
    plan = partial(plan_checkpoints, config, 1, num_tokens, num_supervised_tokens=min(num_tokens, NUM_SUPERVISED))
    if method == "sequence_major, two recomputes":
        plans = [plan(order="sequence_major", layer_interval=n) for n in possible_intervals(num_layers, 1)]
        return min(plans, key=lambda plan: plan.predicted_peak_bytes)
    if method == "sequence_major":
        options = {**options, "layer_interval": num_layers}
    if options.get("offload"):
        options = {**options, "memory_budget_bytes": budget_bytes, "host_memory_budget_bytes": HOST_BUDGET_BYTES}
    return plan(**options)


def count_row(model: str, method: str, num_tokens: int) -> dict[str, Any]:
    """One cell of the table. The budget with offload is what the paper's MA-GC takes at 2**16 tokens."""
    begin = time.perf_counter()
    config = VideoMa2mbaConfig.from_preset(model)
    budget_bytes = PAPER_GB[model]["MA-GC"][6] * 1e9
    plan = choose_plan(config, method, num_tokens, budget_bytes)
    batch = {"num_supervised_tokens": min(num_tokens, NUM_SUPERVISED)}
    predicted_bytes = plan.predicted_peak_bytes if plan else peak_bytes_without(config, 1, num_tokens, **batch)
    counter = count(config, plan, num_tokens)
    return {
        "model": model,
        "method": method,
        "tokens": num_tokens,
        "order": plan and plan.order,
        "layer_interval": plan and plan.layer_interval,
        "sequence_interval": plan and plan.sequence_interval,
        "compute_units": 3 * plan.recompute_factor if plan else 3.0,
        "device_bytes": counter.peak["device"],
        "host_bytes": counter.peak["host"],
        "predicted_device_bytes": predicted_bytes,
        "predicted_host_bytes": plan.predicted_host_bytes if plan else 0,
        "weights_bytes": counter.peak["weights"],
        "gradients_bytes": counter.peak["gradients"],
        "gradients_bytes_in_bfloat16": counter.peak["weights"],  # all weights train
        "seconds": round(time.perf_counter() - begin, 1),
    }


def count(
    config: VideoMa2mbaConfig,
    plan: CheckpointPlan | None,
    num_tokens: int,
    batch_size: int = 1,
    dtype: torch.dtype = torch.bfloat16,
    stand_in: bool = True,
    num_batches: int = 1,
) -> LiveBytes:
    """Count forward and backward passes of the backbone and the loss, whose gradients accumulate.

    Args:
        plan: None for no checkpointing.
        stand_in: see `counting`.
    """
    counter, offload = LiveBytes(), plan is not None and plan.offload
    with torch.device("meta"):
        backbone = Mamba2Backbone(config.text_config, config.prefill_chunk_size).train()
    for name, parameter in backbone.named_parameters():
        if not name.endswith(("A_log", "mixer.D", "dt_bias")):
            parameter.data = parameter.data.to(dtype)
        counter.count(parameter, "weights")
        # what autograd accumulates by itself
        parameter.register_post_accumulate_grad_hook(lambda param: counter.count_as(param.grad, "gradients"))
    num_kept = min(num_tokens, NUM_SUPERVISED)
    keep = torch.full((batch_size, num_tokens - (plan.num_watched_tokens if plan is not None else 0)), -1)
    keep[:, -num_kept:] = torch.arange(batch_size * num_kept).view(batch_size, num_kept)

    # no cycle may keep a tensor beyond its time: counted is what reference counts free
    gc.collect()
    with counting(counter, offload, stand_in):
        for _ in range(num_batches):
            _pass(config, backbone, counter, plan, (batch_size, num_tokens), dtype, keep)
    assert counter.live["gradients"] == counter.live["weights"], "a parameter went without its gradient"
    return counter


def _pass(
    config: VideoMa2mbaConfig, backbone: Mamba2Backbone, counter: LiveBytes, plan: CheckpointPlan | None,
    shape: tuple[int, int], dtype: torch.dtype, keep: torch.Tensor,
) -> None:  # fmt: skip
    (batch_size, num_tokens), offload = shape, plan is not None and plan.offload
    cache: Any
    watched, num_kept = num_tokens - keep.shape[1], min(num_tokens, NUM_SUPERVISED)
    cache, width = backbone.new_cache(batch_size), config.text_config.hidden_size
    for start in range(0, watched, config.prefill_chunk_size):
        length = min(config.prefill_chunk_size, watched - start)
        with torch.no_grad():
            embeds = torch.empty(batch_size, length, width, dtype=dtype, device="meta")
            backbone(embeds, cache, None, torch.arange(length).sub(length - 1).clamp(-1).expand(batch_size, -1))
            del embeds
    with counter.placing("host" if offload else "device"):
        size = batch_size, num_tokens - watched, width
        embeds = torch.empty(size, dtype=dtype, device="meta").requires_grad_()
    if plan is None:
        hidden_states = backbone(embeds, cache, None, keep)
    else:
        store = CountedHostStore(counter) if offload else None
        states, cache = cache.layers, None
        hidden_states, _ = run_checkpointed(backbone.layers, plan, embeds, states, None, keep, store)
        del states
        hidden_states = backbone.norm_f(hidden_states[None])[0]
    cache = _ = None  # training hands on no states
    targets = torch.empty(batch_size * num_kept, dtype=torch.int64, device="meta")
    head = torch.nn.Linear(
        backbone.embeddings.embedding_dim, backbone.embeddings.num_embeddings, bias=False, device="meta"
    )
    head.weight = backbone.embeddings.weight
    loss = head_loss(head, hidden_states, targets, config.loss_chunk_size)
    del hidden_states
    loss.backward()


def draw(result: dict[str, Any]) -> Any:
    """Device memory over weights and gradients against length, a panel for each model; the paper's table 3 dashed."""
    models = list(dict.fromkeys(row["model"] for row in result["rows"]))
    figure, panels = new_figure(5.2 * len(models), 5.4, 1, len(models), sharey=True)
    for panel, model in zip(panels, models, strict=True):
        for method in METHODS:
            rows = [row for row in result["rows"] if (row["model"], row["method"]) == (model, method)]
            sizes = [row["device_bytes"] / 1e9 for row in rows]
            panel.plot([row["tokens"] for row in rows], sizes, "o-", color=COLORS[method], markersize=3, label=method)
        for method, sizes in PAPER_GB[model].items():
            lengths = [2**n for n in range(10, 10 + len(sizes))]
            panel.plot(lengths, sizes, "--", color=PAPER_COLORS[method], linewidth=1, label=f"{method}, published")
        panel.axhline(80, color="#aaaaaa", linewidth=0.8)
        panel.annotate("80 GB", (2**10, 80), (0, 2), textcoords="offset points", color="#888888", fontsize=8)
        panel.set(xscale="log", yscale="log", title=f"Mamba-2 {BACKBONES[model]}", xlabel="tokens", ylim=(0.2, 6000))
        panel.set_xscale("log", base=2)
    panels[0].set_ylabel("GB over weights and gradients")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, fontsize=8, frameon=False)
    figure.suptitle(
        "Counted on the meta device, bfloat16, one sequence; with offload at most "
        f"{HOST_BUDGET_BYTES // 2**30} GiB of host memory; dashed: table 3 of arXiv 2411.19460",
        fontsize=9,
    )
    return figure
