"""Bring published data sets into the one form that training reads.

`prepare` converts the files as they are published, checks every video and image, groups all questions about one video
into one conversation, and reports what it left out and why. An interrupted run goes on where it stood.

It uses all cores of a machine. Several machines share the work by shards: run the same command on each of them with
--shard 1/4 to --shard 4/4, then once without: that takes over what the shards found, and writes the manifest.
"""

import argparse
import os
import sys
from pathlib import Path

from ..loading import frame_rate, natural, output_folder, positive, refuse
from ..processes import Share
from .parser import parse_share
from .progress import progress_bars

HELP = "prepare published data sets for training"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    prepare = actions.add_parser("prepare", help="convert, check and group", description=__doc__)
    prepare.add_argument("source", type=Path, metavar="SOURCE", help="a published file, or a folder of them")
    prepare.add_argument(
        "--media-root", type=Path, required=True, metavar="DIR", help="folder in which the paths of its media begin"
    )
    prepare.add_argument("-o", "--output", type=output_folder, required=True, metavar="OUT", help="folder to write")
    prepare.add_argument("--format", metavar="NAME", help="format of the files (default: told from each file)")
    prepare.add_argument(
        "--max-hours",
        type=positive,
        default=24.0,
        metavar="HOURS",
        help="leave out videos that are longer (default: 24)",
    )
    prepare.add_argument("--parquet", action="store_true", help="write Parquet instead of JSON lines")
    prepare.add_argument(
        "--rows-per-file",
        type=natural,
        metavar="N",
        help="with --parquet: rows of a file, for sets that are streamed (default: all)",
    )
    prepare.add_argument(
        "--workers", type=natural, metavar="N", help="videos opened or decoded at a time (default: the machine's cores)"
    )
    prepare.add_argument(
        "--shard",
        type=parse_share,
        metavar="I/N",
        help="look at the I-th part of the media alone, and write no manifest",
    )
    prepare.add_argument(
        "--cache-frames",
        choices=("raw", "jpeg"),
        metavar="raw|jpeg",
        help="store the frames too, so that training decodes no video",
    )
    prepare.add_argument("--fps", type=frame_rate, metavar="N", help="stored frames per second of video (default: 1)")
    prepare.add_argument(
        "--model",
        metavar="DIR_OR_HUB_ID",
        help="the model that will be trained: its processor resizes the stored frames (default: 336 x 336, cropped)",
    )


def run(args: argparse.Namespace) -> None:
    from ..data.formats import FORMATS
    from ..data.prepare import LEFT_OUT, prepare

    if args.format is not None and args.format not in FORMATS:
        raise ValueError(f"--format {args.format}: known are {', '.join(FORMATS)}")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError(
            "data prepare uses all cores of a machine by itself: start it without torchrun, with --workers N; several "
            "machines share the work by --shard I/N"
        )
    if not args.parquet:
        refuse(args, {"rows_per_file": None}, "for --parquet; JSON lines are one file")
    if not args.cache_frames:
        refuse(args, {"fps": None, "model": None}, "for --cache-frames; leave it out, or store the frames")
    share = args.shard or Share()
    cache = None
    if args.cache_frames:
        from .. import VideoMa2mbaVideoProcessor
        from ..loading import find_model, load

        processor = (
            load(VideoMa2mbaVideoProcessor, find_model(args.model)) if args.model else VideoMa2mbaVideoProcessor()
        )
        cache = {"processor": processor, "fps": args.fps or 1.0, "encoding": args.cache_frames}

    try:
        with progress_bars() as show:
            report = prepare(
                args.source, args.media_root, args.output, name=args.format, max_duration_s=3600 * args.max_hours,
                parquet=args.parquet, rows_per_file=args.rows_per_file, cache=cache,
                num_workers=args.workers or os.cpu_count() or 1, share=share, progress=show,
            )  # fmt: skip
    except KeyboardInterrupt:
        kept = f"what was found out about media, and the frames of whole videos, are kept in {args.output}"
        print(f"stopped; {kept}: the same command goes on", file=sys.stderr)
        raise
    if share.count > 1:
        print(
            f"shard {share}: {report['media']} media looked at, {report['cached_frames']} frames stored; when all are "
            "done, run the command without --shard"
        )
        return
    records = report["records"]
    if records["kept"]:
        print(
            f"{args.output}: {report['samples']} conversations, {report['turns']} questions, "
            f"{report['watched_s'] / 3600:.2f} h of video; kept {records['kept']} of {records['read']} records"
        )
    for reason, count in sorted(records["left_out"].items()):
        print(f"left out, {reason}: {count}", file=sys.stderr)
    for note, count in report["notes"].items():
        print(f"note, {note}: {count}", file=sys.stderr)
    if records["left_out"]:
        print(f"which ones and why: {args.output / LEFT_OUT}", file=sys.stderr)
    if not records["kept"]:
        first = f"; the first: {report['problems'][0]['message']}" if report["problems"] else ""
        raise ValueError(f"not one of {records['read']} records can be used{first}")
