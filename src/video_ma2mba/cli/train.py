"""Train a model as a recipe says: the paper's three stages, or fine-tuning on videos of your own.

Several devices, also on several machines: start the same command by `torchrun`, as in
`torchrun --nproc-per-node 8 -m video_ma2mba.cli train 3.1b-stage2`, or by `accelerate launch -m video_ma2mba.cli train`
with the same words. The recipe's global batch stays what it is. Model, data and output must lie on a disk that all
machines share.
"""

import argparse
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..loading import find_model, named_model, refuse
from ..planning.fitting import Sizes, Training, gpu_at_hand_bytes, needed_bytes, on_meta, planned
from .parser import parse_bytes
from .progress import make_console

if TYPE_CHECKING:
    import torch

    from ..training.choices import Choice
    from ..training.recipe import Recipe

HELP = "train a model as a recipe says"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "recipe", nargs="?", metavar="RECIPE", help="3.1b-stage1, 1.8b-stage2, finetune, finetune-lora, or a file"
    )
    parser.add_argument(
        "--set", dest="changes", action="append", default=[], metavar="KEY=VALUE", help="change one line of the recipe"
    )
    parser.add_argument("--keys", action="store_true", help="list all keys of a recipe with their meaning, and stop")
    parser.add_argument("--resume", action="store_true", help="go on from the last whole checkpoint in the output")
    parser.add_argument("--strict", action="store_true", help="stop at a sample that cannot be used")
    parser.add_argument("--dry-run", action="store_true", help="say what would be trained, and whether it fits")
    parser.add_argument(
        "--gpu-memory", type=parse_bytes, metavar="SIZE", help="with --dry-run: default, that of the GPU here"
    )


def run(args: argparse.Namespace) -> None:
    from ..training.recipe import read_recipe, recipe_names

    if args.keys:
        if args.recipe is not None:
            raise ValueError(f"--keys lists those of every recipe: leave {args.recipe} out")
        _print_keys()
        return
    if args.recipe is None:
        raise ValueError(f"name a recipe: {', '.join(recipe_names())}, or a .yaml file")
    if args.dry_run:
        refuse(args, {"resume": False}, "a --dry-run trains nothing; leave one of them out")
    else:
        refuse(args, {"gpu_memory": None}, "for --dry-run alone; leave it out")
    recipe = read_recipe(args.recipe, [*args.changes, *(["strict=true"] if args.strict else [])])
    recipe = replace(recipe, model=named_model(recipe.model))
    if args.dry_run:
        dry_run(recipe, args.gpu_memory)
        return
    find_model(recipe.model)
    for key in ("data", "evaluation_data"):
        for folder in getattr(recipe, key):
            _check_prepared(key, Path(folder), Path(recipe.output))

    import torch

    from ..training.run import prepare_run, train

    first = os.environ.get("RANK", "0") == "0"
    if first:
        print(_batch_line(recipe), file=sys.stderr)
    prepared = prepare_run(recipe)
    if first:
        for choice in prepared.choices:
            print(f"chosen, {choice}", file=sys.stderr)
    try:
        report = train(prepared, resume=args.resume)
    except KeyboardInterrupt as interrupt:
        raise KeyboardInterrupt(_kept(Path(recipe.output))) from interrupt
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()  # its threads must not be there any more when the process ends
    if first:
        _print_report(report, recipe.output)


def _print_keys() -> None:
    from ..training.recipe import recipe_keys

    keys = recipe_keys()
    width = max(len(key.name) for key in keys)
    for key in keys:
        default = f"default {key.default}" if key.default else "must be given"
        print(f"{key.name:<{width}}  {key.meaning} ({key.kind}; {default})")


def _check_prepared(key: str, folder: Path, output: Path) -> None:
    """Refuse data that are none before anything is loaded.

    Raises:
        ValueError: Says what is there instead, and the command that makes it data.
    """
    from ..data.manifest import DESCRIPTION

    if (folder / DESCRIPTION).is_file():
        if output.resolve() == folder.resolve():
            raise ValueError(f"output {output} is the folder of the data: choose another, {output}-run for instance")
        return
    if not folder.exists():
        raise ValueError(f"{key}: {folder} is not there")
    root = folder.parent if folder.is_file() else folder
    raise ValueError(
        f"{key}: {folder} is not prepared yet: `video-ma2mba data prepare {folder} --media-root {root} -o PREPARED`, "
        f"then --set {key}=PREPARED"
    )


