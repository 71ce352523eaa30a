"""Run one of the library's benchmarks and print its figures as JSON."""

import argparse
import importlib
import json
from types import ModuleType

from ..files import write_json
from ..loading import output_file
from .parser import Parser

HELP = "run a benchmark and print its figures as JSON"
# Modules of `video_ma2mba.benchmark` with `add_arguments(parser)` and `run(args) -> dict`.
BENCHMARKS = {
    "decode": "reading a video's frames against a bare PyAV loop",
    "scan": "the scan, a block, a model and a decode step against transformers' own",
    "memory": "memory of training by checkpointing method and length: counted at full size, or measured",
    "train": "training throughput by checkpointing method",
    "finetune": "fine-tuning on small tasks by the defaults alone: new clips answered right",
    "generate": "prefill, seconds per new token by length of the context, and frames per second of the tower",
    "memory-of-video": "a video memory against an attention model: bytes and seconds per question, by minutes of video",
    "serve": "questions over HTTP: requests a second and time to the first token, by clients at once",
    "study": "small experiments: backbone, fps, intervals, length, max-length, stability",
    "device": "launches, decoding, watching and offload, as a GPU has them",
    "backends": "which kernels run on this machine, and why not the others",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = "benchmarks (`video-ma2mba bench NAME --help` lists the options of one):\n" + "\n".join(
        f"  {name:<16} {text}" for name, text in BENCHMARKS.items()
    )
    parser.add_argument("name", choices=BENCHMARKS, metavar="NAME", help="which benchmark to run")
    # Their options are known only once the module is imported, which takes seconds: so only the one that is asked for.
    parser.add_argument(
        "options", nargs=argparse.REMAINDER, metavar="...", help="its options; every benchmark takes -o FILE"
    )


def load(name: str) -> ModuleType:
    """The module of a benchmark."""
    return importlib.import_module(f"video_ma2mba.benchmark.{name.replace('-', '_')}")


def parser_of(name: str) -> Parser:
    """Of the options of a benchmark."""
    module = load(name)
    parser = Parser(prog=f"video-ma2mba bench {name}", description=module.__doc__)
    module.add_arguments(parser)
    parser.add_argument("-o", "--output", type=output_file, metavar="FILE", help="write the JSON here as well")
    return parser


def run(args: argparse.Namespace) -> None:
    options = parser_of(args.name).parse_args(args.options)
    result = load(args.name).run(options)
    print(json.dumps(result, indent=2))
    if options.output is not None:
        write_json(options.output, result)
