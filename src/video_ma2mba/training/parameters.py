"""Which parameters move, and at which rate."""

from collections.abc import Sequence
from typing import Any

from torch import nn

from .recipe import PARTS


def set_trainable(model: nn.Module, parts: Sequence[str]) -> None:
    """Let the weights of the named parts move, and freeze all others."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(part_of(name) in parts)


def part_of(name: str) -> str:
    """The part of the model that a parameter belongs to, also under a wrapper of PEFT or of several devices."""
    return next((part for part in PARTS if f"{part}." in name), "language_model")


def parameter_groups(
    model: nn.Module, learning_rate: float, vision_learning_rate: float | None = None, weight_decay: float = 0.0
) -> list[dict[str, Any]]:
    """Groups for an optimizer: tower and the rest at their own rates, matrices with decay and all else without.

    What has fewer than two dimensions (norms, biases, A_log, D, dt_bias, the class token) does not decay (Table 6 of
    the paper gives one decay; that these are spared is common practice, and for A_log and dt_bias a need: decay would
    pull the time constants of the states towards one value). The stock Trainer, and so every trainer of TRL, goes by
    names and would let A_log, D and some norms decay; give it the groups:

        groups = parameter_groups(model, arguments.learning_rate, weight_decay=0.1)
        Trainer(model, arguments, ..., optimizers=(torch.optim.AdamW(groups), None))

    Args:
        model: Whose trained parameters are grouped, bare or wrapped by PEFT.
        learning_rate: Of all but the tower.
        vision_learning_rate: Of the tower; None for `learning_rate`.
        weight_decay: Of the matrices.
    """
    vision_rate = learning_rate if vision_learning_rate is None else vision_learning_rate
    groups: dict[tuple[str, bool], dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        shape = getattr(parameter, "ds_shape", parameter.shape)  # ZeRO-3 leaves a part of it here, in one dimension
        is_vision, decays = part_of(name) == "vision_tower", len(shape) >= 2
        key = ("vision" if is_vision else "language", decays)
        group = groups.setdefault(
            key,
            {
                "name": f"{key[0]}, {'decay' if decays else 'no decay'}",
                "params": [],
                "lr": vision_rate if is_vision else learning_rate,
                "weight_decay": weight_decay if decays else 0.0,
            },
        )
        group["params"].append(parameter)
    return sorted(groups.values(), key=lambda group: group["name"])  # the log shows the rate of the first
