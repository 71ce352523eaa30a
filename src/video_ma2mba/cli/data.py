"""Bring published data sets into the one form that training reads.

`prepare` converts the files as they are published, checks every video and image, groups all questions about one video
into one conversation, and reports what it left out and why. An interrupted run goes on where it stood.
"""

import argparse
import sys
from pathlib import Path

from ..progress import progress_bars

HELP = "prepare published data sets for training"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    prepare = actions.add_parser("prepare", help="convert, check and group", description=__doc__)
    prepare.add_argument("source", type=Path, metavar="SOURCE", help="a published file, or a folder of them")
    prepare.add_argument("--media-root", type=Path, required=True, metavar="DIR", help="where the paths in it begin")
    prepare.add_argument("-o", "--output", type=Path, required=True, metavar="OUT", help="folder to write")
    prepare.add_argument("--format", metavar="NAME", help="of the files (default: found out from each)")
    prepare.add_argument("--max-hours", type=float, default=24.0, help="leave out longer videos (default: 24)")
    prepare.add_argument("--parquet", action="store_true", help="write Parquet instead of JSON lines")
    prepare.add_argument(
        "--cache-frames", choices=("raw", "jpeg"), metavar="raw|jpeg", help="store the frames: training decodes no more"
    )
    prepare.add_argument("--fps", type=float, default=1.0, help="of the stored frames (default: 1)")
    prepare.add_argument(
        "--model",
        metavar="DIR_OR_HUB_ID",
        help="whose processor resizes the stored frames (default: 336 x 336, cropped)",
    )


def run(args: argparse.Namespace) -> None:
    from ..data.formats import FORMATS
    from ..data.prepare import REPORT, prepare

    if args.format is not None and args.format not in FORMATS:
        raise ValueError(f"--format {args.format}: known are {', '.join(FORMATS)}")
    if not args.max_hours > 0 or not args.fps > 0:
        raise ValueError("--max-hours and --fps must be positive")
    cache = None
    if args.cache_frames:
        from .. import VideoMa2mbaVideoProcessor
        from ..loading import find_model, load

        processor = (
            load(VideoMa2mbaVideoProcessor, find_model(args.model)) if args.model else VideoMa2mbaVideoProcessor()
        )
        cache = {"processor": processor, "fps": args.fps, "encoding": args.cache_frames}

    with progress_bars() as show:
        report = prepare(
            args.source, args.media_root, args.output, name=args.format, max_duration_s=3600 * args.max_hours,
            parquet=args.parquet, cache=cache, progress=show,
        )  # fmt: skip
    records = report["records"]
    print(
        f"{args.output}: {report['samples']} conversations, {report['turns']} questions, "
        f"{report['watched_s'] / 3600:.2f} h of video; kept {records['kept']} of {records['read']} records"
    )
    for reason, count in sorted(records["left_out"].items()):
        print(f"left out, {reason}: {count}", file=sys.stderr)
    for note, count in report["notes"].items():
        print(f"note, {note}: {count}", file=sys.stderr)
    if records["left_out"]:
        print(f"which ones and why: {args.output / REPORT}", file=sys.stderr)
