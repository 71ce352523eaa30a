"""What a training run leaves to be read: `train_report.json`, and its loss as a picture."""

import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..files import new_figure, write_json, write_png
from ..planning.measured import peak_bytes
from .choices import Choice
from .recipe import Recipe
from .trainer import COUNTS, VideoMa2mbaTrainer


def write_report(
    output: Path, recipe: Recipe, choices: tuple[Choice, ...], trainer: VideoMa2mbaTrainer,
    evaluations: list[dict[str, Any]], after: dict[str, Any] | None, warnings: list[str], wall_s: float,
) -> dict[str, Any]:  # fmt: skip
    """Write both files to `output`; returns the report.

    Args:
        choices: What the recipe left open, and what it became.
        evaluations: Of the held-out data, by step.
        after: That of the model that is kept; None without such data.
        warnings: Of `held_out.advice`.
    """
    history = trainer.state.log_history
    losses = [{"step": entry["step"], "loss": entry["loss"]} for entry in history if "loss" in entry]
    report = {
        "recipe": asdict(recipe),
        "choices": {choice.key: choice.reason for choice in choices},
        "steps": trainer.state.global_step,
        "epochs": trainer.state.epoch,
        "devices": trainer.args.world_size,
        "global_batch_size": trainer.get_total_train_batch_size(trainer.args),
        # from the log, which a resumed run inherits
        **{name: sum(entry.get(name, 0) for entry in history) for name in COUNTS},
        "held_out_loss": {
            "before": evaluations[0]["loss"] if evaluations else None,
            "after": after["loss"] if after else None,
        },
        "held_out": evaluations,
        "kept_step": after["step"] if after else trainer.state.global_step,
        "warnings": warnings,
        "losses": losses,
        "wall_s": round(wall_s, 1),
        "peak_bytes": peak_bytes(trainer.args.device),
    }
    write_json(output / "train_report.json", report)
    if losses or evaluations:
        try:
            plot_losses(losses, evaluations, after, output / "loss.png")
        except ImportError:
            print("no picture of the loss: pip install matplotlib", file=sys.stderr)
    return report


def plot_losses(
    losses: list[dict[str, Any]], evaluations: list[dict[str, Any]], kept: dict[str, Any] | None, path: Path
) -> None:
    """Both curves with their points, and which of the held-out ones the model is."""
    figure, (axes,) = new_figure(7, 4)
    for name, entries, colour in (("training", losses, "tab:blue"), ("held out", evaluations, "tab:orange")):
        if entries:
            steps, values = ([entry[key] for entry in entries] for key in ("step", "loss"))
            axes.plot(steps, values, "o-", markersize=4, color=colour, label=name)
    if kept is not None:
        axes.plot(kept["step"], kept["loss"], "o", markersize=11, fillstyle="none", color="tab:orange")
        said = f", {kept['exact']:.0%} of held-out answers exact" if "exact" in kept else ""
        axes.set_title(f"model/ is step {kept['step']}: held-out loss {kept['loss']:.3g}{said}", fontsize=10)
    axes.set_ylim(bottom=0)
    axes.set(xlabel="step", ylabel="loss")
    if losses or evaluations:
        axes.legend()
    write_png(path, figure)