def _kept(output: Path) -> str:
    from ..training.run import CHECKPOINTS
    from ..training.trainer import last_checkpoint

    checkpoint = last_checkpoint(output / CHECKPOINTS)
    if checkpoint is None:
        return f"{output} holds no checkpoint yet: the same command begins anew"
    return f"{checkpoint} is kept: the same command with --resume goes on from there"


def _print_report(report: dict[str, Any], output: str) -> None:
    held_out, entries = report["held_out_loss"], report["held_out"]
    if held_out["after"] is not None:
        print(f"held-out loss: {held_out['before']:.4f} before, {held_out['after']:.4f} after")
        after = next(entry for entry in reversed(entries) if entry["step"] == report["kept_step"])
        if "exact" in after:
            right = [round(entry["exact"] * entry["answers"]) for entry in (entries[0], after)]
            print(f"held-out answers exact: {right[0]} of {after['answers']} before, {right[1]} after")
    for warning in report["warnings"]:
        print(f"warning: {warning}", file=sys.stderr)
    left_out = f", {report['skipped_samples']} left out" if report["skipped_samples"] else ""
    best = f", that of step {report['kept_step']}" if report["kept_step"] != report["steps"] else ""
    print(
        f"{output}/model{best}: {report['steps']} steps, {report['samples']} samples{left_out}, "
        f"{report['tokens']} tokens in {report['wall_s']:.0f} s"
    )


def _batch_line(recipe: "Recipe") -> str:
    devices = int(os.environ.get("WORLD_SIZE", "1"))
    steps = recipe.accumulation_steps(devices)
    taking = f"{devices} device(s)"
    if recipe.sequence_parallel > 1:
        taking = f"{devices // recipe.sequence_parallel} group(s) of {recipe.sequence_parallel} devices"
    return (
        f"global batch {recipe.global_batch_size} = {recipe.device_batch_size} at a time x {taking} x "
        f"{steps} batch(es) accumulated"
    )


def dry_run(recipe: "Recipe", gpu_bytes: int | None) -> None:
    """Print parameter groups, steps, the checkpoint plan of the longest sample, and whether it fits."""
    from rich.table import Table

    from ..training.parameters import parameter_groups
    from ..training.run import make_trainable

    gpu_bytes = gpu_bytes or gpu_at_hand_bytes()
    config = _config(recipe.model)
    recipe, choices, data_lines, num_tokens = _with_data(recipe, config)
    model = make_trainable(on_meta(config, str(recipe.dtype)), recipe)
    assert recipe.learning_rate is not None
    groups = parameter_groups(model, recipe.learning_rate, recipe.vision_learning_rate, recipe.weight_decay)
    console = make_console(highlight=False, width=100)
    table = Table(title="what trains")
    for name in ("group", "tensors", "parameters", "learning rate", "weight decay"):
        table.add_column(name, justify="left" if name == "group" else "right")
    for group in groups:
        rates, size = (f"{group[key]:g}" for key in ("lr", "weight_decay")), sum(p.numel() for p in group["params"])
        table.add_row(group["name"], str(len(group["params"])), f"{size:,}", *rates)
    console.print(table)
    console.print(
        f"AdamW, betas {recipe.adam_beta1:g} and {recipe.adam_beta2:g}; cosine after {recipe.warmup_ratio:.0%} of "
        f"warm-up; gradients clipped at {recipe.max_grad_norm:g}"
    )
    console.print(_batch_line(recipe))
    for line in [*(f"chosen, {choice}" for choice in choices), *data_lines]:
        console.print(line)
    num_tokens = num_tokens or recipe.max_tokens
    if num_tokens is None:
        console.print(
            "the data are not there yet, so neither steps nor memory can be told; max_tokens would do for memory"
        )
        return
    _memory_lines(model, recipe, num_tokens, gpu_bytes, groups, console)


def _config(model: str) -> Any:
    """Of the model where it is there; else that of its size, by its name."""
    from ..loading import load
    from ..modeling.configuration_video_ma2mba import PRESETS, VideoMa2mbaConfig

    if Path(model).is_dir():
        return load(VideoMa2mbaConfig, model)
    size = next((size for size in PRESETS if size in model), None)
    if size is None:
        raise ValueError(f"{model}: there is no such folder, and its name holds none of {', '.join(PRESETS)}")
    return VideoMa2mbaConfig.from_preset(size)


