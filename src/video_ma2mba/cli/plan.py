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
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..modeling.checkpoint_plan import CheckpointPlan
    from ..modeling.configuration_video_ma2mba import VideoMa2mbaConfig

HELP = "what training on a long video takes, and whether it fits"
OPTIMIZER_BYTES = {"adamw": 4, "adamw-8bit": 2, "lora": 8, "none": 0}  # per trained parameter
LORA_RANK = 16
RESERVED_BYTES = 2 * 2**30
MAX_TOKENS = 2**26  # some 130 hours: nobody asks for more, and the search must end


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
    parser.add_argument("--offload", action="store_true", help="let states and embeddings wait in host memory")
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


@dataclass(frozen=True)
class Fixed:
    """Bytes that do not depend on the plan."""

    weights_bytes: int
    gradients_bytes: int
    optimizer_bytes: int
    pixels_bytes: int

    @property
    def total(self) -> int:
        return sum(asdict(self).values())


def run(args: argparse.Namespace) -> None:
    for name in ("hours", "frames", "tokens", "fps", "batch"):
        value = getattr(args, name)
        if value is not None and not (math.isfinite(value) and value > 0):
            raise ValueError(f"--{name} must be a positive number, got {value}")
    config = load_config(args.model)
    per_frame = config.tokens_per_frame
    if args.tokens is not None:
        num_frames = math.ceil(args.tokens / per_frame)
    else:
        num_frames = args.frames if args.frames is not None else math.ceil(args.hours * 3600 * args.fps)
    num_tokens = args.tokens if args.tokens is not None else num_frames * per_frame
    if num_tokens > MAX_TOKENS:
        raise ValueError(f"{num_tokens} tokens are more than the {MAX_TOKENS} that can be planned for")

    case = Case(config, args)
    from ..methods import METHODS

    methods = METHODS if args.compare else {"chosen": {"offload": args.offload}}
    rows = [case.row(name, options, num_frames, num_tokens) for name, options in methods.items()]
    report = {
        "model": args.model, "frames": num_frames, "tokens": num_tokens, "hours": num_frames / args.fps / 3600,
        "batch": args.batch, "optimizer": args.optimizer, "gpu_bytes": args.gpu_memory,
        "reserved_bytes": RESERVED_BYTES, "rows": rows,
    }  # fmt: skip
    if args.json:
        print(json.dumps(report, indent=2))
    else:
        print_report(report, args.fps)


def load_config(model: str) -> "VideoMa2mbaConfig":
    from ..modeling.configuration_video_ma2mba import PRESETS, VideoMa2mbaConfig

    if model in PRESETS:
        return VideoMa2mbaConfig.from_preset(model)
    if not Path(model, "config.json").is_file():
        raise ValueError(f"--model {model}: neither one of {', '.join(PRESETS)} nor a folder with a config.json")
    return VideoMa2mbaConfig.from_pretrained(model)


