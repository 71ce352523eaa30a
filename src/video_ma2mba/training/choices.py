"""What a recipe leaves open follows from the data, the model and the machine; each choice is said with its reason."""

from dataclasses import dataclass, replace
from typing import Any

from .recipe import MAX_WORKERS, Recipe

# The paper trains at 4e-5 and width 2,560. Adam's best rate falls as the width grows (Yang et al., arXiv 2203.03466).
RATE_TIMES_WIDTH = 0.1
# Adapters want some ten times the rate of the weights, whatever their rank (Schulman, "LoRA Without Regret", 2025).
LORA_TIMES = 10.0
VISION_PART = 0.1  # the paper's: 4e-6 of 4e-5
MIN_STEPS = 100
NUM_EVALUATIONS, NUM_LOG_LINES = 10, 20


@dataclass(frozen=True)
class Choice:
    """One key of the recipe, the value it was given, and why."""

    key: str
    value: Any
    reason: str

    def __str__(self) -> str:
        shown = f"{self.value:.3g}" if isinstance(self.value, float) else self.value
        return f"{self.key}: {shown} ({self.reason})"


def choose(
    recipe: Recipe, *, hidden_size: int, num_samples: int | None, is_held_out: bool, on_gpu: bool, devices_here: int = 1
) -> tuple[Recipe, list[Choice]]:
    """A value for every key that is null and must not be.

    Args:
        hidden_size: Of the language model.
        num_samples: To train on; None where they are streamed.
        is_held_out: Whether there is a held-out part, or evaluation data.
        devices_here: Of this machine, which share its cores.
    """
    made: list[Choice] = []

    def take(key: str, value: Any, reason: str) -> None:
        nonlocal recipe
        if getattr(recipe, key) is None:
            recipe = replace(recipe, **{key: value})
            made.append(Choice(key, value, reason))

    if recipe.max_steps is None and num_samples is not None:
        by_epochs = -(-round(num_samples * recipe.num_epochs) // recipe.global_batch_size)
        epochs = f"{recipe.num_epochs:g} passes over {num_samples} samples in batches of {recipe.global_batch_size}"
        if by_epochs < MIN_STEPS:
            epochs = f"{epochs} would be {by_epochs}, too few to learn from"
        take("max_steps", max(by_epochs, MIN_STEPS), epochs)
    rate = RATE_TIMES_WIDTH / hidden_size
    why = f"{RATE_TIMES_WIDTH:g} / width {hidden_size:,}, the paper's at its width"
    if recipe.lora is not None:
        rate, why = LORA_TIMES * rate, f"{LORA_TIMES * RATE_TIMES_WIDTH:g} / width {hidden_size:,}, for adapters"
    take("learning_rate", rate, why)
    assert recipe.learning_rate is not None
    if "vision_tower" in recipe.trains:
        take("vision_learning_rate", VISION_PART * recipe.learning_rate, "a tenth of learning_rate, as in the paper")
    if recipe.lora is not None and on_gpu:
        take("dtype", "bfloat16", "frozen weights need no more; adapters are float32")
    take("dtype", "float32", "small steps are lost in bfloat16" if on_gpu else "a CPU computes best in it")
    take("num_workers", recipe.workers(devices_here), f"one for each core decodes, at most {MAX_WORKERS}")
    steps = recipe.max_steps or -(-round((num_samples or 0) * recipe.num_epochs) // recipe.global_batch_size)
    if not is_held_out:
        take("evaluation_steps", 0, "nothing is held out")
    if recipe.save_steps is not None:
        take("evaluation_steps", min(recipe.save_steps, steps), "whenever a checkpoint is saved")
    take("evaluation_steps", max(steps // NUM_EVALUATIONS, 1), f"{NUM_EVALUATIONS} times in {steps} steps")
    take("save_steps", recipe.evaluation_steps or max(steps // NUM_EVALUATIONS, 1), "the best one is to be kept")
    take("logging_steps", max(steps // NUM_LOG_LINES, 1), f"{NUM_LOG_LINES} lines")
    return recipe, made


def keeps_best(recipe: Recipe, is_held_out: bool) -> bool:
    """Whether there will be evaluations to tell the best checkpoint by.

    Raises:
        ValueError: Some of the checkpoints that they speak of are not saved.
    """
    if not recipe.keep_best or not is_held_out or not recipe.evaluation_steps:
        return False
    assert recipe.save_steps is not None
    if recipe.save_steps % recipe.evaluation_steps:
        raise ValueError(
            f"keep_best: save_steps {recipe.save_steps} must be a multiple of evaluation_steps "
            f"{recipe.evaluation_steps}; leave one of them out"
        )
    return True
