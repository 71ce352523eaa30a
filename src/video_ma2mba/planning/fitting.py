"""Whether training on a video of some length, or watching it, fits a GPU, and how long a video may be.

The bytes that do not depend on the plan are those that the Trainer, MA-GC and the engine hold at once: see `Training`.
"""

from collections.abc import Callable
from dataclasses import KW_ONLY, asdict, dataclass, field, fields, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..loading import load

if TYPE_CHECKING:
    from ..modeling.checkpoint_plan import CheckpointPlan
    from ..modeling.configuration_video_ma2mba import VideoMa2mbaConfig

# Of a trained parameter in bfloat16: two states, in its dtype or of a byte each.
OPTIMIZER_BYTES = {"adamw": 4, "adamw-8bit": 2, "lora": 8, "qlora": 8, "none": 0}
ADAPTERS = ("lora", "qlora")  # in float32, on frozen weights: in bfloat16, or in the four bits of NF4
ENGINES = ("ddp", "zero1", "zero2", "zero3", "fsdp2")
LORA_RANK = 16
NF4_BYTES = 0.5 + 4 / 64  # of a weight: four bits, and a scale in float32 for each 64 of them
RESERVED_BYTES = 2 * 2**30  # the CUDA context, and the workspaces of its libraries
FRAGMENTATION = 0.1  # of activations: what the allocator holds in pieces of the wrong sizes
# The checkpointing methods that plans and benchmarks compare, as options of `gradient_checkpointing_enable`.
METHODS: dict[str, dict[str, Any] | None] = {
    "off": None,
    "per layer": {"axes": ("layer",)},
    "sqrt": {"axes": ("layer",), "layer_interval": 8},
    "layer_major": {"order": "layer_major"},
    "sequence_major": {"order": "sequence_major"},
    "sequence_major + offload": {"order": "sequence_major", "offload": True},
}
MAX_TOKENS = 2**26  # some 130 hours: nobody asks for more, and the search must end


@dataclass(frozen=True)
class Sizes:
    """What of a model counts: all weights, those that train, and those of the layers, whose gradients MA-GC sums.

    Attributes:
        weights_bytes: As they lie on the device.
        casts_bytes: Of their copies while a pass runs under autocast.
        trained, trained_bytes: Numbers that train, and their bytes, which are those of their gradients.
        summed, summed_bytes: Likewise, of those in the layers of the language model.
        bucket: Numbers in a buffer for the gradients of DeepSpeed, as transformers sets it.
    """

    weights_bytes: int
    casts_bytes: int
    trained: int
    trained_bytes: int
    summed: int
    summed_bytes: int
    bucket: int = 0

    @classmethod
    def of(cls, model: Any, autocast: bool = False, nf4: bool = False) -> "Sizes":
        """Of a model, which may be on the meta device.

        Args:
            autocast: It computes in bfloat16, so that linear layers work on copies of their float32 weights, which
                torch keeps while the pass runs.
            nf4: Count frozen weights of linear layers, but for the head, as bitsandbytes would hold them.
        """
        from torch import nn

        head = model.get_output_embeddings()
        linear = {module.weight for module in model.modules() if isinstance(module, nn.Linear)} - {head.weight}
        weights, casts, trained, in_layers = 0.0, 0, [], []
        for name, parameter in model.named_parameters():
            size = parameter.itemsize
            if parameter in linear and nf4 and not parameter.requires_grad:
                size = NF4_BYTES
            elif parameter in linear and autocast and size > 2:
                casts += 2 * parameter.numel()
            weights += parameter.numel() * size
            if parameter.requires_grad:
                trained.append(parameter)
                if "language_model.layers." in name:
                    in_layers.append(parameter)
        bucket = model.config.text_config.hidden_size**2
        return cls(round(weights), casts, *_numbers_and_bytes(trained), *_numbers_and_bytes(in_layers), bucket)


def _numbers_and_bytes(parameters: list) -> tuple[int, int]:
    return sum(p.numel() for p in parameters), sum(p.nbytes for p in parameters)


