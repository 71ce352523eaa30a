"""From a recipe to a trained model: data, model, Trainer, and a report of what happened."""

import importlib.util
import math
import os
import shutil
import sys
import time
from contextlib import suppress
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import EarlyStoppingCallback, PrinterCallback, ProgressCallback, TrainingArguments, set_seed
from transformers.integrations import TensorBoardCallback

from ..data.collator import VideoChatCollator
from ..data.holding_out import hold_out, videos_of
from ..data.joining import join
from ..data.manifest import load_manifest, read_description
from ..loading import load
from ..modeling import VideoMa2mbaForConditionalGeneration
from ..modeling.configuration_video_ma2mba import VideoMa2mbaConfig
from ..processing import VideoMa2mbaProcessor
from .choices import Choice, choose, keeps_best
from .engines import check_engine, check_shared, engine_arguments
from .held_out import HeldOut, Lines, advice, answer_metrics
from .parameters import set_trainable
from .recipe import Recipe
from .report import write_report
from .sequence_parallel import SequenceParallelTrainer
from .trainer import VideoMa2mbaTrainer, last_checkpoint

CHECKPOINTS, MODEL = "checkpoints", "model"
WORTH_GOING_ON = 0.01  # by which the held-out loss must fall; less is no reason to train on
SHUFFLED_ROWS = 1000  # of a stream, from which the next one is drawn


@dataclass(frozen=True)
class Prepared:
    """What a recipe comes to, before anything is trained.

    Attributes:
        recipe: With nothing left open.
        choices: What was, and what it became.
    """

    recipe: Recipe
    model: torch.nn.Module
    processor: VideoMa2mbaProcessor
    train_data: Any
    evaluation_data: Any | None
    choices: tuple[Choice, ...] = ()

    @property
    def keeps_best(self) -> bool:
        return keeps_best(self.recipe, self.evaluation_data is not None)


def prepare_run(recipe: Recipe) -> Prepared:
    """Read model, processor and data of a recipe, choose what it leaves open, and freeze what does not train.

    Raises:
        ValueError: Data, model or recipe cannot be used; what costs least to find out is said first.
    """
    set_seed(recipe.seed)
    quantization = _quantization(recipe)
    processor = load(VideoMa2mbaProcessor, recipe.model)
    train_data, evaluation_data, choices = read_all(recipe, processor)
    recipe, made = settle(recipe, train_data, evaluation_data)
    keeps_best(recipe, evaluation_data is not None)  # before the weights are read
    model = load(
        VideoMa2mbaForConditionalGeneration, recipe.model, dtype=getattr(torch, str(recipe.dtype)), **quantization
    )
    model = make_trainable(model, recipe)
    return Prepared(recipe, model, processor, train_data, evaluation_data, (*choices, *made))


def settle(recipe: Recipe, train_data: Any, evaluation_data: Any | None) -> tuple[Recipe, list[Choice]]:
    """The recipe with nothing left open, and what was chosen."""
    config = load(VideoMa2mbaConfig, recipe.model)
    return choose(
        recipe,
        hidden_size=config.text_config.hidden_size,
        num_samples=None if recipe.streaming else len(train_data),
        is_held_out=evaluation_data is not None,
        on_gpu=torch.cuda.is_available(),
        devices_here=int(os.environ.get("LOCAL_WORLD_SIZE", "1")),
    )


def _quantization(recipe: Recipe) -> dict[str, Any]:
    """What `from_pretrained` takes for weights in 4 bits.

    Raises:
        ValueError: They cannot be had here; says what to do.
    """
    if recipe.quantization is None:
        return {}
    if not torch.cuda.is_available():
        raise ValueError(
            "quantization nf4: needs an NVIDIA GPU, and torch finds none here; leave it out, and finetune-lora trains "
            "the same adapters on weights as they are"
        )
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ValueError("quantization nf4: needs bitsandbytes: pip install bitsandbytes")
    from transformers import BitsAndBytesConfig

    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
        llm_int8_skip_modules=[r".*vision_tower", r".*multi_modal_projector", "lm_head"],  # they see, and are small
    )
    return {"quantization_config": config, "device_map": {"": int(os.environ.get("LOCAL_RANK", "0"))}}


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


def read_all(recipe: Recipe, processor: VideoMa2mbaProcessor) -> tuple[Any, Any | None, list[Choice]]:
    """Data to train on, data that are held out (None: nothing is), and what is to be said of them."""
    if recipe.evaluation_data or not recipe.held_out:
        held = None
        if recipe.evaluation_data:  # a stream has no end, an evaluation must have one
            whole = replace(recipe, streaming=False)
            held = complete(read_rows(recipe.evaluation_data, whole), whole, processor)
        return complete(read_rows(recipe.data, recipe), recipe, processor), held, []
    rows = read_rows(recipe.data, recipe)
    trained, kept = hold_out(rows, recipe.held_out, recipe.seed)
    if not kept:
        reason = "all samples show one video: nothing can be held out, so nothing tells what it knows of new ones"
        return complete(rows, recipe, processor), None, [Choice("held_out", 0, reason)]
    videos = {medium for index in kept for medium in videos_of(rows[index])}
    said = f"of {len(rows)} samples, drawn by video: {len(videos)} are not trained on; --set held_out=0 trains on all"
    parts = (complete(rows.select(indices), recipe, processor) for indices in (trained, kept))
    return *parts, [Choice("held_out", len(kept), said)]


