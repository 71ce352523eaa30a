"""Watch a video once and keep its memory: a folder of one size, whatever the length, to be asked with `ask` or `chat`.

What was watched so far is kept beside MEMORY as it goes; after an interruption `--resume` goes on there. MEMORY itself
appears, or is replaced, only when the video is watched to its end.
"""

import argparse
import shutil
import sys

from ..loading import output
from . import watching

HELP = "watch a video and keep its memory, to be asked later"
FRAMES_BETWEEN_SAVES = 600


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("video", metavar="VIDEO", help="path or URL of a video")
    parser.add_argument(
        "-o",
        "--output",
        type=output,
        required=True,
        metavar="MEMORY",
        help="folder of the memory; one that is there is replaced",
    )
    again = parser.add_mutually_exclusive_group()
    again.add_argument("--resume", action="store_true", help="go on where an interrupted call stood")
    again.add_argument("--restart", action="store_true", help="begin anew, and drop what an interrupted call watched")
    watching.add_arguments(parser)


def run(args: argparse.Namespace) -> None:
    place = args.output.resolve()
    unfinished = place.parent / f".{place.name}.unfinished"
    if args.resume and not watching.is_memory(unfinished):
        raise ValueError(f"--resume: no interrupted call for {args.output} was found; leave the option out")
    if watching.is_memory(unfinished) and not (args.resume or args.restart):
        raise ValueError(
            f"{args.output}: an interrupted call has watched part of it; --resume goes on there, --restart begins anew"
        )

    from .. import VideoMemory
    from ..modeling.video_memory_files import check_place

    check_place(args.output)
    model, processor = watching.load_model_and_processor(args, args.video)

    memory, start_s = VideoMemory(model, processor), args.start
    if args.resume:
        memory = VideoMemory.from_pretrained(unfinished, model, processor)
        (seen,) = memory.sources
        fps = processor.video_processor.fps if args.fps is None else args.fps
        if (seen["name"], seen["fps"], seen["start_s"]) != (args.video, fps, args.start):
            raise ValueError(
                f"--resume: the interrupted call watched {seen['name']} from {seen['start_s']:g} s at {seen['fps']:g} "
                "frames per second; give the same options, or leave --resume out"
            )
        start_s = seen["end_s"]
    saved = memory.num_frames

    def save() -> None:
        nonlocal saved
        if memory.num_frames - saved >= FRAMES_BETWEEN_SAVES and args.max_frames is None:
            memory.save_pretrained(unfinished)
            saved = memory.num_frames

    try:
        watching.watch(memory, args, start_s, pause=save)
    except KeyboardInterrupt as interrupt:
        kept = f"{saved} frames are kept, and --resume goes on there" if saved else "nothing of it is kept"
        raise KeyboardInterrupt(f"{args.output}: {kept}") from interrupt
    memory.save_pretrained(args.output)
    shutil.rmtree(unfinished, ignore_errors=True)
    print(f"{args.output}: {memory}", file=sys.stderr)
