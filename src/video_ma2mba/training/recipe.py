"""Recipes: what to train, on what, and how, in one YAML file.

A name such as `3.1b-stage1.5` means the shipped `recipes/stage1.5.yaml` with `{size}` replaced by `3.1b` in its texts.
"""

import dataclasses
import difflib
import inspect
import os
import re
import types
import typing
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from ..data.joining import JoiningOptions
from .initial_states import InitialStatesOptions

RECIPES = Path(__file__).with_name("recipes")
SIZES = ("0.7b", "1.8b", "3.1b")
MAX_WORKERS = 8  # a device waits for none of more, and each holds samples
PARTS = ("vision_tower", "multi_modal_projector", "language_model")


@dataclass(frozen=True)
class Lora:
    """Low-rank adapters instead of the weights themselves; see `lora.lora_config`.

    Attributes:
        rank: Of the adapters.
        alpha: Their products are scaled by alpha / rank.
        dropout: Part of an adapter's inputs that is left out while training.
        vision_tower: Adapters on the tower too.
    """

    rank: int = 16
    alpha: int = 32
    dropout: float = 0.05
    vision_tower: bool = False

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ValueError(f"lora.rank must be at least 1, got {self.rank}")


@dataclass(frozen=True)
class Recipe:
    """Everything that decides a training run. Paths are relative to where the command runs.

    What is null where "null: chosen" stands follows the data, the model and the machine: see `choices.choose`.

    Attributes:
        model: Folder or Hub id to begin with.
        data: Folders that `video-ma2mba data prepare` wrote.
        output: Folder for checkpoints, logs, the report, and the trained model under `model`.
        evaluation_data: Prepared folders that are not trained on: the loss on them is measured before and after.
        held_out: Part of the samples of `data` that takes their place, drawn by video; 0 trains on all.
        evaluation_steps: Measures it every so many steps too; 0 does not, null: chosen.
        sample_answers: So many answers to it are shown each time, and the share of exact answers; 0: the loss alone.
        keep_best: `model` becomes the checkpoint whose held-out loss was the lowest, not the last.
        patience: Stops after so many evaluations in a row that lower the held-out loss by less than 0.01; 0 never does.
        trains: Parts whose weights move: vision_tower, multi_modal_projector, language_model. The others are frozen.
        lora: Adapters instead of weights; null trains the weights.
        quantization: "nf4" keeps the frozen weights in 4 bits (QLoRA), with bitsandbytes on a GPU; null does not.
        learning_rate: Of the language model and the projector, or the adapters; null: chosen.
        vision_learning_rate: Of the tower; null: a tenth of learning_rate, as in the paper.
        weight_decay: Of matrices; norms, biases, A_log, D and dt_bias have none.
        adam_beta1: AdamW's first beta.
        adam_beta2: AdamW's second beta.
        warmup_ratio: Part of all steps in which the rate rises; then it falls along half a cosine.
        max_grad_norm: Gradients are clipped to this norm.
        global_batch_size: Samples per optimizer step over all devices: accumulation follows from it.
        device_batch_size: Samples at a time on one device.
        num_epochs: Passes over the data, where max_steps is 0.
        max_steps: Optimizer steps; 0 goes by num_epochs, null: chosen.
        dtype: Of the weights: "float32" or "bfloat16"; null: chosen.
        bf16: Compute in bfloat16 by autocast, on a GPU.
        fps: Frames per second of video.
        max_frames: Of one sample; null for no limit.
        max_tokens: Of one sample; null for no limit.
        too_long: A sample beyond them is left out ("refuse"), cut ("cut") or watched at fewer FPS ("lower_fps").
        gradient_checkpointing: Options of `gradient_checkpointing_enable`; null trains without it.
        initial_states: Where the states of a sample begin; null: with zeros.
        joining: Makes samples longer than the data; null: samples are as they are.
        save_steps: Optimizer steps between checkpoints; null: chosen.
        save_total_limit: Checkpoints kept, at least 2; the best one is kept besides.
        logging_steps: Optimizer steps between lines of the log; null: chosen.
        num_workers: Processes that decode for one device; null for as many as it has cores, at most 8.
        seed: Of the order, of what is held out, and of dropout.
        streaming: Read the manifests of `data` row by row, again and again; needs max_steps.
        strict: Stop at a sample that cannot be used, instead of leaving it out.
        deepspeed: A file of DeepSpeed, or a shipped one by its name: zero1, zero2, zero3.
        fsdp_config: A file of FSDP, or a shipped one by its name: fsdp2, hsdp.
        sequence_parallel: Devices that share each sample, a span of its tokens and frames for each.
    """

    model: str
    data: tuple[str, ...]
    output: str
    evaluation_data: tuple[str, ...] = ()
    held_out: float = 0.0
    evaluation_steps: int | None = 0
    sample_answers: int = 0
    keep_best: bool = False
    patience: int = 0
    trains: tuple[str, ...] = PARTS
    lora: Lora | None = None
    quantization: str | None = None
    learning_rate: float | None = 4e-5
    vision_learning_rate: float | None = None
    weight_decay: float = 0.05
    adam_beta1: float = 0.9
    adam_beta2: float = 0.95
    warmup_ratio: float = 0.1
    max_grad_norm: float = 1.0
    global_batch_size: int = 32
    device_batch_size: int = 1
    num_epochs: float = 1.0
    max_steps: int | None = 0
    dtype: str | None = "float32"
    bf16: bool = True
    fps: float = 1.0
    max_frames: int | None = None
    max_tokens: int | None = None
    too_long: str = "refuse"
    gradient_checkpointing: dict[str, Any] | None = field(default_factory=dict)
    initial_states: InitialStatesOptions | None = None
    joining: JoiningOptions | None = None
    save_steps: int | None = 500
    save_total_limit: int = 2
    logging_steps: int | None = 10
    num_workers: int | None = None
    seed: int = 0
    streaming: bool = False
    strict: bool = False
    deepspeed: str | None = None
    fsdp_config: str | None = None
    sequence_parallel: int = 1

    def __post_init__(self) -> None:
        if unknown := set(self.trains) - set(PARTS):
            raise ValueError(f"trains: unknown {', '.join(sorted(unknown))}; known are {', '.join(PARTS)}")
        for name in ("learning_rate", "global_batch_size", "device_batch_size", "logging_steps", "save_steps", "fps"):
            if (value := getattr(self, name)) is not None and not value > 0:
                raise ValueError(f"{name} must be positive, got {value}")
        for name in ("evaluation_steps", "sample_answers", "patience", "num_workers"):
            if (value := getattr(self, name)) is not None and value < 0:
                raise ValueError(f"{name} must not be negative, got {value}")
        if not self.data or not (self.trains or self.lora):
            raise ValueError("a recipe needs data, and something that trains")
        if self.dtype not in ("float32", "bfloat16", None):
            raise ValueError(f"dtype must be float32 or bfloat16, got {self.dtype!r}")
        if not 0 <= self.warmup_ratio < 1:
            raise ValueError(f"warmup_ratio must lie in [0, 1), got {self.warmup_ratio}")
        if (self.max_steps or 0) < 0 or (not self.max_steps and not self.num_epochs > 0):
            raise ValueError("say how long to train: num_epochs or max_steps must be positive")
        if not 0 <= self.held_out < 1:
            raise ValueError(f"held_out must lie in [0, 1), got {self.held_out}")
        if self.quantization not in (None, "nf4"):
            raise ValueError(f"quantization must be nf4 or null, got {self.quantization!r}")
        if self.quantization and (self.lora is None or self.trains):
            raise ValueError("quantization: weights in 4 bits cannot move; train adapters alone, as finetune-lora does")
        if self.streaming and not self.max_steps:
            raise ValueError("streaming: data that is read row by row has no known end, so max_steps must be given")
        if self.streaming and self.held_out and not self.evaluation_data:
            raise ValueError(
                "held_out: of data that is read row by row no part can be drawn; let held_out be 0, or name "
                "evaluation_data"
            )
        if self.streaming and self.joining:
            raise ValueError("joining: needs to know all samples beforehand, so streaming must be off")
        if self.save_total_limit < 2:
            raise ValueError("save_total_limit must be at least 2: the newest checkpoint may be half written")
        if self.deepspeed and self.fsdp_config:
            raise ValueError("give either deepspeed or fsdp_config, not both")
        if self.sequence_parallel < 1:
            raise ValueError(f"sequence_parallel must be at least 1, got {self.sequence_parallel}")
        if self.sequence_parallel > 1 and (self.device_batch_size > 1 or self.streaming):
            raise ValueError(
                "sequence_parallel shares one sample at a time, drawn by its number: let device_batch_size be 1 and "
                "streaming false"
            )
        if self.sequence_parallel > 1 and (self.gradient_checkpointing or {}).get("gradient_horizon") is not None:
            raise ValueError(
                "gradient_horizon and sequence_parallel do not go together: with a horizon the memory does not grow "
                "with the video, so let sequence_parallel be 1"
            )
        if self.sequence_parallel > 1 and self.initial_states is not None and self.initial_states.kind != "zeros":
            raise ValueError(
                f"initial_states.kind {self.initial_states.kind} takes the last states of whole samples, of which "
                "sequence_parallel leaves each device a part: let one of them be, or kind be zeros"
            )

    def workers(self, devices_here: int = 1) -> int:
        """Processes that decode for each of so many devices of this machine."""
        if self.num_workers is not None:
            return self.num_workers
        return min(max((os.cpu_count() or 1) // devices_here, 1), MAX_WORKERS)

    def accumulation_steps(self, num_devices: int) -> int:
        """Batches of one device, or of one group that shares samples, that make up a global batch.

        Raises:
            ValueError: The global batch is no multiple of what all devices take at a time, or `sequence_parallel` does
                not divide the devices.
        """
        if num_devices % self.sequence_parallel:
            raise ValueError(
                f"sequence_parallel {self.sequence_parallel} does not divide the {num_devices} device(s): start a "
                "multiple of it"
            )
        at_a_time = self.device_batch_size * (num_devices // self.sequence_parallel)
        if self.global_batch_size % at_a_time:
            raise ValueError(
                f"global_batch_size {self.global_batch_size} is no multiple of device_batch_size "
                f"{self.device_batch_size} x {num_devices // self.sequence_parallel} device(s) or group(s) of them; "
                "change one of them"
            )
        return self.global_batch_size // at_a_time


def recipe_names() -> list[str]:
    """The names of the shipped recipes."""
    names = sorted(path.stem for path in RECIPES.glob("*.yaml"))
    return [
        f"{size}-{name}" if name.startswith("stage") else name
        for name in names
        for size in SIZES[: None if name.startswith("stage") else 1]
    ]


@dataclass(frozen=True)
class Key:
    """A key of a recipe: its dotted name, the kind of its value, its default ("" where it must be given), a line."""

    name: str
    kind: str
    default: str
    meaning: str


def recipe_keys(cls: Any = Recipe, prefix: str = "") -> list[Key]:
    """All keys of a recipe, also those within groups such as `lora.rank`, in the order of the code."""
    hints, said = typing.get_type_hints(cls), _attributes(cls)
    keys = []
    for one in dataclasses.fields(cls):
        group = next((kind for kind in _options(hints[one.name]) if dataclasses.is_dataclass(kind)), None)
        names = ["mapping" if kind is group else _kind_name(kind) for kind in _options(hints[one.name])]
        if one.default_factory is not dataclasses.MISSING:
            default = yaml.safe_dump(one.default_factory(), default_flow_style=True).strip()
        elif one.default is dataclasses.MISSING:
            default = ""
        else:
            plain = list(one.default) if isinstance(one.default, tuple) else one.default
            default = yaml.safe_dump(plain, default_flow_style=True).replace("...", "").strip()
        keys.append(Key(prefix + one.name, " or ".join(names), default, said[one.name]))
        if group is not None:
            keys += recipe_keys(group, f"{prefix}{one.name}.")
    return keys


def _options(hint: Any) -> tuple[Any, ...]:
    return typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)


def _kind_name(kind: Any) -> str:
    names = {str: "text", float: "number", int: "whole number", bool: "true or false", type(None): "null"}
    return names.get(kind, "list" if typing.get_origin(kind) is tuple else "mapping")


def _attributes(cls: Any) -> dict[str, str]:
    """What the docstring of a class says of its attributes, by their names."""
    text = inspect.cleandoc(cls.__doc__ or "").partition("Attributes:\n")[2].partition("\n\n")[0]
    entries = re.findall(r"^    (\w+): (.*(?:\n     +.*)*)", text, re.MULTILINE)
    return {name: " ".join(meaning.split()) for name, meaning in entries}


def read_recipe(name: str, changes: Sequence[str] = ()) -> Recipe:
    """A shipped recipe by its name, or one in a file.

    Args:
        changes: `key=value`, the value in YAML; `lora.rank=8` reaches into a group.

    Raises:
        ValueError: No such recipe, or one with unknown keys or values of another kind; says which and where.
    """
    size, _, stage = name.partition("-")
    shipped = RECIPES / (f"{stage}.yaml" if size in SIZES else f"{name}.yaml")
    file = Path(name) if name.endswith((".yaml", ".yml")) else shipped
    if not file.is_file():
        close = difflib.get_close_matches(name, recipe_names(), 1)
        meant = f" Did you mean {close[0]}?" if close else ""
        raise ValueError(
            f"{name}: no such recipe.{meant} Shipped are {', '.join(recipe_names())}; or give a .yaml file"
        )
    text = file.read_text(encoding="utf-8")
    where = name if file == shipped else str(file)
    values = _parse(text.replace("{size}", size), where)
    if not isinstance(values, dict):
        raise ValueError(f"{where}: a recipe is a list of `key: value`")
    said: dict[str, str] = {}
    for change in changes:
        key, equals, value = change.partition("=")
        if not equals:
            raise ValueError(f"--set {change}: write key=value")
        group: Any = values
        *path, last = key.split(".")
        for depth, part in enumerate(path):
            if group.get(part) is None and (depth or _may_hold_keys(part)):
                group[part] = {}
            group = group.get(part)
            if not isinstance(group, dict):
                raise ValueError(f"--set {change}: {part} holds no further keys")
        group[last] = _parse(value, f"--set {change}")
        said[key] = f"--set {change}"
    return _make(Recipe, values, where, said)


def _may_hold_keys(name: str) -> bool:
    """Whether a key of a recipe is a group; one that is unknown is refused later, with what was meant."""
    options = _options(typing.get_type_hints(Recipe).get(name, dict))
    return any(dataclasses.is_dataclass(one) or (typing.get_origin(one) or one) is dict for one in options)


def _parse(text: str, where: str) -> Any:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(f"{where}: not YAML: {' '.join(str(error).split())}") from error


def _make(cls: Any, values: dict[str, Any], where: str, said: dict[str, str], prefix: str = "") -> Any:
    """A dataclass of a mapping, its values brought to the types that the class declares.

    Args:
        where: The values are from.
        said: Where the values of some dotted keys are from instead.
        prefix: Of the dotted names of the keys.
    """
    fields = {one.name: one for one in dataclasses.fields(cls)}
    hints = typing.get_type_hints(cls)
    for key in values:
        if key not in fields:
            close = difflib.get_close_matches(key, fields, 1)
            place = said.get(prefix + key) or next((s for k, s in said.items() if k.startswith(f"{key}.")), where)
            hint = f"did you mean {prefix + close[0]!r}?" if close else "`train --keys` lists them all"
            raise ValueError(f"{place}: unknown key {prefix + key!r}; {hint}")
    missing = [
        name for name, one in fields.items()
        if name not in values and one.default is dataclasses.MISSING and one.default_factory is dataclasses.MISSING
    ]  # fmt: skip
    if missing:
        raise ValueError(f"{where}: {', '.join(missing)} must be given, for instance with --set {missing[0]}=...")
    return cls(**{key: _convert(value, hints[key], where, said, prefix + key) for key, value in values.items()})


def _convert(value: Any, hint: Any, where: str, said: dict[str, str], name: str) -> Any:
    options = _options(hint)
    if value is None and type(None) in options:
        return None
    (kind,) = [option for option in options if option is not type(None)]
    origin = typing.get_origin(kind) or kind
    if dataclasses.is_dataclass(origin) and isinstance(value, dict):
        return _make(origin, value, said.get(name, where), said, f"{name}.")
    if origin is tuple and isinstance(value, str | list):
        return tuple(str(one) for one in ([value] if isinstance(value, str) else value))
    if origin is float and isinstance(value, int | float | str) and not isinstance(value, bool):
        # YAML 1.1 takes 1e-3 for a text
        if re.fullmatch(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?", str(value)):
            return float(value)
    elif isinstance(value, origin) and not (origin is int and isinstance(value, bool)):
        return value
    raise ValueError(f"{said.get(name, where)}: {name} must be {getattr(origin, '__name__', origin)}, got {value!r}")
