"""Two thousand steps of one model, with checkpointing and without: losses, gradient norms, how the weights part.

Checkpointing sums the same numbers in another order, so weights differ in their last bits after a step, and training
makes more of that. What it would make of any such difference shows a third run, without checkpointing, whose weights
begin one rounding away.
"""

import copy
from pathlib import Path
from typing import Any

import torch

from ...files import new_figure
from .backbone import build
from .side_by_side import shortened, train_side_by_side
from .stories import Stories

STEPS, BATCH_SIZE, EVERY = 2000, 4, 20
CHECKPOINTING = {"layer_interval": 2, "sequence_interval": 64, "order": "layer_major"}


def run(scale: float, keep: Path) -> dict[str, Any]:
    stories = Stories()
    steps = shortened(STEPS, scale)
    models = {"off": build("mamba2", stories)}
    models["on"] = copy.deepcopy(models["off"])
    models["on"].gradient_checkpointing_enable(**CHECKPOINTING)
    models["nudged"] = copy.deepcopy(models["off"])
    _nudge(models["nudged"])
    losses: dict[str, list[float]] = {name: [] for name in models}
    norms: dict[str, list[float]] = {name: [] for name in models}
    parted: list[dict[str, float]] = []
    batches = (stories.training_batch(step, 4, 40, BATCH_SIZE) for step in range(steps))
    for step, found in enumerate(train_side_by_side(models, steps, batches)):
        for name, (loss, norm) in found.items():
            losses[name].append(loss)
            norms[name].append(norm)
        if step % EVERY == EVERY - 1 or step == 0:
            distances = {name: _distance(models[name], models["off"]) for name in ("on", "nudged")}
            parted.append({"step": step + 1, **distances})
    tail = max(1, steps // 10)
    return {
        "steps": steps,
        "checkpointing": CHECKPOINTING,
        "final_loss": {name: sum(values[-tail:]) / tail for name, values in losses.items()},
        "largest_gradient_norm": {name: max(values) for name, values in norms.items()},
        "loss": {name: [round(value, 5) for value in values] for name, values in losses.items()},
        "gradient_norm": {name: [round(value, 5) for value in values] for name, values in norms.items()},
        "weights": parted,
    }


@torch.no_grad()
def _nudge(model: torch.nn.Module) -> None:
    """Move every trained weight by one rounding, up or down by chance."""
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if parameter.requires_grad:
            up = torch.rand(parameter.shape, generator=generator) < 0.5
            target = torch.where(up, torch.inf, -torch.inf)
            parameter.copy_(torch.nextafter(parameter, target))


@torch.no_grad()
def _distance(one: torch.nn.Module, other: torch.nn.Module) -> float:
    """The length of the difference of the trained weights over their length."""
    ones, others = ([p.double() for p in model.parameters() if p.requires_grad] for model in (one, other))
    difference = sum(((a - b) ** 2).sum() for a, b in zip(ones, others, strict=True))
    return float((difference / sum((b**2).sum() for b in others)) ** 0.5)


def draw(result: dict[str, Any]) -> Any:
    figure, panels = new_figure(12, 3.8, 1, 3)
    labels = {"off": "checkpointing off", "on": "checkpointing on", "nudged": "off, begun one rounding away"}
    colors = {"off": "tab:blue", "on": "tab:orange", "nudged": "tab:green"}
    for panel, key in zip(panels, ("loss", "gradient_norm"), strict=False):
        for name, label in labels.items():
            values = result[key][name]
            width = max(1, len(values) // 100)
            means = [sum(values[i : i + width]) / len(values[i : i + width]) for i in range(0, len(values), width)]
            panel.plot([i * width for i in range(len(means))], means, label=label, color=colors[name])
        panel.set(title=key.replace("_", " "), xlabel="step", yscale="log")
        panel.legend(fontsize=7)
    for name in ("on", "nudged"):
        rows = [row for row in result["weights"] if row[name] > 0]
        panels[2].plot([r["step"] for r in rows], [r[name] for r in rows], label=labels[name], color=colors[name])
    panels[2].set(title="weights: distance from off, relative", xlabel="step", yscale="log")
    panels[2].legend(fontsize=7)
    return figure
