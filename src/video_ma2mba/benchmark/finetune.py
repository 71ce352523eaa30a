"""Fine-tuning on a task of one's own by the defaults alone: the share of new clips answered right.

Each task has 30 clips of some seconds to train on and 24 others to be asked about; a seed draws the clips and seeds the
training. Three tasks are easy: two kinds of pictures, each in its own colours, told apart by yes or no. One is hard:
the answers are words that the tiny model has never said. How easy the pictures are is told without any model, by the
training clip whose mean picture is the nearest. The commands that run are those of the documentation: `data prepare`,
`train`, `eval --task own`.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from ..files import write_text
from ..loading import TINY_MODEL, find_model, seed_number
from ..processing.video_reader import read_frames
from .machine import describe

NUM_TRAIN, NUM_NEW = 30, 24
RATE = 5  # frames per second of a clip
# task: the question, and the answer for each of two kinds of pictures
TASKS = {
    "fractal": ("Is this a fractal?", {"fractal": "yes", "waves": "no"}),
    "stripes": ("Are these stripes?", {"stripes": "yes", "dots": "no"}),
    "cells": ("Are these cells?", {"dots": "no", "cells": "yes"}),
    "words": ("What is shown?", {"cells": "cells", "waves": "waves"}),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", default=str(TINY_MODEL), metavar="DIR", help="default: the tiny model")
    parser.add_argument("--recipes", nargs="+", default=["finetune-lora", "finetune"], metavar="RECIPE")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument(
        "--clips", type=Path, metavar="DIR", help="in place of tasks: train/ and held/ with clips and questions.jsonl"
    )
    parser.add_argument("--seeds", type=seed_number, nargs="+", default=[0, 1, 2])
    parser.add_argument("--set", dest="changes", action="append", default=[], metavar="KEY=VALUE", help="of the recipe")
    parser.add_argument("--stored", action="store_true", help="train from stored frames too, and compare the times")


def run(args: argparse.Namespace) -> dict[str, Any]:
    args.model = find_model(args.model)
    rows = []
    tasks = [args.clips.name] if args.clips else args.tasks
    with tempfile.TemporaryDirectory() as root:
        for task in tasks:
            for seed in args.seeds:
                clips = args.clips or draw_task(Path(root) / f"{task}-{seed}", task, seed)
                drawn = {"task": task, "seed": seed, "right_by_nearest_picture": round(nearest_picture(clips), 4)}
                for recipe in args.recipes:
                    work = Path(root) / f"{task}-{seed}-{recipe}"
                    rows.append({**drawn, **tune(clips, args, recipe, seed, work)})
                    print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
    return {"model": Path(args.model).name, "changes": args.changes, "runs": rows, "machine": describe("cpu")}


def tune(clips: Path, args: argparse.Namespace, recipe: str, seed: int, work: Path) -> dict[str, Any]:
    """Fine-tune on `clips`/train and ask about `clips`/held; returns what came of it."""
    work.mkdir(parents=True)

    def train(name: str, *options: object) -> dict[str, float]:
        data, source = work / f"data{name}", clips / "train"
        command("data", "prepare", source / "questions.jsonl", "--media-root", source, "-o", data, *options)
        values = [f"model={args.model}", f"data={data}", f"output={work / f'run{name}'}", f"seed={seed}", *args.changes]
        return command("train", recipe, *(word for value in values for word in ("--set", value)))

    train_s = train("")
    stored = {"from_stored": train("-stored", "--cache-frames", "raw", "--model", args.model)} if args.stored else {}
    trained = work / "run" / "model"
    tuned = [args.model, "--adapter", trained] if (trained / "adapter_config.json").is_file() else [trained]
    asked = ["--task", "own", "--data", clips / "held" / "questions.jsonl", "-o", work / "answers"]
    command("eval", *tuned, *asked)
    share = json.loads((work / "answers" / "report.json").read_text())["scores"]["all"]["mean"]
    report = json.loads((work / "run" / "train_report.json").read_text())
    return {
        "recipe": recipe,
        "right": round(share, 4),
        **{name: report[name] for name in ("steps", "kept_step", "held_out_loss")},
        **train_s,
        **stored,
        "warnings": report["warnings"],
    }


def command(*words: object) -> dict[str, float]:
    """One command of the library, in a process of its own; its seconds by the clock and of the processor.

    Raises:
        OSError: It failed; says what it printed.
    """
    start, line = os.times(), [sys.executable, "-P", "-m", "video_ma2mba.cli", *map(str, words)]
    done = subprocess.run(line, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode != 0:
        raise OSError(f"{' '.join(map(str, words))} failed:\n{done.stdout}")
    end = os.times()
    cpu_s = end.children_user + end.children_system - start.children_user - start.children_system
    return {"wall_s": round(end.elapsed - start.elapsed, 1), "cpu_s": round(cpu_s, 1)}


def nearest_picture(clips: Path) -> float:
    """The share of new clips whose answer is that of the training clip with the nearest mean picture of 32 x 32."""

    def read(folder: Path) -> tuple[np.ndarray, list[str]]:
        lines = [json.loads(line) for line in (folder / "questions.jsonl").read_text().splitlines()]
        pictures = [
            np.mean([frame.pixels for frame in read_frames(folder / line["video"], 1.0, resize=(32, 32))], axis=0)
            for line in lines
        ]
        return np.stack(pictures).reshape(len(lines), -1), [line["answer"] for line in lines]

    (known, answers), (new, wanted) = read(clips / "train"), read(clips / "held")
    nearest = np.square(new[:, None] - known).sum(-1).argmin(1)
    return float(np.mean([answers[place] == answer for place, answer in zip(nearest, wanted, strict=True)]))


# --- clips ------------------------------------------------------------------------------------------------------------


def draw_task(folder: Path, task: str, seed: int) -> Path:
    """`folder`/train and `folder`/held with clips and questions.jsonl; returns the folder."""
    question, answers = TASKS[task]
    kinds = list(answers)
    rng = np.random.default_rng([seed, list(TASKS).index(task)])
    colours = {kind: draw_colours(rng) for kind in kinds}
    for name, num in (("train", NUM_TRAIN), ("held", NUM_NEW)):
        (folder / name).mkdir(parents=True)
        lines = []
        for number, kind in enumerate(rng.permutation(kinds * (num // 2)).tolist()):
            write_clip(folder / name / f"{number:02}.mp4", kind, colours[kind] + rng.normal(0, 12, (2, 3)), rng)
            lines.append({"video": f"{number:02}.mp4", "question": question, "answer": answers[kind]})
        write_text(folder / name / "questions.jsonl", "".join(json.dumps(line) + "\n" for line in lines))
    return folder


def draw_colours(rng: np.random.Generator) -> np.ndarray:
    """Two that are far enough apart. (2, 3)"""
    colours = rng.uniform(0, 255, (2, 3))
    if np.abs(colours[1] - colours[0]).sum() < 200:
        colours[1] = np.where(colours[0] < 128, 255, 0)
    return colours


def write_clip(path: Path, kind: str, colours: np.ndarray, rng: np.random.Generator) -> None:
    """A clip of 5 to 12 seconds, of its own size, place and motion."""
    import av

    height, width = (2 * int(n) for n in rng.integers(90, 160, 2))
    parameters = rng.uniform(0, 1, 40)
    y, x = np.mgrid[-1 : 1 : height * 1j, -width / height : width / height : width * 1j]
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=RATE)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        stream.options = {"preset": "ultrafast", "crf": "23"}
        for number in range(RATE * int(rng.integers(5, 13))):
            shade = np.clip(KINDS[kind](x, y, number / RATE, parameters), 0, 1)[..., None]
            picture = np.clip(colours[0] * shade + colours[1] * (1 - shade), 0, 255).astype(np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode(None))


def fractal(x: np.ndarray, y: np.ndarray, time_s: float, p: np.ndarray) -> np.ndarray:
    """A Julia set that turns: how soon z -> z^2 + c escapes."""
    z = (x + 1j * y) * 1.4 * np.exp(1j * (0.3 * time_s + 6 * p[0]))
    c = 0.7885 * np.exp(1j * (6.283 * p[1] + 0.05 * time_s))
    escaped = np.zeros(z.shape)
    for _ in range(24):
        z = np.where(np.abs(z) < 4, z * z + c, z)
        escaped += np.abs(z) < 4
    return escaped / 24


def waves(x: np.ndarray, y: np.ndarray, time_s: float, p: np.ndarray) -> np.ndarray:
    """Rings around two points that run into each other."""
    centres = p[:4].reshape(2, 2) * 2 - 1
    return 0.5 + 0.25 * sum(
        np.sin((9 + 6 * p[4]) * np.hypot(x - cx, y - cy) - 3 * time_s) for cx, cy in centres
    )  # fmt: skip


def stripes(x: np.ndarray, y: np.ndarray, time_s: float, p: np.ndarray) -> np.ndarray:
    """Straight stripes that move across."""
    angle = 3.1416 * p[0]
    along = np.cos(angle) * x + np.sin(angle) * y
    return (np.sin((8 + 5 * p[1]) * along + 2 * time_s) > 0).astype(float)


def dots(x: np.ndarray, y: np.ndarray, time_s: float, p: np.ndarray) -> np.ndarray:
    """A grid of discs that moves across."""
    step = 0.5 + 0.25 * p[0]
    u = (x + 0.1 * time_s) % step - step / 2
    v = (y + 0.1 * time_s * p[1]) % step - step / 2
    return (np.hypot(u, v) < 0.3 * step).astype(float)


def cells(x: np.ndarray, y: np.ndarray, time_s: float, p: np.ndarray) -> np.ndarray:
    """The walls between the regions of points that move."""
    points = p[:36].reshape(18, 2) * 3 - 1.5 + 0.15 * np.sin(time_s + 6 * p[:36].reshape(18, 2))
    distances = np.sort(np.stack([np.hypot(x - px, y - py) for px, py in points]), axis=0)
    return np.clip((distances[1] - distances[0]) * 6, 0, 1)


KINDS = {"fractal": fractal, "waves": waves, "stripes": stripes, "dots": dots, "cells": cells}