def read_rows(folders: tuple[str, ...], recipe: Recipe) -> Any:
    """All folders as one data set."""
    import datasets

    parts = [load_manifest(folder, recipe.streaming) for folder in folders]
    if recipe.streaming:
        # Endless, so that no process is through with its files before the others; all rows are drawn equally often.
        endless = [part.repeat(None) for part in parts]
        sizes = [read_description(Path(folder))["num_samples"] for folder in folders]
        rows = endless[0]
        if len(parts) > 1:
            rows = datasets.interleave_datasets(endless, [size / sum(sizes) for size in sizes], recipe.seed)
        return rows.shuffle(seed=recipe.seed, buffer_size=SHUFFLED_ROWS)
    return datasets.concatenate_datasets(parts)


def complete(rows: Any, recipe: Recipe, processor: VideoMa2mbaProcessor) -> Any:
    """Rows joined where the recipe asks for it, with `num_tokens`, an estimate by which samples are grouped."""
    if recipe.streaming:
        return rows
    per_frame = processor.tokens_per_frame

    def estimate(batch: dict[str, list]) -> dict[str, list]:
        rows = zip(batch["watched_s"], batch["num_images"], batch["num_characters"], strict=True)
        return {"num_tokens": [math.ceil(s * recipe.fps + n) * per_frame + c // 4 for s, n, c in rows]}

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
    recipe: Any = prepared.recipe  # of which nothing is open any more
    model = prepared.model
    on_gpu = torch.cuda.is_available()
    num_devices = int(os.environ.get("WORLD_SIZE", "1"))
    workers = num_workers(recipe, prepared.train_data, num_devices)
    checkpointing: dict[str, Any] = {}
    if recipe.gradient_checkpointing is not None:
        known = {field.name for field in fields(TrainingArguments)}
        name = "activation_checkpointing" if "activation_checkpointing" in known else "gradient_checkpointing"
        checkpointing = {name: True, f"{name}_kwargs": dict(recipe.gradient_checkpointing)}
    config: Any = model.config
    is_evaluated = prepared.evaluation_data is not None
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
        prediction_loss_only=not recipe.sample_answers,
        logging_steps=recipe.logging_steps,
        logging_nan_inf_filter=False,
        save_steps=recipe.save_steps,
        save_total_limit=recipe.save_total_limit,
        eval_strategy="steps" if recipe.evaluation_steps and is_evaluated else "no",
        eval_steps=recipe.evaluation_steps or None,
        load_best_model_at_end=prepared.keeps_best,
        metric_for_best_model="eval_loss" if prepared.keeps_best else None,
        greater_is_better=False if prepared.keeps_best else None,
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
        initial_states=recipe.initial_states, compute_metrics=answer_metrics if recipe.sample_answers else None,
    )  # fmt: skip
    trainer.compares_answers = recipe.sample_answers > 0
    for raw in (ProgressCallback, PrinterCallback):
        trainer.remove_callback(raw)
    trainer.add_callback(Lines())
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
    new = [folder for folder in (checkpoints, *checkpoints.parents) if not folder.exists()]
    checkpoints.mkdir(parents=True, exist_ok=True)
    first = os.environ.get("RANK", "0") == "0"
    if not resume and any(checkpoints.glob("checkpoint-*")):
        raise ValueError(f"{checkpoints} holds checkpoints: go on with --resume, or choose another output")
    start = time.perf_counter()
    try:
        trainer = make_trainer(prepared)
        check_shared(trainer, output)
    except Exception:
        with suppress(OSError):  # a start that fails leaves no folder behind
            for folder in new if first else ():
                folder.rmdir()
        raise
    checkpoint = None
    if resume:
        if first:
            last_checkpoint(checkpoints)  # removes what was cut off, before the others look
        trainer.accelerator.wait_for_everyone()
        checkpoint = last_checkpoint(checkpoints)
        if checkpoint is None and first:
            print(f"{checkpoints} holds no checkpoint to go on from: the training begins", file=sys.stderr)
    step = int(checkpoint.name.rpartition("-")[2]) if checkpoint else None
    held_out = _watch_held_out(trainer, prepared, output, step)
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    after = None
    if prepared.evaluation_data is not None:
        after = held_out.best if prepared.keeps_best else held_out.measure()
    report: dict[str, Any] = {}
    if trainer.is_world_process_zero():
        losses = [entry for entry in trainer.state.log_history if "loss" in entry]
        num_samples = None if prepared.recipe.streaming else len(prepared.train_data)
        warnings = advice(
            held_out.evaluations, losses, num_samples=num_samples, max_steps=trainer.state.max_steps,
            keeps_best=prepared.keeps_best,
        )  # fmt: skip
        report = write_report(
            output, prepared.recipe, prepared.choices, trainer, held_out.evaluations, after, warnings,
            time.perf_counter() - start,
        )  # fmt: skip
    _save_model(trainer, output / MODEL)
    return report


def _watch_held_out(trainer: VideoMa2mbaTrainer, prepared: Prepared, output: Path, step: int | None) -> HeldOut:
    """Lets the trainer measure the held-out data, and stop early where the recipe asks for it."""
    recipe = prepared.recipe
    tensorboard = next(
        callback for callback in trainer.callback_handler.callbacks if isinstance(callback, TensorBoardCallback)
    )
    held_out = HeldOut(trainer, output, step, recipe.sample_answers, tensorboard)
    trainer.add_callback(held_out)
    if recipe.patience and prepared.keeps_best:
        trainer.add_callback(EarlyStoppingCallback(recipe.patience, early_stopping_threshold=WORTH_GOING_ON))
    return held_out


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