@dataclass(frozen=True)
class Training:
    """How a model is trained, as far as it takes memory.

    Attributes:
        engine: One of `ENGINES`; None for one device.
        devices: Processes among which the engine shares what it shares.
        accumulation: Batches that make up a step: from the second on, `.grad` stands beside the new gradients.
        ranks: Devices that share each video, with a span for each.
    """

    engine: str | None = None
    devices: int = 1
    accumulation: int = 1
    ranks: int = 1

    def fixed(self, sizes: Sizes, checkpoints: bool, optimizer_bytes: int, pixels_bytes: int) -> "Fixed":
        """Bytes on one device whatever the plan.

        MA-GC sums the gradients of the layers in float32 and hands them on when the last is found. DDP copies all
        gradients into buckets, and as much was counted with ZeRO-1 and 2. ZeRO and FSDP2 share weights (stage 3,
        FSDP2), gradients between batches (ZeRO from stage 2 on) and the optimizer among the devices; while a pass runs,
        weights and gradients are whole on each, as the layers are gathered once for all that MA-GC does with them.
        DeepSpeed trains a float32 copy of the weights, its share of which counts as optimizer.

        Args:
            checkpoints: With MA-GC, and so with its sums.
            optimizer_bytes: Of all states, before they are shared.
        """
        engine, n = (self.engine, self.devices) if self.devices > 1 else (None, 1)
        weights, standing, buffers = sizes.weights_bytes + sizes.casts_bytes, sizes.trained_bytes, 0
        if engine in ("zero3", "fsdp2"):
            weights += sizes.weights_bytes // n
        if engine in ("zero1", "zero2", "zero3") and optimizer_bytes:
            optimizer_bytes = 3 * 4 * sizes.trained  # two states and the copy
        if engine in ("ddp", "zero1", "zero2"):
            buffers = sizes.trained_bytes
        if engine not in (None, "ddp"):
            optimizer_bytes //= n
            buffers += 2 * 4 * sizes.bucket
        if engine in ("zero2", "zero3"):
            standing //= n
        sums = 4 * sizes.summed if checkpoints else sizes.summed_bytes
        # as they come: the sums, and what has been found of the others; before them stands what was accumulated
        gradients = sums + sizes.trained_bytes - sizes.summed_bytes
        if self.accumulation > 1 and checkpoints:  # else each is added to what stands as it is found
            gradients = max(gradients, sums + standing)
        return Fixed(weights, gradients, optimizer_bytes, buffers, pixels_bytes, sums - sizes.summed_bytes)


@dataclass(frozen=True)
class Fixed:
    """Bytes that do not depend on the plan.

    Attributes:
        float32_sums_bytes: Of the gradients, what comes of summing in float32 what is handed on in bfloat16.
    """

    weights_bytes: int
    gradients_bytes: int
    optimizer_bytes: int
    buffers_bytes: int
    pixels_bytes: int
    float32_sums_bytes: int = 0

    @property
    def parts(self) -> dict[str, int]:
        """What adds up, by name."""
        parts = asdict(self)
        del parts["float32_sums_bytes"]
        return parts

    @property
    def total(self) -> int:
        return sum(self.parts.values())


def gpu_at_hand_bytes() -> int | None:
    """Memory of the GPU of this machine; None where it has none."""
    import torch

    return torch.cuda.get_device_properties(0).total_memory if torch.cuda.is_available() else None


def load_config(model: str) -> "VideoMa2mbaConfig":
    from ..modeling.configuration_video_ma2mba import PRESETS, VideoMa2mbaConfig

    if model in PRESETS:
        return VideoMa2mbaConfig.from_preset(model)
    if not Path(model, "config.json").is_file():
        raise ValueError(f"--model {model}: neither one of {', '.join(PRESETS)} nor a folder with a config.json")
    return load(VideoMa2mbaConfig, model)


def on_meta(config: "VideoMa2mbaConfig", dtype: str) -> Any:
    """The model without its weights."""
    import torch

    from ..modeling import VideoMa2mbaForConditionalGeneration

    with torch.device("meta"):
        return VideoMa2mbaForConditionalGeneration._from_config(config, dtype=getattr(torch, dtype))


