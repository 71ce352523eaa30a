"""MA-GC over its intervals: bytes counted on the meta device, seconds measured, the planner's choice among them."""

import statistics
from argparse import Namespace
from pathlib import Path
from typing import Any

import torch

from ...files import new_figure
from ..memory import count
from ..train import make_model, random_text, training_step

NUM_TOKENS = 4096
LAYER_INTERVALS, SEQUENCE_INTERVALS = (1, 2, 4, 8), (256, 512, 1024, 2048)
ORDERS = ("layer_major", "sequence_major")


def run(scale: float, keep: Path) -> dict[str, Any]:
    model = make_model(Namespace(model="small", device="cpu", dtype="float32"))
    config = model.config
    tokens, repeats = (NUM_TOKENS, 2) if scale == 1 else (256, 1)
    ids, labels = random_text(tokens, 64)
    intervals = [s for s in SEQUENCE_INTERVALS if s <= tokens]
    layer_intervals = LAYER_INTERVALS if scale == 1 else LAYER_INTERVALS[1::2]

    def measured() -> float:
        training_step(model, ids, labels)
        return statistics.median(training_step(model, ids, labels)[0] for _ in range(repeats))

    off_s = measured()
    rows = []
    for order in ORDERS:
        for layers in layer_intervals:
            for interval in intervals:
                options = {"order": order, "layer_interval": layers, "sequence_interval": interval}
                rows.append(_row(model, config, tokens, options, measured))
    chosen = _row(model, config, tokens, {}, measured)
    model.gradient_checkpointing_disable()
    counted_off = count(config, None, tokens, dtype=torch.float32).peak["device"]
    return {
        "tokens": tokens,
        "num_layers": config.text_config.num_hidden_layers,
        "off": {"seconds": off_s, "bytes": counted_off},
        "rows": rows,
        "chosen": chosen,
    }


def _row(model: Any, config: Any, tokens: int, options: dict[str, Any], measured: Any) -> dict[str, Any]:
    model.gradient_checkpointing_enable(**options)
    plan = model.checkpoint_plan(1, tokens)
    return {
        "order": plan.order,
        "layer_interval": plan.layer_interval,
        "sequence_interval": plan.sequence_interval,
        "bytes": count(config, plan, tokens, dtype=torch.float32).peak["device"],
        "recompute_factor": plan.recompute_factor,
        "seconds": measured(),
    }


def draw(result: dict[str, Any]) -> Any:
    figure, panels = new_figure(12, 4.6, 1, 3, grid=False)
    intervals = sorted({row["sequence_interval"] for row in result["rows"]})
    layers = sorted({row["layer_interval"] for row in result["rows"]})
    chosen, off = result["chosen"], result["off"]
    for panel, order in zip(panels, ORDERS, strict=False):
        table = {(r["layer_interval"], r["sequence_interval"]): r for r in result["rows"] if r["order"] == order}
        values = [[table[layer, interval]["bytes"] / 2**20 for interval in intervals] for layer in layers]
        panel.imshow(values, cmap="viridis_r", aspect="auto")
        for y, layer in enumerate(layers):
            for x, interval in enumerate(intervals):
                row = table[layer, interval]
                text = f"{row['bytes'] / 2**20:.0f} MiB\n{row['seconds'] / off['seconds']:.2f} x"
                dark = values[y][x] > (max(map(max, values)) + min(map(min, values))) / 2
                panel.text(x, y, text, ha="center", va="center", fontsize=7, color="white" if dark else "black")
        panel.set_xticks(range(len(intervals)), intervals)
        panel.set_yticks(range(len(layers)), layers)
        panel.set(title=order, xlabel="tokens of a cell", ylabel="layers of a cell")
    for order, marker in zip(ORDERS, ("s", "o"), strict=True):
        rows = [row for row in result["rows"] if row["order"] == order]
        seconds = [row["seconds"] / off["seconds"] for row in rows]
        panels[2].scatter(seconds, [row["bytes"] / 2**20 for row in rows], marker=marker, s=18, label=order)
    panels[2].scatter([1], [off["bytes"] / 2**20], marker="x", color="black", label="no checkpointing")
    label = f"planner: {chosen['order']}, {chosen['layer_interval']} x {chosen['sequence_interval']}"
    panels[2].scatter(
        [chosen["seconds"] / off["seconds"]], [chosen["bytes"] / 2**20], marker="*", s=150, color="red", label=label
    )
    panels[2].set(xlabel="time of a step over no checkpointing", ylabel="MiB of activations", yscale="log")
    panels[2].grid(alpha=0.3)
    panels[2].legend(fontsize=7)
    return figure
