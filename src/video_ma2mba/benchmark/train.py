"""Training throughput of the backbone by checkpointing method: tokens per second of forward and backward.

Every method runs in the same process on the same batch of text, in turns. The loss stands on the last 512 tokens, as an
answer at the end of a long video does. On a GPU the peak bytes of each method are given too; a method that runs out of
memory is reported as such and the others go on. The paper's Table 8 is the same measurement on one A100-80GB.
"""

import argparse
import gc
from typing import Any

import torch
from transformers import CLIPVisionConfig, Mamba2Config

from ..files import write_json
from ..loading import choose_device, choose_dtype, natural
from ..modeling import VideoMa2mbaConfig, VideoMa2mbaForConditionalGeneration
from ..modeling.checkpoint_plan import peak_bytes_without
from ..modeling.configuration_video_ma2mba import PRESETS
from ..planning.fitting import METHODS, Sizes, Training
from ..planning.measured import peak_bytes, restart_peak
from .machine import clock, describe, timing

NUM_SUPERVISED = 512


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_arguments(parser)
    parser.add_argument("--lengths", type=natural, nargs="+", default=[8192], metavar="TOKENS")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS), metavar="METHOD")
    parser.add_argument(
        "--repeats", type=natural, default=5, help="timed steps of each method, after one that is not timed"
    )
    parser.add_argument("--once", action="store_true", help="no untimed step first: for lengths that take minutes")


def run(args: argparse.Namespace) -> dict[str, Any]:
    model = make_model(args)
    result: dict[str, Any] = {
        "benchmark": "train",
        "model": args.model,
        "num_backbone_parameters": sum(p.numel() for p in model.model.language_model.parameters()),
        "dtype": str(model.dtype).removeprefix("torch."),
        "rows": [],
        "machine": describe(model.device.type),
    }
    for length in args.lengths:
        result["rows"] += _measure(model, length, args)
        if getattr(args, "output", None) is not None:  # what was measured is kept, whatever becomes of the next length
            write_json(args.output, result)
    return result


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """What `make_model` reads."""
    parser.add_argument("--model", choices=["small", *PRESETS], default="small", help="small: for a CPU")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], help="default: bfloat16 on a GPU, else float32")


def make_model(args: argparse.Namespace, **changes: Any) -> VideoMa2mbaForConditionalGeneration:
    """The model of the options with random weights, of which the tower is frozen; `changes` are of its config."""
    device, config = choose_device(args.device), backbone_config(args.model)
    for name, value in changes.items():
        setattr(config, name, value)
    torch.manual_seed(0)
    with torch.device(device):
        model = VideoMa2mbaForConditionalGeneration._from_config(config, dtype=choose_dtype(args.dtype, device))
    model.model.vision_tower.requires_grad_(False)
    return model.train()


def backbone_config(name: str) -> VideoMa2mbaConfig:
    """The preset of that name, or for "small" a backbone that a CPU can train."""
    if name != "small":
        return VideoMa2mbaConfig.from_preset(name)
    return small_config(256, {"hidden_size": 64, "intermediate_size": 128})


def small_config(width: int, tower: dict[str, Any], num_layers: int = 8, **text: Any) -> VideoMa2mbaConfig:
    """A backbone of that width; its last two tokens are the placeholders. Of the tower two layers, unless it says."""
    given = {
        "num_heads": width // 32, "head_dim": 64, "state_size": 64, "vocab_size": 512, "bos_token_id": 0,
        "eos_token_id": 0, "pad_token_id": 1, **text,
    }  # fmt: skip
    return VideoMa2mbaConfig(
        text_config=Mamba2Config(
            hidden_size=width, num_hidden_layers=num_layers, n_groups=1, tie_word_embeddings=True, **given
        ),
        vision_config=CLIPVisionConfig(**{"num_hidden_layers": 2, "num_attention_heads": 2, **tower}),
        image_token_id=given["vocab_size"] - 2,
        video_token_id=given["vocab_size"] - 1,
    )


