"""Watch a video once and keep its memory: a folder of one size, whatever the length, to be asked with `ask`."""

import argparse
import sys
from pathlib import Path

from . import ask

HELP = "watch a video and keep its memory, to be asked later"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("video", metavar="VIDEO", help="path or URL of a video")
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="MEMORY", help="folder to write")
    ask.add_watching_arguments(parser)


def run(args: argparse.Namespace) -> None:
    if not args.output.absolute().parent.is_dir():
        raise ValueError(f"cannot write {args.output}: create the folder {args.output.parent} first")
    name = ask.find_model(args.model)

    import torch

    from .. import VideoMa2mbaForConditionalGeneration, VideoMa2mbaProcessor, VideoMemory
    from ..modeling.checkpoint_plan import format_bytes

    device = ask.choose_device(args.device)
    dtype = ("bfloat16" if device.type == "cuda" else "float32") if args.dtype == "auto" else args.dtype
    processor = ask.load(VideoMa2mbaProcessor, name)
    processor.video_processor.open_video(
        args.video, fps=args.fps, max_frames=args.max_frames, start_s=args.start, end_s=args.end
    ).close()  # a wrong path shows at once
    model = ask.load(VideoMa2mbaForConditionalGeneration, name, dtype=getattr(torch, dtype)).to(device).eval()
    memory = VideoMemory(model, processor)
    ask.watch(memory, args)
    memory.save_pretrained(args.output)
    print(
        f"{args.output}: {memory.num_frames} frames, {memory.num_tokens} tokens, "
        f"{format_bytes(memory.num_bytes)} of states",
        file=sys.stderr,
    )