def _with_data(recipe: "Recipe", config: Any) -> "tuple[Recipe, list[Choice], list[str], int | None]":
    """The recipe with nothing left open, what was chosen, what to say of the data, tokens of the longest sample.

    Where the model or the data are not there yet, what depends on them is not told.
    """
    from ..loading import load
    from ..processing import VideoMa2mbaProcessor
    from ..training.choices import choose
    from ..training.run import read_all, settle

    if not all(Path(folder).is_dir() for folder in (recipe.model, *recipe.data)):
        hidden_size = config.text_config.hidden_size
        options: dict[str, Any] = {"num_samples": None, "is_held_out": bool(recipe.held_out), "on_gpu": True}
        recipe, made = choose(recipe, hidden_size=hidden_size, **options)
        told = ("learning_rate", "vision_learning_rate", "dtype")  # what does not depend on the data
        return recipe, [choice for choice in made if choice.key in told], [], None
    data, held_out, choices = read_all(recipe, load(VideoMa2mbaProcessor, recipe.model))
    recipe, made = settle(recipe, data, held_out)
    if recipe.streaming:
        return recipe, [*choices, *made], [f"streamed; {recipe.max_steps} steps"], None
    steps = recipe.max_steps or -(-len(data) * recipe.num_epochs // recipe.global_batch_size)
    longest = max(data["num_tokens"])
    line = f"{len(data):,} samples, {steps:,.0f} steps; the longest sample has about {longest:,} tokens"
    return recipe, [*choices, *made], [line], min(longest, recipe.max_tokens or longest)


def _memory_lines(
    model: "torch.nn.Module", recipe: "Recipe", num_tokens: int, gpu_bytes: int | None, groups: list[dict], console: Any
) -> None:
    from ..modeling.checkpoint_plan import InfeasibleMemoryBudget, format_bytes

    config: Any = model.config
    batch, options, ranks = recipe.device_batch_size, recipe.gradient_checkpointing, recipe.sequence_parallel
    devices = int(os.environ.get("WORLD_SIZE", ranks))
    # of what one device holds; what it holds of a shared video is a span
    num_tokens = -(-num_tokens // ranks)
    num_frames = batch * (num_tokens // config.tokens_per_frame)
    training = Training(_engine(recipe, devices), devices, recipe.accumulation_steps(devices), ranks)
    sizes = Sizes.of(model, autocast=recipe.bf16)
    fixed = training.fixed(
        sizes, options is not None, 2 * sizes.trained_bytes, num_frames * 3 * config.vision_config.image_size**2
    )
    bytes_of = {"float32": 4, "bfloat16": 2}[str(recipe.dtype)]
    try:
        plan, activations_bytes = planned(
            config, batch, num_tokens, options, dtype_bytes=bytes_of, compute_bytes=2 if recipe.bf16 else bytes_of,
            num_frames=num_frames, trains_vision=any(group["name"].startswith("vision") for group in groups),
        )  # fmt: skip
    except InfeasibleMemoryBudget as error:
        raise ValueError(f"the recipe's memory_budget_bytes: {error}") from error
    console.print(f"{batch} x {num_tokens:,} tokens: {plan or 'no gradient checkpointing'}", soft_wrap=True)
    parts = {**fixed.parts, "activations_bytes": activations_bytes}
    total_bytes = needed_bytes(fixed, activations_bytes)
    sums = fixed.float32_sums_bytes
    console.print(
        ", ".join(f"{name.removesuffix('_bytes')} {format_bytes(size)}" for name, size in parts.items() if size)
        + f"; with what is kept back {format_bytes(total_bytes)}"
        + (f"; of the gradients, {format_bytes(sums)} are for summing them in float32" if sums else ""),
        soft_wrap=True,
    )
    if gpu_bytes is None:
        console.print("no GPU here: say with --gpu-memory what it must fit into")
    else:
        console.print(f"fits into {format_bytes(gpu_bytes)}: {'yes' if total_bytes <= gpu_bytes else 'no'}")


def _engine(recipe: "Recipe", devices: int) -> str | None:
    """What shares what among the devices, as `Training` knows it."""
    if devices == 1:
        return None
    if recipe.fsdp_config:
        return "fsdp2"
    if recipe.deepspeed is None:
        return "ddp"
    from ..training.engines import zero_stage

    stage = zero_stage(recipe.deepspeed)
    return f"zero{stage}" if stage else "ddp"