def _measure(model: VideoMa2mbaForConditionalGeneration, length: int, args: argparse.Namespace) -> list[dict]:
    """The rows of one length. One that ran has `step_s`, `tokens_per_s`, its ratio to off; on a GPU `peak_bytes`."""
    methods, untimed = args.methods, 0 if args.once else 1
    input_ids, labels = random_text(length, NUM_SUPERVISED, model.device)
    times: dict[str, list[float]] = {name: [] for name in methods}
    peaks: dict[str, int] = {}
    for turn in range(args.repeats + untimed):
        for name in [name for name in methods if name in times]:
            _enable(model, METHODS[name])
            try:
                step_s, peak = training_step(model, input_ids, labels)
            except torch.cuda.OutOfMemoryError:
                del times[name]
                continue
            if turn >= untimed:  # the first turn warms up
                times[name].append(step_s)
                peaks[name] = peak
    rows = []
    for name in methods:
        row: dict[str, Any] = {"tokens": length, "method": name}
        if METHODS[name] is not None:
            _enable(model, METHODS[name])
            row["plan"] = str(model.checkpoint_plan(1, length))
        row |= _planned(model, name, length)
        if name in times:
            row |= timing("step_s", times[name])
            row["tokens_per_s"] = length / row["step_s"]
            if model.device.type == "cuda":
                row["peak_bytes"] = peaks[name]
        else:
            row["out_of_memory"] = True
        rows.append(row)
    off = next((row.get("tokens_per_s") for row in rows if row["method"] == "off"), None)
    for row in rows:
        if off and "tokens_per_s" in row:
            row["ratio_to_off"] = row["tokens_per_s"] / off
    return rows


def _planned(model: VideoMa2mbaForConditionalGeneration, name: str, length: int) -> dict[str, int]:
    """What the planner says of the step: bytes of activations, and with the gradients, as `peak_bytes` measures."""
    if METHODS[name] is not None:
        activations_bytes = model.checkpoint_plan(1, length).predicted_peak_bytes
    else:
        weight = model.model.language_model.embeddings.weight
        scan = model.model.language_model.layers[0].mixer.backends(weight.device, weight.dtype).scan
        activations_bytes = peak_bytes_without(
            model.config, 1, length, dtype_bytes=weight.element_size(), scan_backend=scan,
            num_supervised_tokens=min(length, NUM_SUPERVISED),
        )  # fmt: skip
    gradients_bytes = Training().fixed(Sizes.of(model), METHODS[name] is not None, 0, 0).gradients_bytes
    return {"planned_activations_bytes": activations_bytes, "planned_bytes": activations_bytes + gradients_bytes}


def _enable(model: VideoMa2mbaForConditionalGeneration, options: dict | None) -> None:
    if options is None:
        model.gradient_checkpointing_disable()
    else:
        model.gradient_checkpointing_enable(**options)


def random_text(length: int, num_supervised: int, device: torch.device | str = "cpu") -> tuple[torch.Tensor, ...]:
    """ids and labels (1, length), -100 but for the last ones."""
    ids = torch.randint(2, 500, (1, length), device=device)
    return ids, torch.where(torch.arange(length, device=device) < length - num_supervised, -100, ids)


def training_step(
    model: VideoMa2mbaForConditionalGeneration, input_ids: torch.Tensor, labels: torch.Tensor
) -> tuple[float, int]:
    """One forward and backward pass: seconds, and peak bytes above what was there before it (0 on the CPU)."""
    model.zero_grad(set_to_none=True)
    gc.collect()
    on_gpu = model.device.type == "cuda"
    before = restart_peak(model.device) if on_gpu else 0
    seconds = clock(lambda: model(input_ids=input_ids, labels=labels).loss.backward(), model.device.type).seconds
    return seconds, peak_bytes(model.device) - before if on_gpu else 0
