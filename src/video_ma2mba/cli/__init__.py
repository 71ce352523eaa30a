"""The `video-ma2mba` command.

A command is a module of this folder with `HELP`, `add_arguments(parser)` and `run(args)`. Nothing heavy is imported
before `run`. Exit codes: 0 done, 1 done and the answer is no (`plan`: it does not fit), 2 the user can put it right (a
message says how), 130 interrupted (a line says what was kept), 141 nobody reads what is printed any more.
"""

import argparse
import os
import sys
import warnings
from collections.abc import Sequence
from importlib import import_module
from importlib.metadata import version

from . import ask, bench, chat, convert, data, evaluate, merge, plan, serve, share, train, ui, watch
from .parser import Parser
from .quiet import silence_other_libraries

COMMANDS = {
    "ask": ask, "bench": bench, "chat": chat, "convert": convert, "data": data, "eval": evaluate,
    "merge": merge, "plan": plan, "serve": serve, "share": share, "train": train, "ui": ui, "watch": watch,
}  # fmt: skip
# Packages that only some commands need, and the extra that brings each.
EXTRAS = {"datasets": "train", "peft": "train", "tensorboard": "train", "matplotlib": "train", "evaluate": "eval",
          "fastapi": "serve", "uvicorn": "serve", "python_multipart": "serve"}  # fmt: skip
EXIT_USER_ERROR = 2
EXIT_INTERRUPTED = 130
EXIT_UNREAD = 141  # as a shell says of what ended so, in `yes | head -1`


def build_parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="video-ma2mba",
        description="Ask questions about long videos with Video-Ma2mba, a Mamba-2 video language model.",
        epilog="Of an option that is given twice the last counts.\n\n"
        "VIDEO_MA2MBA_TRACEBACK=1 in the environment shows the whole traceback of an error.",
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {version('video-ma2mba')}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, module in COMMANDS.items():
        command = commands.add_parser(name, help=module.HELP, description=module.__doc__)
        module.add_arguments(command)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code.

    Args:
        argv: The arguments without the program's name; None: those of the process.
    """
    typed = list(sys.argv[1:] if argv is None else argv)
    try:
        if "" in typed:
            before = ["video-ma2mba", *typed][typed.index("")]
            raise ValueError(f"the argument after {before} is empty: write it out, or leave the option out")
        args, unknown = build_parser().parse_known_args(typed)
        if unknown:
            raise ValueError(f"{' '.join(unknown)}: no such option; see `video-ma2mba {args.command} --help`")
        with warnings.catch_warnings():
            # where it arose is left out
            warnings.showwarning = lambda message, *place, **more: print(f"warning: {message}", file=sys.stderr)
            silence_other_libraries()
            import_module("video_ma2mba.registration")  # `__init__` leaves it to us, so that --help is instant
            code = COMMANDS[args.command].run(args)
        if sys.stdout is not None:  # it was closed
            sys.stdout.flush()
        return code or 0
    except KeyboardInterrupt as interrupt:
        print(f"interrupted{f'; {interrupt}' if str(interrupt) else ''}", file=sys.stderr)
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        for stream in (sys.stdout, sys.stderr):  # or Python would fail once more when it ends
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
        return EXIT_UNREAD
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in EXTRAS:
            raise
        print(f"error: this needs {package}: pip install 'video-ma2mba[{EXTRAS[package]}]'", file=sys.stderr)
        return EXIT_USER_ERROR
    except (ValueError, OSError, OverflowError) as error:
        if os.environ.get("VIDEO_MA2MBA_TRACEBACK") == "1":
            raise
        said = str(error)
        if isinstance(error, OSError) and error.filename is not None and error.strerror:
            said = f"{error.filename}: {error.strerror}"  # without its number
        print(f"error: {said}", *getattr(error, "__notes__", []), sep="\n", file=sys.stderr)
        return EXIT_USER_ERROR
