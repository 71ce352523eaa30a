"""What the commands have in common that watch a video: their options, loading a model, watching with a progress bar."""

import argparse
import sys
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..loading import (
    TINY,
    check_weights,
    choose_device,
    choose_dtype,
    find_model,
    frame_rate,
    load,
    load_model,
    natural,
    positive,
    refuse,
    seconds,
)
from .progress import progress_bars

if TYPE_CHECKING:
    from ..modeling.video_memory import VideoMemory
    from ..serving.client import RemoteMemory, Server


# What part of a video is watched, and its defaults
OF_WATCHING: dict[str, Any] = {"max_frames": None, "start": 0.0, "end": None, "max_duration": None, "snapshots": []}
ABOVE_OWN_RATE = 1.1  # rates are averages, and rounded
TINY_KNOWS = "which knows videos of coloured shapes and nothing else"


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of every command that runs a model."""
    parser.add_argument(
        "--model", metavar="DIR_OR_HUB_ID", help=f"default: tiny, the model of this package, {TINY_KNOWS}"
    )
    add_loading_arguments(parser)


def add_loading_arguments(parser: argparse.ArgumentParser) -> None:
    """How a model is loaded, whatever names it."""
    parser.add_argument("--adapter", metavar="DIR_OR_HUB_ID", help="LoRA adapters that were trained on the model")
    parser.add_argument(
        "--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: auto, cuda if there is one"
    )
    parser.add_argument(
        "--dtype",
        choices=("auto", "float32", "bfloat16"),
        default="auto",
        help="default: auto, bfloat16 on cuda and float32 elsewhere",
    )


def add_arguments(parser: argparse.ArgumentParser, snapshots: bool = True) -> None:
    """The options of every command that watches a video; `snapshots` for those that can go back to one."""
    add_model_arguments(parser)
    parser.add_argument(
        "--fps",
        type=frame_rate,
        metavar="N",
        help="frames to watch per second of video (default: the model's, usually 1)",
    )
    parser.add_argument("--max-frames", type=natural, metavar="N", help="watch at most N frames, spread evenly")
    parser.add_argument(
        "--start", type=seconds, default=0.0, metavar="SECONDS", help="where in the video to begin (default: 0)"
    )
    parser.add_argument("--end", type=positive, metavar="SECONDS", help="where to stop (default: the end)")
    parser.add_argument("--max-duration", type=positive, metavar="SECONDS", help="watch at most this much of the video")
    if snapshots:
        parser.add_argument(
            "--snapshots", type=seconds, nargs="+", default=[], metavar="SECONDS",
            help="times, from --start on, at which the memory is kept too, for `/seek` of `chat`",
        )  # fmt: skip


def open_server(args: argparse.Namespace) -> "Server":
    """The server of the options.

    Raises:
        ValueError: there are options that only a model on this machine could follow.
    """
    from ..serving.client import Server

    elsewhere = {"model": None, "adapter": None, "device": "auto", "dtype": "auto", **OF_WATCHING}
    refuse(args, elsewhere, "with --server the server's model watches whole videos; leave it out")
    key = None
    if args.api_key_file is not None:
        key = next(iter(args.api_key_file.read_text(encoding="utf-8").split()), None)
    return Server(args.server, key)


def remote_memory(args: argparse.Namespace) -> "RemoteMemory":
    """A memory of a server: one that it keeps, by its id, or of a video that is sent to it now."""
    from ..serving.client import RemoteMemory

    server = open_server(args)
    if not Path(args.video).exists():
        return RemoteMemory(server, server.wait(args.video))
    described = server.upload(args.video, args.fps)
    with progress_bars() as show:
        described = server.wait(
            described["id"], progress=lambda done, expected: show("Watching, frames", done, expected)
        )
    return RemoteMemory(server, described)


def load_model_and_processor(args: argparse.Namespace, video: str | None = None) -> tuple[Any, Any]:
    """Model and processor of the options. A video is opened first: a wrong path shows at once, not after minutes."""
    from .. import VideoMa2mbaProcessor
    from ..data.synthetic import is_story

    if video is not None and args.end is not None and args.end <= args.start:
        raise ValueError(f"--end {args.end:g}: it must lie after --start {args.start:g}")
    name = find_model(args.model)
    device = choose_device(args.device)
    processor = load(VideoMa2mbaProcessor, name)
    check_weights(name)
    if video is not None:
        with closing(
            processor.video_processor.open_video(
                video, fps=args.fps, max_frames=args.max_frames, start_s=args.start, end_s=args.end
            )
        ) as frames:
            own = frames.info.average_fps
        if args.fps is not None and own is not None and args.max_frames is None and args.fps > own * ABOVE_OWN_RATE:
            print(
                f"note: --fps {args.fps:g} is above the video's own {own:g} frames per second: each picture is watched "
                f"some {args.fps / own:.1f} times",
                file=sys.stderr,
            )
        if args.model in (None, TINY) and not is_story(video):
            print(f"note: this is the tiny model, {TINY_KNOWS}; --model names another", file=sys.stderr)
    return load_model(name, choose_dtype(args.dtype, device), args.adapter).to(device), processor


def is_memory(path: str | Path) -> bool:
    """Whether this is the folder of a memory."""
    from ..modeling.video_memory_files import CONFIG_NAME

    return (Path(path) / CONFIG_NAME).is_file()


def open_memory(args: argparse.Namespace) -> tuple["VideoMemory", dict[str, Any]]:
    """A memory read from its folder, or of the video, watched now; and what watching took."""
    from .. import VideoMemory

    if is_memory(args.video):
        refuse(args, {"fps": None, **OF_WATCHING}, f"{args.video} is a memory, watched already; leave the option out")
        model, processor = load_model_and_processor(args)
        return VideoMemory.from_pretrained(args.video, model, processor), {"decode_s": 0.0, "encode_s": 0.0}
    memory = VideoMemory(*load_model_and_processor(args, args.video))
    return memory, watch(memory, args, args.start)


def watch(
    memory: "VideoMemory", args: argparse.Namespace, start_s: float, pause: Callable[[], None] | None = None
) -> dict[str, Any]:
    """Watch `args.video` from `start_s` on with a progress bar; returns frames, tokens, decode_s, encode_s.

    Args:
        pause: Called after every micro-batch, where the memory can be saved.
    """
    before = memory.num_frames
    max_duration_s = None if args.max_duration is None else args.max_duration - (start_s - args.start)
    with progress_bars() as show:

        def progress(done: int, expected: int | None) -> None:
            show("Watching, frames", before + done, None if expected is None else before + expected)
            if pause is not None:
                pause()

        watched = memory.watch(
            args.video, args.fps, start_s=start_s, end_s=args.end, max_frames=args.max_frames,
            max_duration_s=max_duration_s, snapshots_s=getattr(args, "snapshots", ()), progress=progress,
        )  # fmt: skip
        show("Watching, frames", memory.num_frames, memory.num_frames)  # a truncated file ends early
    return watched
