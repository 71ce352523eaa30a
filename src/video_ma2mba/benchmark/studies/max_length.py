"""The longest video that trains: by GPU memory, size, method and optimizer, as the planner has it."""

import itertools
from pathlib import Path
from typing import Any

from ...files import new_figure
from ...planning.fitting import METHODS, Case, load_config, longest_frames

GIB = 2**30
GPU_GIB = (16, 24, 48, 80, 141)
MODELS = ("0.7b", "1.8b", "3.1b")
OPTIMIZERS = ("adamw", "lora")
HOST_BYTES = 256 * GIB


def run(scale: float, keep: Path) -> dict[str, Any]:
    rows = []
    for model in MODELS if scale == 1 else MODELS[:1]:
        for optimizer in OPTIMIZERS:
            case = Case(load_config(model), gpu_bytes=0, host_bytes=HOST_BYTES, optimizer=optimizer)
            for gpu in GPU_GIB if scale == 1 else GPU_GIB[:1]:
                case.gpu_bytes = gpu * GIB
                for method, options in METHODS.items():
                    frames, bounded = longest_frames(case, options)
                    rows.append({
                        "model": model, "optimizer": optimizer, "gpu_gib": gpu, "method": method,
                        "hours": frames / 3600, "is_bound": bounded,
                    })  # fmt: skip
    return {"host_gib": HOST_BYTES // GIB, "fps": 1, "rows": rows}


def draw(result: dict[str, Any]) -> Any:
    models = list(dict.fromkeys(row["model"] for row in result["rows"]))
    figure, panels = new_figure(4.2 * len(models), 7, len(OPTIMIZERS), len(models), sharex=True, sharey=True)
    for panel, (optimizer, model) in zip(panels, itertools.product(OPTIMIZERS, models), strict=True):
        for method in METHODS:
            where = model, optimizer, method
            rows = [r for r in result["rows"] if (r["model"], r["optimizer"], r["method"]) == where and r["hours"] > 0]
            panel.plot([row["gpu_gib"] for row in rows], [row["hours"] for row in rows], "o-", label=method)
        panel.set(title=f"{model}, {optimizer}", xscale="log", yscale="log")
        panel.set(xlabel="GiB of GPU memory", ylabel="hours of video at 1 FPS")
        panel.set_xticks(GPU_GIB, GPU_GIB)
        panel.minorticks_off()
        panel.label_outer()
    panels[0].legend(fontsize=7)
    return figure
