"""Whether training on a video of some length fits a GPU, and how long a video may be.

Assumed is what the stock Trainer does with a model loaded in bfloat16; `video-ma2mba plan --help` says what that is.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .loading import load

if TYPE_CHECKING:
    from .modeling.checkpoint_plan import CheckpointPlan
    from .modeling.configuration_video_ma2mba import VideoMa2mbaConfig

OPTIMIZER_BYTES = {"adamw": 4, "adamw-8bit": 2, "lora": 8, "none": 0}  # per trained parameter
LORA_RANK = 16
RESERVED_BYTES = 2 * 2**30
MAX_TOKENS = 2**26  # some 130 hours: nobody asks for more, and the search must end


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


def load_config(model: str) -> "VideoMa2mbaConfig":
    from .modeling.configuration_video_ma2mba import PRESETS, VideoMa2mbaConfig

    if model in PRESETS:
        return VideoMa2mbaConfig.from_preset(model)
    if not Path(model, "config.json").is_file():
        raise ValueError(f"--model {model}: neither one of {', '.join(PRESETS)} nor a folder with a config.json")
    return load(VideoMa2mbaConfig, model)


def on_meta(config: "VideoMa2mbaConfig", dtype: str) -> Any:
    """The model without its weights."""
    import torch

    from .modeling import VideoMa2mbaForConditionalGeneration

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
    from .modeling.checkpoint_plan import peak_bytes_without, plan_checkpoints

    if options is None:
        return None, peak_bytes_without(config, batch_size, num_tokens, **batch)
    plan = plan_checkpoints(config, batch_size, num_tokens, **options, **batch)
    return plan, plan.predicted_peak_bytes


class Case:
    """One model under one optimizer on one GPU.

    Args:
        gpu_bytes: What the GPU has. host_bytes: What offload may hold; None for as much as it likes.
        optimizer: One of OPTIMIZER_BYTES.
        batch_size: Videos on the GPU.
        scan_backend: As of `plan_checkpoints`.
        ranks: GPUs that share each video, with a span for each.
    """

    def __init__(
        self,
        config: "VideoMa2mbaConfig",
        *,
        gpu_bytes: int,
        host_bytes: int | None = None,
        optimizer: str = "adamw",
        batch_size: int = 1,
        scan_backend: str = "torch",
        ranks: int = 1,
    ):
        self.ranks = ranks
        self.config, self.optimizer, self.batch_size = config, optimizer, batch_size
        self.gpu_bytes, self.host_bytes, self.scan_backend = gpu_bytes, host_bytes, scan_backend
        model = on_meta(config, "bfloat16")
        self.num_parameters = sum(p.numel() for p in model.parameters())
        self.num_in_layers = sum(p.numel() for p in model.model.language_model.layers.parameters())
        projections = [
            getattr(layer.mixer, n) for layer in model.model.language_model.layers for n in ("in_proj", "out_proj")
        ]
        self.num_adapters = sum(LORA_RANK * (linear.in_features + linear.out_features) for linear in projections)

    def fixed(self, options: dict | None, num_frames: int) -> Fixed:
        """What lies on the GPU whatever the plan."""
        side = self.config.vision_config.image_size
        if self.optimizer == "lora":
            weights, gradients = 2 * self.num_parameters + 4 * self.num_adapters, 4 * self.num_adapters
            trained = self.num_adapters
        else:
            weights, trained = 2 * self.num_parameters, self.num_parameters
            # MA-GC sums the layers' gradients in float32 before it hands them on
            gradients = 2 * trained + (2 * self.num_in_layers if options is not None else 0)
        return Fixed(
            weights, gradients, OPTIMIZER_BYTES[self.optimizer] * trained, self.batch_size * num_frames * 3 * side**2
        )

    def plan(self, options: dict | None, num_frames: int, num_tokens: int) -> "tuple[CheckpointPlan | None, int]":
        """The plan and its bytes of activations: within the budget where it can be, else the least there is."""
        from .modeling.checkpoint_plan import InfeasibleMemoryBudget

        batch: dict[str, Any] = {
            "num_frames": self.batch_size * num_frames, "trains_vision": self.optimizer != "lora",
            "scan_backend": self.scan_backend,
        }  # fmt: skip
        budget = self.gpu_bytes - RESERVED_BYTES - self.fixed(options, num_frames).total
        if options is not None and budget > 0:
            bounds: dict[str, Any] = {"memory_budget_bytes": budget}
            if options.get("offload"):
                bounds["host_memory_budget_bytes"] = self.host_bytes
            try:
                return planned(self.config, self.batch_size, num_tokens, options | bounds, **batch)
            except InfeasibleMemoryBudget:
                pass
        return planned(self.config, self.batch_size, num_tokens, options, **batch)

    def fits(self, options: dict | None, num_frames: int, num_tokens: int) -> bool:
        plan, activations_bytes = self.plan(options, num_frames, num_tokens)
        return self.within(self.fixed(options, num_frames).total + activations_bytes + RESERVED_BYTES, plan)

    def within(self, total_bytes: int, plan: "CheckpointPlan | None") -> bool:
        """Whether the GPU holds `total_bytes`, and the host what the plan leaves there."""
        host = self.host_bytes
        return total_bytes <= self.gpu_bytes and (plan is None or host is None or plan.predicted_host_bytes <= host)

    def row(self, name: str, options: dict | None, num_frames: int, num_tokens: int) -> dict[str, Any]:
        from .modeling.checkpoint_plan import pipeline_idle

        num_frames, num_tokens = -(-num_frames // self.ranks), -(-num_tokens // self.ranks)  # of the longest span
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
            "idle": pipeline_idle(plan, self.config.text_config.num_hidden_layers, self.ranks),
            "longest_frames": longest * self.ranks,
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
