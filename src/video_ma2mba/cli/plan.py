"""Say beforehand what training on a video of some length takes, by which checkpoint plan, and whether it fits a GPU.

Assumed is what the stock Trainer does with a model loaded in bfloat16: weights, gradients and optimizer states in
bfloat16 (`adamw`: two states; `adamw-8bit`: two states of a byte), while the backbone's gradients are summed in float32
during the backward pass. `lora` trains rank-16 adapters in float32 on in_proj and out_proj and freezes the rest. Frames
lie on the GPU as uint8, because the Trainer puts them there. 2 GiB are left for the CUDA context and fragmentation.
"""

import argparse
import json
import math
import re
from typing import Any

from ..fitting import MAX_TOKENS, OPTIMIZER_BYTES, RESERVED_BYTES, Case, load_config

HELP = "what training on a long video takes, and whether it fits"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", required=True, metavar="SIZE_OR_DIR", help="0.7b, 1.8b, 3.1b, or a model folder")
    length = parser.add_mutually_exclusive_group(required=True)
    length.add_argument("--hours", type=float, help="length of the video")
    length.add_argument("--frames", type=int)
    length.add_argument("--tokens", type=int)
    parser.add_argument("--fps", type=float, default=1.0, help="frames per second (default: 1)")
    parser.add_argument("--gpu-memory", type=parse_bytes, required=True, metavar="SIZE", help="for instance 80GiB")
    parser.add_argument("--host-memory", type=parse_bytes, metavar="SIZE", help="bounds what offload may hold")
    parser.add_argument("--optimizer", choices=OPTIMIZER_BYTES, default="adamw", help="default: adamw")
    parser.add_argument("--batch", type=int, default=1, help="videos per device (default: 1)")
    parser.add_argument(
        "--sequence-parallel", type=int, default=1, metavar="R", help="GPUs that share each video, as in a recipe"
    )
    parser.add_argument(
        "--gradient-horizon", type=int, metavar="TOKENS", help="gradients flow through the last so many tokens alone"
    )
    parser.add_argument("--offload", action="store_true", help="let states and embeddings wait in host memory")
    parser.add_argument(
        "--scan-backend", choices=("torch", "mamba_ssm"), default="torch", help="the kernels of mamba_ssm keep more"
    )
    parser.add_argument("--compare", action="store_true", help="all checkpointing methods, and what each can reach")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def parse_bytes(text: str) -> int:
    """ "80GiB", "80 GB", "512MiB" or a plain number of bytes -> bytes."""
    match = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*([KMGT]i?)?B?\s*", text, re.IGNORECASE)
    if not match or float(match[1]) <= 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size such as 80GiB, 80GB or 512MiB")
    unit = (match[2] or "").lower()
    base = 1024 if unit.endswith("i") else 1000
    return int(float(match[1]) * base ** " kmgt".index(unit[:1] or " "))


def run(args: argparse.Namespace) -> None:
    for name in ("hours", "frames", "tokens", "fps", "batch", "gradient_horizon"):
        value = getattr(args, name)
        if value is not None and not (math.isfinite(value) and value > 0):
            raise ValueError(f"--{name.replace('_', '-')} must be a positive number, got {value}")
    if args.sequence_parallel < 1:
        raise ValueError(f"--sequence-parallel must be at least 1, got {args.sequence_parallel}")
    if args.sequence_parallel > 1 and args.gradient_horizon is not None:
        raise ValueError(
            "--gradient-horizon and --sequence-parallel do not go together: with a horizon the memory does not grow "
            "with the video, so leave out --sequence-parallel"
        )
    config = load_config(args.model)
    per_frame = config.tokens_per_frame
    if args.tokens is not None:
        num_frames = math.ceil(args.tokens / per_frame)
    else:
        num_frames = args.frames if args.frames is not None else math.ceil(args.hours * 3600 * args.fps)
    num_tokens = args.tokens if args.tokens is not None else num_frames * per_frame
    if num_tokens > MAX_TOKENS:
        raise ValueError(f"{num_tokens} tokens are more than the {MAX_TOKENS} that can be planned for")

    case = Case(
        config,
        gpu_bytes=args.gpu_memory, host_bytes=args.host_memory, optimizer=args.optimizer, batch_size=args.batch,
        scan_backend=args.scan_backend, ranks=args.sequence_parallel,
    )  # fmt: skip
    from ..methods import METHODS

    methods: dict[str, Any] = METHODS if args.compare else {"chosen": {"offload": args.offload}}
    if args.gradient_horizon is not None:
        horizon = {"gradient_horizon": args.gradient_horizon}
        methods = {name: None if options is None else options | horizon for name, options in methods.items()}
    rows = [case.row(name, options, num_frames, num_tokens) for name, options in methods.items()]
    report = {
        "model": args.model, "frames": num_frames, "tokens": num_tokens, "hours": num_frames / args.fps / 3600,
        "batch": args.batch, "optimizer": args.optimizer, "gpu_bytes": args.gpu_memory,
        "reserved_bytes": RESERVED_BYTES, "sequence_parallel": args.sequence_parallel, "rows": rows,
    }  # fmt: skip
    if args.json:
        print(json.dumps(report, indent=2))
    else:
        print_report(report, args.fps)


def print_report(report: dict[str, Any], fps: float) -> None:
    from rich.console import Console
    from rich.table import Table

    from ..modeling.checkpoint_plan import format_bytes

    rows = report["rows"]
    table = Table(title=(
        f"{report['model']}, {report['batch']} x {report['frames']:,} frames = {report['tokens']:,} tokens "
        f"({report['hours']:.2f} h), {report['optimizer']}, {format_bytes(report['gpu_bytes'])} of GPU memory"
    ))  # fmt: skip
    table.add_column("")
    for row in rows:
        table.add_column(row["method"], justify="right", overflow="fold")
    labels = {
        "weights_bytes": "weights", "gradients_bytes": "gradients", "optimizer_bytes": "optimizer",
        "pixels_bytes": "frames (uint8)", "activations_bytes": "activations", "total_bytes": "total, 2 GiB kept back",
        "host_bytes": "host memory",
    }  # fmt: skip
    for key, label in labels.items():
        table.add_row(label, *(format_bytes(row[key]) for row in rows))
    table.add_row("compute of a step", *(f"{row['recompute_factor']:.2f} x" for row in rows))
    if (ranks := report["sequence_parallel"]) > 1:
        table.add_row("waits for other ranks", *(f"{row['idle']:.0%}" for row in rows))
    table.add_row("fits", *("yes" if row["fits"] else "no" for row in rows))
    table.add_row("longest that fits", *(_length(row, fps) for row in rows))
    console = Console(width=None if len(rows) == 1 else 150, highlight=False)
    console.print(table)
    if ranks > 1:
        console.print(
            f"planned, not measured: {ranks} GPUs share the video, and the numbers are of one of them. Ranks work at "
            "the same time with order layer_major; with sequence_major, which needs the least memory, one after the "
            "other"
        )
    for row in rows:
        console.print(f"{row['method']}: {row['plan']}", soft_wrap=True)


def _length(row: dict[str, Any], fps: float) -> str:
    hours = row["longest_frames"] / fps / 3600
    return f"{'over ' if row['longest_is_bound'] else ''}{hours:.2f} h"
