"""Make a Video-Ma2mba of weights in other formats: published parts, or checkpoints of the model's authors."""

import argparse
import sys
from pathlib import Path

from ..loading import seed_number
from .progress import progress_bars

HELP = "make a model of weights in other formats"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    sources = parser.add_subparsers(dest="source_format", required=True, metavar="FORMAT")

    init = sources.add_parser(
        "init", help="an untrained model of a Mamba-2 and a vision tower", description=_INIT, epilog=_EPILOG
    )
    init.add_argument(
        "--language-model", required=True, metavar="DIR_OR_HUB_ID", help="a Mamba-2, such as state-spaces/mamba2-2.7b"
    )
    init.add_argument(
        "--vision-model",
        required=True,
        metavar="DIR_OR_HUB_ID",
        help="a CLIP or SigLIP, such as openai/clip-vit-large-patch14-336",
    )
    init.add_argument(
        "--seed", type=seed_number, default=0, metavar="N", help="for the projector's random weights (default: 0)"
    )

    llava = sources.add_parser(
        "llava-mamba", help="a checkpoint of the model's authors", description=_LLAVA_MAMBA, epilog=_EPILOG
    )
    llava.add_argument("source", metavar="DIR_OR_HUB_ID", help="such as interlive/video-ma2mba-1.3b")
    llava.add_argument(
        "--vision-model", metavar="DIR_OR_HUB_ID", help="where to read what tower it is, if that is not known"
    )

    for command in (init, llava):
        command.add_argument(
            "-o", "--output", type=Path, required=True, metavar="DIR", help="folder to write, which must be new"
        )
        command.add_argument(
            "--tokenizer", metavar="DIR_OR_HUB_ID", help="default: that of the source, or else GPT-NeoX's"
        )
        command.add_argument(
            "--dtype",
            choices=("auto", "float32", "bfloat16", "float16"),
            default="auto",
            help="default: auto, that of the source; A_log, D and dt_bias are float32 always",
        )
        command.add_argument(
            "--verify", action="store_true", help="compare every tensor with its source, and run a forward pass"
        )


_INIT = """An untrained Video-Ma2mba: a language model in the format of state-spaces or of transformers' Mamba2, the
tower of a CLIP or SigLIP, a fresh projector, and a processor whose placeholders lie inside the padded vocabulary."""
_LLAVA_MAMBA = "A checkpoint of type llava_mamba, as the model's authors publish them."
_EPILOG = "One shard of the result is in memory at a time. The folder appears whole or not at all."


def run(args: argparse.Namespace) -> None:
    import torch

    from ..loading import reading
    from ..weights.from_llava_mamba import read_llava_mamba
    from ..weights.from_parts import read_parts

    if args.source_format == "init":
        with reading(f"{args.language_model} and {args.vision_model}", "a model of them"):
            conversion = read_parts(args.language_model, args.vision_model, args.tokenizer, args.seed)
    else:
        with reading(args.source, "the model"):
            conversion = read_llava_mamba(args.source, args.tokenizer, args.vision_model)
    dtype = None if args.dtype == "auto" else getattr(torch, args.dtype)
    with progress_bars(in_bytes=True) as show:
        conversion.write(args.output, dtype, args.verify, progress=show)
    for reason, names in conversion.dropped().items():
        print(f"left out {len(names)}: {reason}", file=sys.stderr)
    print(args.output)
