"""From a recipe to a trained model: data, model, Trainer, and a report of what happened."""

import json
import math
import os
import shutil
import sys
import time
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback, TrainingArguments, set_seed
from transformers.integrations import TensorBoardCallback

from ..data.collator import VideoChatCollator
from ..data.joining import join
from ..data.manifest import load_manifest, read_description
from ..files import write_json
from ..loading import load
from ..modeling import VideoMa2mbaForConditionalGeneration
from ..processing import VideoMa2mbaProcessor
from .engines import check_engine, check_shared, engine_arguments
from .parameters import parameter_groups, set_trainable
from .recipe import Recipe
from .report import write_report
from .sequence_parallel import SequenceParallelTrainer
from .trainer import VideoMa2mbaTrainer, last_checkpoint

CHECKPOINTS, MODEL = "checkpoints", "model"
SHUFFLED_ROWS = 1000  # of a stream, from which the next one is drawn


@dataclass(frozen=True)
class Prepared:
    """What a recipe comes to, before anything is trained."""

    recipe: Recipe
    model: torch.nn.Module
    processor: VideoMa2mbaProcessor
    train_data: Any
    evaluation_data: Any | None


def prepare_run(recipe: Recipe) -> Prepared:
    """Read model, processor and data of a recipe, and freeze what does not train."""
    set_seed(recipe.seed)
    processor = load(VideoMa2mbaProcessor, recipe.model)
    train_data = read_data(recipe.data, recipe, processor)
    evaluation_data = None
    if recipe.evaluation_data:  # a stream has no end, an evaluation must have one
        evaluation_data = read_data(recipe.evaluation_data, replace(recipe, streaming=False), processor)
    model = load(VideoMa2mbaForConditionalGeneration, recipe.model, dtype=getattr(torch, recipe.dtype))
    return Prepared(recipe, make_trainable(model, recipe), processor, train_data, evaluation_data)


def make_trainable(model: torch.nn.Module, recipe: Recipe) -> torch.nn.Module:
    """The model with what the recipe trains unfrozen; wrapped by PEFT where it asks for adapters."""
    set_trainable(model, recipe.trains)
    if recipe.lora is None:
        return model
    from peft import get_peft_model

    from .lora import lora_config

    model = get_peft_model(model, lora_config(**asdict(recipe.lora)))
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()  # adapters learn in float32, whatever the frozen weights are
        elif any(f"{part}." in name for part in recipe.trains):
            parameter.requires_grad_("lora_" not in name)
    return model


