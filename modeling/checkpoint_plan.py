"""What Multi-Axis Gradient Checkpointing will cost, and which plan to take: plain Python, no torch."""

from dataclasses import dataclass


class InfeasibleMemoryBudget(ValueError):
    """No plan fits the budget; the message names the smallest that would, and with which options."""


@dataclass(frozen=True)
class CheckpointPlan:
    order: str
    layer_interval: int
    sequence_interval: int
    offload: bool
    predicted_peak_bytes: int = 0
    predicted_host_bytes: int = 0
    recompute_factor: float = 4 / 3


def check_options(config, **options):
    pass


def plan_checkpoints(
    config,
    batch_size,
    sequence_length,
    *,
    dtype_bytes=2,
    axes=("layer", "sequence"),
    layer_interval=None,
    sequence_interval=None,
    order=None,
    offload=False,
    memory_budget_bytes=None,
    host_memory_budget_bytes=None,
):
    L = config.text_config.num_hidden_layers
    return CheckpointPlan(order or "sequence_major", layer_interval or L, sequence_interval or 256, offload)