class Case:
    """One model under one optimizer on one GPU."""

    def __init__(self, config: "VideoMa2mbaConfig", args: argparse.Namespace):
        import torch

        from ..modeling import VideoMa2mbaForConditionalGeneration

        self.config, self.args = config, args
        with torch.device("meta"):
            model = VideoMa2mbaForConditionalGeneration(config)
        self.num_parameters = sum(p.numel() for p in model.parameters())
        self.num_in_layers = sum(p.numel() for p in model.model.language_model.layers.parameters())
        projections = [
            getattr(layer.mixer, n) for layer in model.model.language_model.layers for n in ("in_proj", "out_proj")
        ]
        self.num_adapters = sum(LORA_RANK * (linear.in_features + linear.out_features) for linear in projections)

    def fixed(self, options: dict | None, num_frames: int) -> Fixed:
        """What lies on the GPU whatever the plan."""
        args, side = self.args, self.config.vision_config.image_size
        if args.optimizer == "lora":
            weights, gradients = 2 * self.num_parameters + 4 * self.num_adapters, 4 * self.num_adapters
            trained = self.num_adapters
        else:
            weights, trained = 2 * self.num_parameters, self.num_parameters
            # MA-GC sums the layers' gradients in float32 before it hands them on
            gradients = 2 * trained + (2 * self.num_in_layers if options is not None else 0)
        return Fixed(
            weights, gradients, OPTIMIZER_BYTES[args.optimizer] * trained, args.batch * num_frames * 3 * side**2
        )

    def plan(self, options: dict | None, num_frames: int, num_tokens: int) -> "tuple[CheckpointPlan | None, int]":
        """The plan and its bytes of activations: within the budget where it can be, else the least there is."""
        from ..modeling.checkpoint_plan import InfeasibleMemoryBudget, peak_bytes_without, plan_checkpoints

        trains_vision = self.args.optimizer != "lora"
        batch: dict[str, Any] = {"num_frames": self.args.batch * num_frames, "trains_vision": trains_vision}
        if options is None:
            return None, peak_bytes_without(self.config, self.args.batch, num_tokens, **batch)
        budget = self.args.gpu_memory - RESERVED_BYTES - self.fixed(options, num_frames).total
        bounds = {"host_memory_budget_bytes": self.args.host_memory} if options.get("offload") else {}
        shape = (self.config, self.args.batch, num_tokens)
        if budget > 0:
            try:
                found = plan_checkpoints(*shape, memory_budget_bytes=budget, **bounds, **options, **batch)
                return found, found.predicted_peak_bytes
            except InfeasibleMemoryBudget:
                pass
        found = plan_checkpoints(*shape, **options, **batch)
        return found, found.predicted_peak_bytes

    def fits(self, options: dict | None, num_frames: int, num_tokens: int) -> bool:
        plan, activations_bytes = self.plan(options, num_frames, num_tokens)
        return self.within(self.fixed(options, num_frames).total + activations_bytes + RESERVED_BYTES, plan)

    def within(self, total_bytes: int, plan: "CheckpointPlan | None") -> bool:
        """Whether the GPU holds `total_bytes`, and the host what the plan leaves there."""
        host = self.args.host_memory
        return total_bytes <= self.args.gpu_memory and (
            plan is None or host is None or plan.predicted_host_bytes <= host
        )

    def row(self, name: str, options: dict | None, num_frames: int, num_tokens: int) -> dict[str, Any]:
        fixed = self.fixed(options, num_frames)
        plan, activations_bytes = self.plan(options, num_frames, num_tokens)
        total_bytes = fixed.total + activations_bytes + RESERVED_BYTES
        longest, is_bound = longest_frames(self, options)
        return {
            "method": name,
            **asdict(fixed),
            "activations_bytes": activations_bytes,
            "total_bytes": total_bytes,
            "host_bytes": plan.predicted_host_bytes if plan else 0,
            "plan": str(plan) if plan else "no checkpointing",
            "recompute_factor": plan.recompute_factor if plan else 1.0,
            "fits": self.within(total_bytes, plan),
            "longest_frames": longest,
            "longest_is_bound": is_bound,
        }


def longest_frames(case: Case, options: dict | None) -> tuple[int, bool]:
    """The most frames that fit, and whether that is only where the search ends."""
    per_frame = case.config.tokens_per_frame
    bound = MAX_TOKENS // per_frame
    longest = largest(lambda n: case.fits(options, n, n * per_frame), bound)
    return longest, longest == bound


def largest(holds: Callable[[int], bool], bound: int) -> int:
    """The largest n up to `bound` for which `holds(n)`, which is true up to some n and false beyond; 0 if for none."""
    low, high = 0, 1
    while high < bound and holds(high):
        low, high = high, 2 * high
    high = min(high, bound + 1)
    while high - low > max(1, low // 200):  # half a percent is closer than the prediction
        middle = (low + high) // 2
        low, high = (middle, high) if holds(middle) else (low, middle)
    return low


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
    table.add_row("fits", *("yes" if row["fits"] else "no" for row in rows))
    table.add_row("longest that fits", *(_length(row, fps) for row in rows))
    console = Console(width=None if len(rows) == 1 else 150, highlight=False)
    console.print(table)
    for row in rows:
        console.print(f"{row['method']}: {row['plan']}", soft_wrap=True)


def _length(row: dict[str, Any], fps: float) -> str:
    hours = row["longest_frames"] / fps / 3600
    return f"{'over ' if row['longest_is_bound'] else ''}{hours:.2f} h"
