"""Open a page in the browser: drop a video, see it being absorbed, talk about it, save and load memories."""

import argparse
from pathlib import Path

from . import watching

HELP = "open a page to watch videos and talk about them"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    watching.add_model_arguments(parser)
    parser.add_argument(
        "--memories", type=Path, default=Path("memories"), help="folder of saved memories (default: %(default)s)"
    )
    parser.add_argument("--host", default="127.0.0.1", help="default: 127.0.0.1, this machine alone")
    parser.add_argument("--port", type=int, default=7860, help="default: 7860")
    watching.add_server_arguments(parser)
    parser.add_argument("--max-upload", default="2gb", metavar="SIZE", help="of a video (default: 2gb)")


def run(args: argparse.Namespace) -> None:
    from ..ui import Page

    if args.server:
        page = Page(None, None, args.memories, example=True, server=watching.open_server(args)).build()
    else:
        model, processor = watching.load_model_and_processor(args)
        page = Page(model, processor, args.memories, example=args.model is None).build()
    page.queue().launch(
        server_name=args.host, server_port=args.port, max_file_size=args.max_upload, share=False, quiet=True,
        prevent_thread_lock=True, enable_monitoring=False,
    )  # fmt: skip
    print(f"http://{args.host}:{args.port}", flush=True)
    page.block_thread()
