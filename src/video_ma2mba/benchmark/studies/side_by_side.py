"""Several models trained on the very same batches."""

from collections.abc import Iterator
from typing import Any

import torch

from .stories import Batch

LEARNING_RATE = 2e-3


def shortened(steps: int, scale: float) -> int:
    """A share of the steps of a study; not fewer than let the rate rise and fall."""
    return max(24, round(steps * scale))


def train_side_by_side(
    models: dict[str, Any], steps: int, batches: Iterator[Batch]
) -> Iterator[dict[str, tuple[float, float]]]:
    """AdamW at a rate that rises and falls once; yields after every step the loss and the gradient's norm by name."""
    runs = {}
    for name, model in models.items():
        parameters = [p for p in model.train().parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.05)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=steps, pct_start=0.05)
        runs[name] = parameters, optimizer, schedule
    for step, batch in zip(range(steps), batches, strict=False):
        found = {}
        for name, model in models.items():
            parameters, optimizer, schedule = runs[name]
            loss = batch.loss(model)
            optimizer.zero_grad()
            loss.backward()
            norm = torch.nn.utils.clip_grad_norm_(parameters, 1.0, error_if_nonfinite=True)
            optimizer.step()
            schedule.step()
            found[name] = loss.item(), norm.item()
        if step % 100 == 99:
            print(f"step {step + 1}: " + ", ".join(f"{n} {loss:.4f}" for n, (loss, _) in found.items()), flush=True)
        yield found
