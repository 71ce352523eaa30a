"""Open a page in the browser: drop a video, see it being absorbed, talk about it, keep the memory.

The page is served by the memory server of `video-ma2mba serve`, in this process or, with --server, elsewhere.
"""

import argparse
from pathlib import Path

from ..loading import output_folder, port_number
from . import watching
from .parser import parse_bytes
from .serve import LOOPBACK, read_keys

HELP = "open a page to watch videos and talk about them"
TINY_NAME = "video-ma2mba-tiny"  # wherever it is installed


def add_arguments(parser: argparse.ArgumentParser) -> None:
    watching.add_model_arguments(parser)
    parser.add_argument(
        "--memories", type=output_folder, default=Path("memories"),
        help="folder of memories, and of the videos they are of (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument("--host", default="127.0.0.1", help="default: 127.0.0.1, this machine alone")
    parser.add_argument("--port", type=port_number, default=7860, help="default: 7860; 0 takes a free one")
    parser.add_argument("--server", metavar="URL", help="let a `video-ma2mba serve` watch, answer and keep memories")
    parser.add_argument(
        "--api-key-file", type=Path, metavar="FILE",
        help="a key a line, of which visitors must give one; with --server its first is the server's",
    )  # fmt: skip
    parser.add_argument(
        "--max-upload", type=parse_bytes, default="2gb", metavar="SIZE", help="of a video (default: 2gb)"
    )


def run(args: argparse.Namespace) -> None:
    from ..page import add_page, build_forwarding_app
    from ..serving.app import Settings, build_app, listening_socket, serve
    from ..serving.media import MediaRules

    keys = read_keys(args.api_key_file, args.host)
    listening_socket(args.host, args.port).close()  # a port that is taken is said before the model is loaded
    if args.server:
        # on this machine alone the server's key is for the server, and visitors need none
        visitors = keys if args.host not in LOOPBACK else ()
        app = build_forwarding_app(watching.open_server(args), visitors, args.max_upload)
    else:
        model, processor = watching.load_model_and_processor(args)
        name = TINY_NAME if args.model is None else Path(args.model).name
        rules = MediaRules(max_bytes=args.max_upload)
        settings = Settings(name=name, memories=args.memories, rules=rules, keys=keys, keeps_videos=True)
        app = build_app(model, processor, settings)
    serve(add_page(app), args.host, args.port, lambda url: print(url, flush=True))
