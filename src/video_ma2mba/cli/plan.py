"""Say beforehand what training on a video of some length takes, by which checkpoint plan, and whether it fits a GPU.

Where it does not, the options are named with which it would, and the exit code is 1. What is counted, what is assumed,
and what is kept back is told in docs/planning.md.
"""

import argparse
import json
import math
from typing import Any

from ..loading import named, natural, positive
from ..planning.fitting import (
    ENGINES,
    FRAGMENTATION,
    MAX_TOKENS,
    METHODS,
    OPTIMIZER_BYTES,
    RESERVED_BYTES,
    Case,
    Training,
    gpu_at_hand_bytes,
    load_config,
)
from ..planning.remedies import remedies
from .parser import parse_bytes
from .progress import make_console

HELP = "what training on a long video, or watching it, takes, and whether it fits"
NOTHING_FITS = 1


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", required=True, metavar="SIZE_OR_DIR", help="0.7b, 1.8b, 3.1b, or a model folder")
    length = parser.add_mutually_exclusive_group(required=True)
    length.add_argument("--hours", type=positive, help="length of the video")
    length.add_argument("--frames", type=natural, help="the length as frames, at any --fps")
    length.add_argument("--tokens", type=natural, help="the length as tokens, text and frames together")
    parser.add_argument("--fps", type=positive, default=1.0, help="frames per second (default: 1)")
    parser.add_argument("--gpu-memory", type=parse_bytes, metavar="SIZE", help="as 80GiB (default: of the GPU here)")
    parser.add_argument("--host-memory", type=parse_bytes, metavar="SIZE", help="bounds what offload may hold")
    parser.add_argument("--inference", action="store_true", help="watching and answering, without training")
    parser.add_argument("--optimizer", choices=OPTIMIZER_BYTES, help="default: adamw")
    parser.add_argument("--dtype", choices=("bfloat16", "float32", "nf4"), default="bfloat16", help="of the weights")
    parser.add_argument("--batch", type=natural, default=1, help="videos per device (default: 1)")
    parser.add_argument("--accumulation", type=natural, default=1, metavar="N", help="batches that make up a step")
    parser.add_argument("--devices", type=natural, metavar="N", help="GPUs that train together (default: R)")
    parser.add_argument("--engine", choices=ENGINES, help="default: ddp for several devices")
    parser.add_argument("--sequence-parallel", type=natural, default=1, metavar="R", help="GPUs that share each video")
    parser.add_argument(
        "--gradient-horizon", type=natural, metavar="TOKENS", help="gradients for the last tokens alone"
    )
    parser.add_argument("--offload", action="store_true", help="let states and embeddings wait in host memory")
    parser.add_argument("--scan-backend", choices=("torch", "mamba_ssm"), default="torch", help="default: torch")
    parser.add_argument("--compare", action="store_true", help="all checkpointing methods, and what each can reach")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    check(args)
    gpu_bytes = args.gpu_memory or gpu_at_hand_bytes()
    if gpu_bytes is None:
        raise ValueError("there is no GPU here: say with --gpu-memory what it must fit into, for instance 80GiB")
    config = load_config(args.model)
    per_frame = config.tokens_per_frame
    if args.tokens is not None:
        num_frames = math.ceil(args.tokens / per_frame)
    else:
        num_frames = args.frames if args.frames is not None else math.ceil(args.hours * 3600 * args.fps)
    num_tokens = args.tokens if args.tokens is not None else num_frames * per_frame
    if num_tokens > MAX_TOKENS:
        raise ValueError(f"{num_tokens} tokens are more than the {MAX_TOKENS} that can be planned for")

    devices = args.devices or args.sequence_parallel
    engine = args.engine or ("ddp" if devices > 1 else None)
    optimizer = None if args.inference else args.optimizer or "adamw"
    case = Case(
        config,
        gpu_bytes=gpu_bytes, host_bytes=args.host_memory, optimizer=optimizer, dtype=args.dtype,
        batch_size=args.batch, scan_backend=args.scan_backend,
        training=Training(engine, devices, args.accumulation, args.sequence_parallel),
    )  # fmt: skip
    horizon = {} if args.gradient_horizon is None else {"gradient_horizon": args.gradient_horizon}
    asked: dict[str, Any] = {"offload": args.offload} | horizon
    methods: dict[str, Any] = {"watching" if args.inference else "training": asked}
    if args.compare:
        methods = {name: None if options is None else options | horizon for name, options in METHODS.items()}
    rows = [case.row(name, options, num_frames, num_tokens) for name, options in methods.items()]
    fits = any(row["fits"] for row in rows)
    report = {
        "model": args.model, "frames": num_frames, "tokens": num_tokens, "hours": num_frames / args.fps / 3600,
        "fps": args.fps, "batch": args.batch, "optimizer": optimizer, "dtype": args.dtype, "gpu_bytes": gpu_bytes,
        "host_memory_bytes": args.host_memory, "reserved_bytes": RESERVED_BYTES, "engine": engine, "devices": devices,
        "sequence_parallel": args.sequence_parallel, "accumulation": args.accumulation, "rows": rows,
        "remedies": [] if fits else remedies(case, asked, num_frames, num_tokens, args.fps),
    }  # fmt: skip
    if args.json:
        print(json.dumps(report, indent=2))
    else:
        print_report(report)
    return 0 if fits else NOTHING_FITS


