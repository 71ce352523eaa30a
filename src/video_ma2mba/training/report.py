"""What a training run leaves to be read: `train_report.json`, and its loss as a picture."""

import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..files import write_json, write_png
from ..memory import peak_bytes
from .trainer import COUNTS

if TYPE_CHECKING:
    from .run import Prepared
    from .trainer import VideoMa2mbaTrainer


def write_report(
    output: Path, prepared: "Prepared", trainer: "VideoMa2mbaTrainer", before: float | None, after: float | None,
    wall_s: float,
) -> dict[str, Any]:  # fmt: skip
    """Write both files to `output`; returns the report."""
    history = trainer.state.log_history
    losses = [{"step": entry["step"], "loss": entry["loss"]} for entry in history if "loss" in entry]
    report = {
        "recipe": asdict(prepared.recipe),
        "steps": trainer.state.global_step,
        "epochs": trainer.state.epoch,
        "devices": trainer.args.world_size,
        "global_batch_size": trainer.get_total_train_batch_size(trainer.args),
        # from the log, which a resumed run inherits
        **{name: sum(entry.get(name, 0) for entry in history) for name in COUNTS},
        "held_out_loss": {"before": before, "after": after},
        "losses": losses,
        "wall_s": round(wall_s, 1),
        "peak_bytes": peak_bytes(trainer.args.device),
    }
    write_json(output / "train_report.json", report)
    if losses:
        try:
            plot_losses(losses, output / "loss.png")
        except ImportError:
            print("no picture of the loss: pip install matplotlib", file=sys.stderr)
    return report


def plot_losses(losses: list[dict[str, Any]], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    axes.plot([entry["step"] for entry in losses], [entry["loss"] for entry in losses])
    axes.set_xlabel("step")
    axes.set_ylabel("loss")
    axes.grid(alpha=0.3)
    write_png(path, figure)
