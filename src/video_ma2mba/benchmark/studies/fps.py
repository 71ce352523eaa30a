"""Which frames are worth their bytes: 0.5, 1 and 2 FPS, and every frame against 8, 16 and 32 of them.

The backbones of the study `backbone` are asked about videos of which they see more or less. What a backbone keeps of
them is its memory: states of one size for Mamba-2, keys and values of every frame for attention. At an hour, longer
than they were trained for, the published tiny model, which was trained to remember, stands for Mamba-2.
"""

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from ...data.synthetic import QUESTION_KINDS, Story, make_story
from ...files import new_figure
from ...modeling.video_memory import VideoMemory
from .backbone import NAMES, memory_bytes, trained
from .stories import SEEDS, Stories, shares

LENGTHS_S, HOUR_S = (48, 120), 3600
RATES = (0.5, 1.0, 2.0)
SPREAD = (8, 16, 32)


def run(scale: float, keep: Path) -> dict[str, Any]:
    stories = Stories()
    models = trained(stories, scale, keep)
    num_stories = max(2, round(40 * scale))
    rows = []
    for video_s in LENGTHS_S:
        samples = {f"{rate:g} FPS": partial(Story.frames, fps=rate) for rate in RATES}
        samples |= {f"{count} frames": partial(spread, count=count) for count in SPREAD}
        for label, sample in samples.items():
            count = int(label.split()[0]) if label.endswith("frames") else round(video_s * float(label.split()[0]))
            for name in NAMES:
                accuracy = stories.accuracy(models[name], video_s, num_stories, sample)
                num_bytes = memory_bytes(models[name], name, count)
                rows.append({
                    "video_s": video_s, "sample": label, "num_frames": count, "backbone": name,
                    "memory_bytes": num_bytes, "accuracy": accuracy,
                })  # fmt: skip
    hour_s = HOUR_S if scale == 1 else 60
    return {
        "num_stories": num_stories,
        "rows": rows,
        "same_memory": _same_memory(rows),
        "hour": _hour(stories, models["attention"], hour_s, num_stories),
    }


def _hour(stories: Stories, attention: Any, video_s: int, num_stories: int) -> dict[str, Any]:
    """The tiny model on every second of long videos; it and attention on as many frames as keys and values in as many
    bytes hold."""
    memory = VideoMemory(stories.tiny, stories.processor)
    num_bytes = memory.num_bytes
    count = min(num_bytes // memory_bytes(attention, "attention", 1), video_s)
    right: dict[str, list[list[bool]]] = {"every second": [], "few frames": []}
    rng = np.random.default_rng([2, video_s])
    for i in range(num_stories):
        story = make_story(SEEDS["test"] + i, video_s)
        asked = [story.question(kind, rng) for kind in QUESTION_KINDS]
        for name, frames in (("every second", story.frames()), ("few frames", spread(story, count))):
            seen = memory.copy()
            seen.push_frames(frames)
            answers = seen.ask([question.text for question in asked])
            right[name].append([a == q.answer for a, q in zip(answers, asked, strict=True)])
    accuracy = {name: shares(table) for name, table in right.items()}
    few = partial(spread, count=count)
    accuracy["attention, few frames"] = stories.accuracy(attention, video_s, num_stories, few)
    return {"video_s": video_s, "memory_bytes": num_bytes, "num_few_frames": count, "accuracy": accuracy}


def spread(story: Story, count: int) -> np.ndarray:
    """`count` frames, one from the middle of each of as many equal parts."""
    frames = list(story.iter_frames(None))
    places = ((np.arange(count) + 0.5) * len(frames) / count).astype(int)
    return np.stack([frames[place] for place in places])


def _same_memory(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """For every length: Mamba-2 on every second, against the most frames that attention keeps in as many bytes."""
    result = []
    for video_s in LENGTHS_S:
        ours = next(r for r in rows if (r["video_s"], r["backbone"], r["sample"]) == (video_s, "mamba2", "1 FPS"))
        attention = [r for r in rows if (r["video_s"], r["backbone"]) == (video_s, "attention")]
        within = [row for row in attention if row["memory_bytes"] <= ours["memory_bytes"]]
        best = {"mamba2": ours, "attention": max(within, key=lambda row: row["accuracy"]["all"])}
        kept = ("sample", "memory_bytes", "accuracy")
        result.append({"video_s": video_s, **{name: {key: row[key] for key in kept} for name, row in best.items()}})
    return result


def draw(result: dict[str, Any]) -> Any:
    figure, panels = new_figure(11, 4.6, 1, len(LENGTHS_S), sharey=True)
    for panel, video_s in zip(panels, LENGTHS_S, strict=True):
        for name, marker, color in (("mamba2", "o", "tab:blue"), ("attention", "s", "tab:orange")):
            rows = [row for row in result["rows"] if (row["video_s"], row["backbone"]) == (video_s, name)]
            rows.sort(key=lambda row: row["num_frames"])
            sizes, scores = [row["memory_bytes"] / 2**10 for row in rows], [row["accuracy"]["all"] for row in rows]
            panel.plot(sizes, scores, f"{marker}-", color=color, linewidth=0.6, label=NAMES[name])
            for row, size, score in zip(rows, sizes, scores, strict=True):
                panel.annotate(row["sample"], (size, score), (5, -3), textcoords="offset points", fontsize=7)
        panel.set(title=f"videos of {video_s} s", xlabel="KiB that the memory of the video takes", xscale="log")
        sizes = sorted({row["memory_bytes"] / 2**10 for row in result["rows"] if row["video_s"] == video_s})
        panel.set_xticks(sizes, [f"{size:.0f}" for size in sizes])
        panel.minorticks_off()
        panel.legend()
    panels[0].set_ylabel("accuracy")
    return figure
