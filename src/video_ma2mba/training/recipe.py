"""Recipes: what to train, on what, and how, in one YAML file.

A name such as `3.1b-stage1.5` means the shipped `recipes/stage1.5.yaml` with `{size}` replaced by `3.1b` in its texts.
"""

import dataclasses
import difflib
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
    """Low-rank adapters instead of the weights themselves; see `lora.lora_config`."""

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

    Attributes:
        model: Folder or Hub id to begin with.
        data, evaluation_data: Folders that `video-ma2mba data prepare` wrote. The loss on the second is measured before
            and after, and every `evaluation_steps` if that is not 0.
        output: Folder for checkpoints, logs, the report, and the trained model under `model`.
        trains: Of `PARTS`, those whose weights move; the others are frozen. With `lora`, only adapters move.
        learning_rate: Of the language model and the projector; `vision_learning_rate` of the tower (None: the same).
        weight_decay: Of matrices; norms, biases, A_log, D and dt_bias have none.
        warmup_ratio: Part of all steps; then the rate falls along half a cosine.
        global_batch_size: Samples per optimizer step over all devices: accumulation follows from it.
        device_batch_size: Samples at a time on one device.
        num_epochs, max_steps: The end; max_steps counts if it is not 0.
        dtype: Of the weights: "float32" or "bfloat16". `bf16`: compute in bfloat16 by autocast, on a GPU.
        fps, max_frames, max_tokens, too_long: See `VideoChatCollator`.
        gradient_checkpointing: Options of `gradient_checkpointing_enable`; None trains without it.
        initial_states: Where the states of a sample begin; see `initial_states`. None: with zeros.
        joining: Makes samples longer than the data; see `data.joining`. None: samples are as they are.
        save_steps, logging_steps: In optimizer steps. save_total_limit: Checkpoints kept, at least 2.
        num_workers: Processes that decode for one device; None for as many as it has cores, at most `MAX_WORKERS`.
        streaming: Read the manifests of `data` row by row, again and again; needs max_steps.
        strict: Stop at a sample that cannot be used, instead of leaving it out.
        deepspeed, fsdp_config: Files of these, or the name of a shipped one: zero1, zero2, zero3; fsdp2, hsdp. At most
            one of them.
        sequence_parallel: Devices that share each sample, a span of its tokens and frames for each.
    """

    model: str
    data: tuple[str, ...]
    output: str
    evaluation_data: tuple[str, ...] = ()
    trains: tuple[str, ...] = PARTS
    lora: Lora | None = None
    learning_rate: float = 4e-5
    vision_learning_rate: float | None = None
    weight_decay: float = 0.05
    adam_beta1: float = 0.9
    adam_beta2: float = 0.95
    warmup_ratio: float = 0.1
    max_grad_norm: float = 1.0
    global_batch_size: int = 32
    device_batch_size: int = 1
    num_epochs: float = 1.0
    max_steps: int = 0
    dtype: str = "float32"
    bf16: bool = True
    fps: float = 1.0
    max_frames: int | None = None
    max_tokens: int | None = None
    too_long: str = "refuse"
    gradient_checkpointing: dict[str, Any] | None = field(default_factory=dict)
    initial_states: InitialStatesOptions | None = None
    joining: JoiningOptions | None = None
    save_steps: int = 500
    save_total_limit: int = 2
    logging_steps: int = 10
    evaluation_steps: int = 0
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
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        if not self.data or not (self.trains or self.lora):
            raise ValueError("a recipe needs data, and something that trains")
        if self.dtype not in ("float32", "bfloat16"):
            raise ValueError(f"dtype must be float32 or bfloat16, got {self.dtype!r}")
        if not 0 <= self.warmup_ratio < 1:
            raise ValueError(f"warmup_ratio must lie in [0, 1), got {self.warmup_ratio}")
        if self.max_steps < 0 or (self.max_steps == 0 and not self.num_epochs > 0):
            raise ValueError("say how long to train: num_epochs or max_steps must be positive")
        if self.streaming and not self.max_steps:
            raise ValueError("streaming: data that is read row by row has no known end, so max_steps must be given")
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
        raise ValueError(f"{name}: no such recipe. Shipped are {', '.join(recipe_names())}; or give a .yaml file")
    text = file.read_text(encoding="utf-8")
    values = _parse(text.replace("{size}", size), str(file))
    if not isinstance(values, dict):
        raise ValueError(f"{file}: a recipe is a list of `key: value`")
    for change in changes:
        key, equals, value = change.partition("=")
        if not equals:
            raise ValueError(f"--set {change}: write key=value")
        group = values
        *path, last = key.split(".")
        for part in path:
            if group.get(part) is None:
                group[part] = {}
            group = group[part]
            if not isinstance(group, dict):
                raise ValueError(f"--set {change}: {part} holds no further keys")
        group[last] = _parse(value, f"--set {change}")
    return _make(Recipe, values, str(file))


def _parse(text: str, where: str) -> Any:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(f"{where}: not YAML: {error}") from error


def _make(cls: Any, values: dict[str, Any], where: str) -> Any:
    """A dataclass of a mapping, its values brought to the types that the class declares."""
    fields = {one.name: one for one in dataclasses.fields(cls)}
    hints = typing.get_type_hints(cls)
    for key in values:
        if key not in fields:
            close = difflib.get_close_matches(key, fields, 1)
            raise ValueError(f"{where}: unknown key {key!r}" + (f"; did you mean {close[0]!r}?" if close else ""))
    missing = [
        name for name, one in fields.items()
        if name not in values and one.default is dataclasses.MISSING and one.default_factory is dataclasses.MISSING
    ]  # fmt: skip
    if missing:
        raise ValueError(f"{where}: {', '.join(missing)} must be given, for instance with --set {missing[0]}=...")
    return cls(**{key: _convert(value, hints[key], f"{where}: {key}") for key, value in values.items()})


def _convert(value: Any, kind: Any, where: str) -> Any:
    options = typing.get_args(kind) if isinstance(kind, types.UnionType) else (kind,)
    if value is None and type(None) in options:
        return None
    (kind,) = [option for option in options if option is not type(None)]
    origin = typing.get_origin(kind) or kind
    if dataclasses.is_dataclass(origin) and isinstance(value, dict):
        return _make(origin, value, where)
    if origin is tuple and isinstance(value, str | list):
        return tuple(str(one) for one in ([value] if isinstance(value, str) else value))
    if origin is float and isinstance(value, int | float | str) and not isinstance(value, bool):
        # YAML 1.1 takes 1e-3 for a text
        if re.fullmatch(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?", str(value)):
            return float(value)
    elif isinstance(value, origin) and not (origin is int and isinstance(value, bool)):
        return value
    raise ValueError(f"{where} must be {getattr(origin, '__name__', origin)}, got {value!r}")
