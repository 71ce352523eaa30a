"""Figures of what the benchmarks found."""

from pathlib import Path
from typing import Any

from ..files import write_png
from .memory import BACKBONES, HOST_BUDGET_BYTES, METHODS, PAPER_GB

COLORS = dict(zip(METHODS, ["#555555", "#c0392b", "#e67e22", "#2471a3", "#7d3c98", "#1e8449", "#16a085"], strict=True))
PAPER_COLORS = {name: COLORS[name] for name in ("off", "per layer", "sqrt")} | {"MA-GC": "black"}


def plot_memory(result: dict[str, Any], path: Path) -> None:
    """Device memory over weights and gradients against length, a panel for each model; the paper's table 3 dashed."""
    from matplotlib.figure import Figure

    models = list(dict.fromkeys(row["model"] for row in result["rows"]))
    figure = Figure(figsize=(5.2 * len(models), 5.4), layout="constrained")
    panels = figure.subplots(1, len(models), sharey=True, squeeze=False)[0]
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
        panel.grid(alpha=0.25)
    panels[0].set_ylabel("GB over weights and gradients")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, fontsize=8, frameon=False)
    figure.suptitle(
        "Counted on the meta device, bfloat16, one sequence; with offload at most "
        f"{HOST_BUDGET_BYTES // 2**30} GiB of host memory; dashed: table 3 of arXiv 2411.19460",
        fontsize=9,
    )
    write_png(path, figure)