def planned(
    config: "VideoMa2mbaConfig", batch_size: int, num_tokens: int, options: dict | None, **batch: Any
) -> "tuple[CheckpointPlan | None, int]":
    """The plan of these options, none for None, and its bytes of activations.

    Args:
        batch: the rest of what `plan_checkpoints` takes of the batch.

    Raises:
        InfeasibleMemoryBudget: no plan fits the budget among the options.
    """
    from ..modeling.checkpoint_plan import peak_bytes_without, plan_checkpoints

    if options is None:
        return None, peak_bytes_without(config, batch_size, num_tokens, **batch)
    plan = plan_checkpoints(config, batch_size, num_tokens, **options, **batch)
    return plan, plan.predicted_peak_bytes


def needed_bytes(fixed: Fixed, activations_bytes: int) -> int:
    """What a GPU must have: all of it, what is lost between the pieces, and what torch has no part in."""
    return fixed.total + activations_bytes + round(FRAGMENTATION * activations_bytes) + RESERVED_BYTES


@dataclass(eq=False)
class Case:
    """One model under one optimizer on one GPU.

    Attributes:
        gpu_bytes: What the GPU has. host_bytes: What offload may hold; None for as much as it likes.
        optimizer: One of OPTIMIZER_BYTES; None where the model watches and answers, and nothing trains.
        dtype: Of the weights: "float32", with autocast to bfloat16, "bfloat16", or "nf4", which `qlora` takes.
        batch_size: Videos on the GPU.
        scan_backend: As of `plan_checkpoints`.
        training: Engine, devices, accumulation.
    """

    config: "VideoMa2mbaConfig"
    _: KW_ONLY
    gpu_bytes: int
    host_bytes: int | None = None
    optimizer: str | None = "adamw"
    dtype: str = "bfloat16"
    batch_size: int = 1
    scan_backend: str = "torch"
    training: Training = field(default_factory=Training)

    @cached_property
    def sizes(self) -> Sizes:
        adapters = self.optimizer in ADAPTERS
        nf4 = self.dtype == "nf4" or self.optimizer == "qlora"
        autocast = self.dtype == "float32" and self.optimizer is not None
        model = on_meta(self.config, "bfloat16" if nf4 else self.dtype)
        model.requires_grad_(self.optimizer is not None and not adapters)
        sizes = Sizes.of(model, autocast, nf4)
        if not adapters:
            return sizes
        projections = [
            getattr(layer.mixer, n) for layer in model.model.language_model.layers for n in ("in_proj", "out_proj")
        ]
        trained = sum(LORA_RANK * (linear.in_features + linear.out_features) for linear in projections)
        return replace(
            sizes, weights_bytes=sizes.weights_bytes + 4 * trained, trained=trained, trained_bytes=4 * trained,
            summed=trained, summed_bytes=4 * trained,
        )  # fmt: skip

    def like(self, **changes: Any) -> "Case":
        """This case with some of its attributes changed; those of `Training` may be among them."""
        own = {one.name: changes.pop(one.name) for one in fields(self) if one.name in changes}
        other = replace(self, **{"training": replace(self.training, **changes), **own})
        if (other.optimizer, other.dtype) == (self.optimizer, self.dtype):
            other.sizes = self.sizes
        return other

    def fixed(self, options: dict | None, num_frames: int) -> Fixed:
        """What lies on the GPU whatever the plan."""
        side = self.config.vision_config.image_size
        optimizer_bytes = OPTIMIZER_BYTES[self.optimizer or "none"] * self.sizes.trained
        if self.optimizer == "adamw":
            optimizer_bytes = 2 * self.sizes.trained_bytes
        pixels_bytes = self.batch_size * num_frames * 3 * side**2 if self.optimizer is not None else 0
        return self.training.fixed(self.sizes, options is not None, optimizer_bytes, pixels_bytes)

    @property
    def _bytes(self) -> dict[str, int]:
        """Of a number in embeddings, and of what linear layers give."""
        if self.dtype != "float32":
            return {"dtype_bytes": 2}
        return {"dtype_bytes": 4, "compute_bytes": 4 if self.optimizer is None else 2}

    def plan(
        self, options: dict | None, num_frames: int, num_tokens: int, must_fit: bool = False
    ) -> "tuple[CheckpointPlan | None, int]":
        """The plan and its bytes of activations: within the budget where it can be, else the least there is.

        Raises:
            InfeasibleMemoryBudget: `must_fit`, and no plan does.
        """
        from ..modeling.checkpoint_plan import InfeasibleMemoryBudget, watching_bytes

        batch: dict[str, Any] = {
            "num_frames": self.batch_size * num_frames, "trains_vision": self.optimizer not in ADAPTERS,
            "scan_backend": self.scan_backend, **self._bytes,
        }  # fmt: skip
        if self.optimizer is None:
            return None, watching_bytes(self.config, self.batch_size, num_tokens, **batch)
        if options is not None:
            budget = self.gpu_bytes - RESERVED_BYTES - self.fixed(options, num_frames).total
            bounds: dict[str, Any] = {"memory_budget_bytes": max(budget, 1) / (1 + FRAGMENTATION)}
            if options.get("offload"):
                bounds["host_memory_budget_bytes"] = self.host_bytes
            try:
                return planned(self.config, self.batch_size, num_tokens, options | bounds, **batch)
            except InfeasibleMemoryBudget:
                if must_fit:
                    raise
        return planned(self.config, self.batch_size, num_tokens, options, **batch)

    def span(self, num_frames: int, num_tokens: int) -> tuple[int, int]:
        """Of so many frames and tokens, those of the longest span of one GPU."""
        return -(-num_frames // self.training.ranks), -(-num_tokens // self.training.ranks)

    def fits(self, options: dict | None, num_frames: int, num_tokens: int) -> bool:
        """Whether videos of so many frames fit."""
        from ..modeling.checkpoint_plan import InfeasibleMemoryBudget

        span = self.span(num_frames, num_tokens)
        try:
            plan, activations_bytes = self.plan(options, *span, must_fit=True)
        except InfeasibleMemoryBudget:
            return False
        return self.within(needed_bytes(self.fixed(options, span[0]), activations_bytes), plan)

    def within(self, total_bytes: int, plan: "CheckpointPlan | None") -> bool:
        """Whether the GPU holds `total_bytes`, and the host what the plan leaves there."""
        host = self.host_bytes
        return total_bytes <= self.gpu_bytes and (plan is None or host is None or plan.predicted_host_bytes <= host)

    def row(self, name: str, options: dict | None, num_frames: int, num_tokens: int) -> dict[str, Any]:
        """What a method takes for videos of so many frames, and the longest that would fit."""
        from ..modeling.checkpoint_plan import pipeline_idle

        span = self.span(num_frames, num_tokens)
        fixed = self.fixed(options, span[0])
        plan, activations_bytes = self.plan(options, *span)
        total_bytes = needed_bytes(fixed, activations_bytes)
        longest, is_bound = longest_frames(self, options)
        fits = self.within(total_bytes, plan)
        return {
            "method": name,
            **asdict(fixed),
            "activations_bytes": activations_bytes,
            "fragmentation_bytes": round(FRAGMENTATION * activations_bytes),
            "total_bytes": total_bytes,
            "host_bytes": plan.predicted_host_bytes if plan else 0,
            "plan": self._said(plan) if fits else None,
            "recompute_factor": plan.recompute_factor if plan else 1.0,
            "fits": fits,
            "idle": pipeline_idle(plan, self.config.text_config.num_hidden_layers, self.training.ranks),
            "longest_frames": longest,
            "longest_is_bound": is_bound,
        }

    def _said(self, plan: "CheckpointPlan | None") -> str:
        if plan is not None:
            return str(plan)
        return "no checkpointing" if self.optimizer else "a chunk at a time, whatever the length"


def longest_frames(case: Case, options: dict | None) -> tuple[int, bool]:
    """The most frames that fit, and whether that is only where the search ends."""
    per_frame = case.config.tokens_per_frame
    bound = MAX_TOKENS // per_frame

    def fits(num_frames: int) -> bool:
        return case.fits(options, num_frames, num_frames * per_frame)

    if fits(bound):
        return bound, True
    return largest(fits, bound), False


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