def read_data(folders: tuple[str, ...], recipe: Recipe, processor: VideoMa2mbaProcessor) -> Any:
    """All folders as one data set, with `num_tokens`, an estimate by which samples are grouped."""
    import datasets

    parts = [load_manifest(folder, recipe.streaming) for folder in folders]
    per_frame = processor.tokens_per_frame

    def estimate(batch: dict[str, list]) -> dict[str, list]:
        rows = zip(batch["watched_s"], batch["num_images"], batch["num_characters"], strict=True)
        return {"num_tokens": [math.ceil(s * recipe.fps + n) * per_frame + c // 4 for s, n, c in rows]}

    if recipe.streaming:
        # Endless, so that no process is through with its files before the others; all rows are drawn equally often.
        endless = [part.repeat(None) for part in parts]
        sizes = [read_description(Path(folder))["num_samples"] for folder in folders]
        rows = endless[0]
        if len(parts) > 1:
            rows = datasets.interleave_datasets(endless, [size / sum(sizes) for size in sizes], recipe.seed)
        return rows.shuffle(seed=recipe.seed, buffer_size=SHUFFLED_ROWS)
    rows = datasets.concatenate_datasets(parts)
    if recipe.joining is not None:
        rows = join(rows, recipe.joining, recipe.seed)
    return rows.map(estimate, batched=True)


def computes_in_bfloat16(recipe: Recipe) -> bool:
    """Whether products are computed in bfloat16, with weights as they are."""
    return recipe.bf16 and torch.cuda.is_available()


def num_workers(recipe: Recipe, data: Any, num_devices: int) -> int:
    """Processes that decode for one device. Of a stream no more than it has files, since one of them reads a file."""
    workers = recipe.workers(int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    if not recipe.streaming:
        return workers
    files = data.num_shards // num_devices or data.num_shards  # too few: each device reads all, and takes its rows
    if files < workers:
        print(
            f"warning: the stream has {data.num_shards} file(s), so {files} process(es) decode, not {workers}; more "
            "come from `video-ma2mba data prepare --parquet --rows-per-file N`",
            file=sys.stderr,
        )  # fmt: skip
    return min(workers, files)


def make_trainer(prepared: Prepared) -> VideoMa2mbaTrainer:
    """The Trainer of a recipe."""
    recipe, model = prepared.recipe, prepared.model
    on_gpu = torch.cuda.is_available()
    num_devices = int(os.environ.get("WORLD_SIZE", "1"))
    workers = num_workers(recipe, prepared.train_data, num_devices)
    checkpointing: dict[str, Any] = {}
    if recipe.gradient_checkpointing is not None:
        known = {field.name for field in fields(TrainingArguments)}
        name = "activation_checkpointing" if "activation_checkpointing" in known else "gradient_checkpointing"
        checkpointing = {name: True, f"{name}_kwargs": dict(recipe.gradient_checkpointing)}
    config: Any = model.config
    engine = engine_arguments(recipe, num_devices, computes_in_bfloat16(recipe))
    arguments = TrainingArguments(
        output_dir=str(Path(recipe.output) / CHECKPOINTS),
        learning_rate=recipe.learning_rate,
        weight_decay=recipe.weight_decay,
        adam_beta1=recipe.adam_beta1,
        adam_beta2=recipe.adam_beta2,
        warmup_steps=recipe.warmup_ratio,  # below one: a part of all steps
        lr_scheduler_type="cosine",
        max_grad_norm=recipe.max_grad_norm,
        per_device_train_batch_size=recipe.device_batch_size,
        per_device_eval_batch_size=1,
        gradient_accumulation_steps=recipe.accumulation_steps(num_devices),
        num_train_epochs=recipe.num_epochs,
        max_steps=recipe.max_steps or -1,
        use_cpu=not on_gpu,
        accelerator_config={"dispatch_batches": False},  # each process makes its own batches
        remove_unused_columns=False,  # the collator reads them
        dataloader_num_workers=workers,
        dataloader_persistent_workers=workers > 0,
        dataloader_pin_memory=on_gpu,
        prediction_loss_only=True,
        logging_steps=recipe.logging_steps,
        logging_nan_inf_filter=False,
        save_steps=recipe.save_steps,
        save_total_limit=recipe.save_total_limit,
        eval_strategy="steps" if recipe.evaluation_steps else "no",
        eval_steps=recipe.evaluation_steps or None,
        ddp_find_unused_parameters=False,  # the model sees to it that every batch uses all
        report_to="none",  # TensorBoard is told below where to write
        seed=recipe.seed,
        **engine,
        **checkpointing,
    )
    collator = VideoChatCollator(
        prepared.processor,
        fps=recipe.fps,
        max_tokens=recipe.max_tokens,
        max_frames=recipe.max_frames,
        too_long=recipe.too_long,
        pad_to_multiple_of=config.text_config.chunk_size,
        with_info=True,
        strict=recipe.strict,
    )
    tensorboard = TensorBoardCallback()
    tensorboard.logging_dir = str(Path(recipe.output) / "logs")  # the Trainer's own way is an environment variable
    make: Any = VideoMa2mbaTrainer
    if recipe.sequence_parallel > 1:
        make = partial(SequenceParallelTrainer, sequence_parallel=recipe.sequence_parallel)
    trainer = make(
        model, arguments, collator, prepared.train_data, prepared.evaluation_data, callbacks=[tensorboard],
        processing_class=prepared.processor, vision_learning_rate=recipe.vision_learning_rate,
        initial_states=recipe.initial_states,
    )  # fmt: skip
    check_engine(trainer, recipe)
    if recipe.fsdp_config and computes_in_bfloat16(recipe):
        trainer.autocast_dtype = torch.bfloat16
    return trainer


def train(prepared: Prepared, *, resume: bool = False) -> dict[str, Any]:
    """Train, save the model under `output/model`, and write `train_report.json` and `loss.png`.

    Args:
        resume: Go on from the last whole checkpoint in `output`; with none there, begin.

    Returns:
        The report.

    Raises:
        ValueError: There are checkpoints in `output` already, and `resume` was not asked for; or `output` is not one
            folder for all processes.
        NonFiniteLoss: See `VideoMa2mbaTrainer`.
    """
    output = Path(prepared.recipe.output)
    checkpoints = output / CHECKPOINTS
    checkpoints.mkdir(parents=True, exist_ok=True)
    first = os.environ.get("RANK", "0") == "0"
    if not resume and any(checkpoints.glob("checkpoint-*")):
        raise ValueError(f"{checkpoints} holds checkpoints: go on with --resume, or choose another output")
    start = time.perf_counter()
    trainer = make_trainer(prepared)
    check_shared(trainer, output)
    checkpoint = None
    if resume:
        if first:
            last_checkpoint(checkpoints)  # removes what was cut off, before the others look
        trainer.accelerator.wait_for_everyone()
        checkpoint = last_checkpoint(checkpoints)
    held_out = HeldOutLoss(trainer, output / "held_out_loss.json", checkpoint is not None)
    trainer.add_callback(held_out)
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    after = trainer.evaluate()["eval_loss"] if prepared.evaluation_data is not None else None
    report: dict[str, Any] = {}
    if trainer.is_world_process_zero():
        report = write_report(output, prepared, trainer, held_out.before, after, time.perf_counter() - start)
    _save_model(trainer, output / MODEL)
    return report


class HeldOutLoss(TrainerCallback):
    """Measures the loss on the evaluation data before the first step; a resumed run remembers it.

    At the beginning of the training and not before it: only then are model and optimizer what the engine made of them.

    Attributes:
        before: The loss; None without evaluation data.
    """

    def __init__(self, trainer: VideoMa2mbaTrainer, kept: Path, resumed: bool):
        self.trainer, self.kept, self.resumed = trainer, kept, resumed
        self.before: float | None = None

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        if self.trainer.eval_dataset is None:
            return
        if self.resumed and self.kept.is_file():
            self.before = json.loads(self.kept.read_text(encoding="utf-8"))["before"]
            return
        self.before = self.trainer.evaluate()["eval_loss"]
        if self.trainer.is_world_process_zero():
            write_json(self.kept, {"before": self.before})


def _save_model(trainer: VideoMa2mbaTrainer, folder: Path) -> None:
    """Model and processor, or adapters alone; the folder appears when it is whole."""
    unfinished = folder.with_name(f"{folder.name}.partial")
    if trainer.is_world_process_zero():
        shutil.rmtree(unfinished, ignore_errors=True)
    trainer.accelerator.wait_for_everyone()
    if trainer.is_fsdp_enabled:  # whole, also where the checkpoints are sharded
        trainer._save(str(unfinished), state_dict=trainer.accelerator.get_state_dict(trainer.model))
    else:
        trainer.save_model(str(unfinished))
    trainer.accelerator.wait_for_everyone()
    if trainer.is_world_process_zero():
        (unfinished / "training_args.bin").unlink(missing_ok=True)  # a pickle, of no use to who loads the model
        shutil.rmtree(folder, ignore_errors=True)
        unfinished.rename(folder)


def describe_groups(prepared_model: torch.nn.Module, recipe: Recipe) -> list[dict[str, Any]]:
    """The parameter groups as numbers: name, tensors, parameters, lr, weight_decay."""
    groups = parameter_groups(prepared_model, recipe.learning_rate, recipe.vision_learning_rate, recipe.weight_decay)
    return [
        {
            "name": group["name"],
            "tensors": len(group["params"]),
            "parameters": sum(parameter.numel() for parameter in group["params"]),
            "bytes": sum(parameter.numel() * parameter.element_size() for parameter in group["params"]),
            "lr": group["lr"],
            "weight_decay": group["weight_decay"],
        }
        for group in groups
    ]