def check(args: argparse.Namespace) -> None:
    """Refuse what makes no sense.

    Raises:
        ValueError: names the option.
    """
    ranks = args.sequence_parallel
    if ranks > 1 and args.gradient_horizon is not None:
        raise ValueError(
            "--gradient-horizon and --sequence-parallel do not go together: with a horizon the memory does not grow "
            "with the video, so leave out --sequence-parallel"
        )
    if args.devices is not None and args.devices % ranks:
        raise ValueError(f"--sequence-parallel {ranks} does not divide --devices {args.devices}")
    if args.engine is not None and (args.devices or ranks) == 1:
        raise ValueError(f"--engine {args.engine} is for several devices: say how many with --devices")
    if args.inference:
        training = ("optimizer", "accumulation", "devices", "engine", "gradient_horizon", "offload", "compare",
                    "sequence_parallel")  # fmt: skip
        if given := [name for name in training if getattr(args, name) not in (None, False, 1)]:
            raise ValueError(f"{named(given[:1])} is of training; leave it out, or leave out --inference")
    elif args.dtype == "nf4" and args.optimizer != "qlora":
        raise ValueError("--dtype nf4: weights of four bits do not train; take --optimizer qlora, or --inference")


def print_report(report: dict[str, Any]) -> None:
    from rich.table import Table

    from ..modeling.checkpoint_plan import format_bytes

    rows, gpu_bytes = report["rows"], report["gpu_bytes"]
    title = (
        f"{report['model']}, {report['batch']} x {report['frames']:,} frames = {report['tokens']:,} tokens "
        f"({report['hours']:.2f} h), {report['optimizer'] or 'watching and answering'}, {format_bytes(gpu_bytes)} of "
        "GPU memory"
    )
    console = make_console(width=150, highlight=False)
    console.print(title, soft_wrap=True)
    table = Table()
    table.add_column("")
    for row in rows:
        table.add_column(row["method"], justify="right", overflow="fold")
    kept_back = f"kept back: {format_bytes(RESERVED_BYTES)}, and of activations"
    labels = {
        "weights_bytes": "weights", "gradients_bytes": "gradients", "optimizer_bytes": "optimizer",
        "buffers_bytes": "buffers of the engine", "pixels_bytes": "frames (uint8)", "activations_bytes": "activations",
        "fragmentation_bytes": f"{kept_back} {FRAGMENTATION:.0%}", "total_bytes": "total",
        "host_bytes": "host memory",
    }  # fmt: skip
    for key, label in labels.items():
        extra = RESERVED_BYTES if key == "fragmentation_bytes" else 0
        if any(row[key] for row in rows) or key in ("total_bytes", "host_bytes"):
            table.add_row(label, *(format_bytes(row[key] + extra) for row in rows))
    if report["optimizer"] is not None:
        table.add_row("compute of a step", *(f"{row['recompute_factor']:.2f} x" for row in rows))
    if (ranks := report["sequence_parallel"]) > 1:
        table.add_row("waits for other ranks", *(f"{row['idle']:.0%}" for row in rows))
    table.add_row("fits", *("yes" if row["fits"] else "no" for row in rows))
    table.add_row("longest that fits", *(_length(row, report["fps"]) for row in rows))
    console.print(table)
    if sums := max(row["float32_sums_bytes"] for row in rows):
        console.print(f"of the gradients, {format_bytes(sums)} are for summing them in float32")
    if ranks > 1:
        console.print(
            f"planned, not measured: {ranks} GPUs share the video, and the numbers are of one of them. Ranks work at "
            "the same time with order layer_major; with sequence_major, which needs the least memory, one after the "
            "other",
            soft_wrap=True,
        )
    for row in rows:
        over = format_bytes(max(row["total_bytes"] - gpu_bytes, 0))
        too_much = f"{over} too much for the GPU" if row["total_bytes"] > gpu_bytes else "too much for the host"
        console.print(f"{row['method']}: {row['plan'] or f'no plan fits, the least is {too_much}'}", soft_wrap=True)
    if not any(row["fits"] for row in rows):
        _print_remedies(report, console)


def _print_remedies(report: dict[str, Any], console: Any) -> None:
    from rich.table import Table

    from ..modeling.checkpoint_plan import format_bytes

    if not report["remedies"]:
        console.print("nothing fits, whatever the options: take a smaller model or a larger GPU")
        return
    table = Table(title="what would fit", title_justify="left")
    table.add_column("change")
    for name in ("total", "host memory", "compute of a step", "longest that fits"):
        table.add_column(name, justify="right")
    for row in report["remedies"]:
        table.add_row(
            row["method"], format_bytes(row["total_bytes"]), format_bytes(row["host_bytes"]),
            f"{row['recompute_factor']:.2f} x", _length(row, row["fps"]),
        )  # fmt: skip
    console.print(table)


def _length(row: dict[str, Any], fps: float) -> str:
    if row["longest_is_bound"]:
        return "any length"
    hours = row["longest_frames"] / fps / 3600
    return f"{hours:.2f} h" if hours >= 0.01 or not hours else f"{60 * hours:.2f} min"
