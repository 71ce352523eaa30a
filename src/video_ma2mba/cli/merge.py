"""Merge LoRA adapters into the weights of their model: a folder like any other, to be asked, served and shared."""

import argparse
import sys

from ..loading import find_model, load, load_model, output
from .progress import progress_bars

HELP = "merge LoRA adapters into the weights of their model"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("adapter", metavar="ADAPTER", help="folder or Hub id, as `train finetune-lora` wrote it")
    parser.add_argument(
        "-o", "--output", type=output, required=True, metavar="DIR", help="folder to write, which must be new or empty"
    )
    parser.add_argument(
        "--model", metavar="DIR_OR_HUB_ID", help="what they were trained on (default: what the adapters name)"
    )
    parser.add_argument(
        "--dtype", choices=("auto", "float32", "bfloat16"), default="auto", help="default: auto, that of the model"
    )


def run(args: argparse.Namespace) -> None:
    if args.output.exists() and (not args.output.is_dir() or any(args.output.iterdir())):
        raise ValueError(f"{args.output}: is there already; remove it or choose another folder")
    import torch

    from ..files import whole_folder
    from ..processing import VideoMa2mbaProcessor
    from ..weights.adapters import base_model
    from ..weights.conversion import check_answers

    name = find_model(args.model or base_model(args.adapter))
    dtype = "auto" if args.dtype == "auto" else getattr(torch, args.dtype)
    with progress_bars() as show, whole_folder(args.output) as partial:
        steps = ("Merging, steps", 3)
        model = load_model(name, dtype, args.adapter)
        show(steps[0], 1, steps[1])
        model.save_pretrained(partial)
        load(VideoMa2mbaProcessor, name).save_pretrained(partial)
        show(steps[0], 2, steps[1])
        check_answers(partial)
        show(steps[0], 3, steps[1])
    print(f"{args.output}: {name} with the adapters of {args.adapter}", file=sys.stderr)
