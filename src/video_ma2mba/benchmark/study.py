"""Small experiments on what the paper leaves open, each of which runs on a CPU in minutes and draws a picture.

backbone    Mamba-2 against attention of equal size on the same questions about videos
fps         0.5, 1 and 2 FPS, and every frame against 8, 16 and 32 of them, by the bytes of a video's memory
intervals   Multi-Axis Gradient Checkpointing: bytes and seconds over the intervals of layers and tokens
length      accuracy from 8 s to 4 h, by how the states were trained; facts that a state of n bytes holds
max-length  the longest video that trains, by GPU memory, model, method and optimizer
stability   two thousand steps with checkpointing and without
"""

import argparse
import importlib
from pathlib import Path
from types import ModuleType
from typing import Any

from ..files import write_png
from ..loading import number, output_file
from .machine import describe

STUDIES = ("backbone", "fps", "intervals", "length", "max-length", "stability")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("study", choices=STUDIES)
    parser.add_argument("--plot", type=output_file, metavar="PNG", help="draw what was found")
    parser.add_argument("--scale", type=number(1e-9, 1), default=1.0, help="of steps and repeats: 0.01 tries it out")
    parser.add_argument(
        "--keep", type=Path, default=Path("out/studies"), metavar="DIR", help="trained backbones, shared by two studies"
    )


def run(args: argparse.Namespace) -> dict[str, Any]:
    study = load(args.study)
    found = study.run(args.scale, args.keep)
    result = {"study": args.study, "scale": args.scale, **found, "machine": describe("cpu")}
    if args.plot is not None:
        write_png(args.plot, study.draw(result))
    return result


def load(name: str) -> ModuleType:
    return importlib.import_module(f".studies.{name.replace('-', '_')}", __package__)
