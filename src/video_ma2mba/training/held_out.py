"""What a run knows of data it is not trained on: loss, exact answers and a few answers in full, as it goes."""

import itertools
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import EvalPrediction, TrainerCallback
from transformers.integrations import TensorBoardCallback

from ..data.collator import VideoChatCollator
from ..data.holding_out import videos_of
from ..files import write_json
from ..modeling.video_memory import format_clock
from .trainer import VideoMa2mbaTrainer

HISTORY = "held_out_history.json"
NUM_LOOKED_AT = 50  # held-out samples among which those are chosen whose answers are shown
MAX_MORE_TOKENS = 16  # that a shown answer may be longer than the right one


def answer_metrics(prediction: EvalPrediction) -> dict[str, float]:
    """Of `answers_in` of all batches: the share of exact answers, their number, and how many ways they begin."""
    answers = np.asarray(prediction.predictions).reshape(-1, 3)
    answers = answers[answers[:, 0] != -100]
    return {
        "exact": float(answers[:, 0].mean()) if len(answers) else 0.0,
        "answers": len(answers),
        "beginnings_said": len(set(answers[:, 1].tolist())),
        "beginnings_right": len(set(answers[:, 2].tolist())),
    }


class Lines(TrainerCallback):
    """The log as lines for people, on stderr."""

    def __init__(self) -> None:
        self._start: tuple[float, int] | None = None

    def write_line(self, text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._start is None:
            self._start = time.perf_counter(), state.global_step

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if not state.is_world_process_zero or "loss" not in logs or self._start is None:
            return
        start_s, first = self._start
        left_s = (
            (time.perf_counter() - start_s) / max(state.global_step - first, 1) * (state.max_steps - state.global_step)
        )
        parts = [f"loss {logs['loss']:.4f}", f"rate {logs.get('learning_rate', 0):.2e}"]
        parts += [f"{logs['samples_per_s']:.1f} samples a second"] if "samples_per_s" in logs else []
        self.write_line(
            f"step {state.global_step} of {state.max_steps}: {', '.join(parts)}, {format_clock(left_s)} left"
        )

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero and state.global_step < state.max_steps:
            self.write_line(f"stopped at step {state.global_step}: more steps do not lower the held-out loss any more")


class HeldOut(TrainerCallback):
    """Measures the held-out data before the first step, whenever the Trainer does, and after the last step.

    Before the first step, and not before the training: only then are model and optimizer what the engine made of them.

    Args:
        folder: Where `held_out_history.json` keeps what was found, for a run that is resumed.
        resumed_step: Of the checkpoint that the run goes on from; None where it begins.
        num_samples: So many answers are shown.
        tensorboard: Where they are written, too.

    Attributes:
        evaluations: Of each: step, loss; with `num_samples` also exact, answers, beginnings_said, beginnings_right, and
            samples: video, question, said, right.
    """

    def __init__(
        self, trainer: VideoMa2mbaTrainer, folder: Path, resumed_step: int | None, num_samples: int,
        tensorboard: TensorBoardCallback | None = None,
    ):  # fmt: skip
        self.trainer, self.file, self.tensorboard = trainer, folder / HISTORY, tensorboard
        self.evaluations: list[dict[str, Any]] = []
        if resumed_step is not None and self.file.is_file():
            kept = json.loads(self.file.read_text(encoding="utf-8"))
            self.evaluations = [entry for entry in kept if entry["step"] <= resumed_step]
        self._shown = self._choose(num_samples) if trainer.eval_dataset is not None else []

    @property
    def best(self) -> dict[str, Any]:
        """The evaluation with the lowest loss after a step."""
        later = [entry for entry in self.evaluations if entry["step"] > 0]
        return min(later, key=lambda entry: entry["loss"])

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        if self.trainer.eval_dataset is not None and not self.evaluations:
            self.trainer.evaluate()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.trainer.eval_dataset is not None and state.global_step >= state.max_steps and args.eval_steps:
            control.should_evaluate = True  # also where that is no multiple of evaluation_steps

    def measure(self) -> dict[str, Any]:
        """The evaluation of the model as it is now."""
        if not self.evaluations or self.evaluations[-1]["step"] != self.trainer.state.global_step:
            self.trainer.evaluate()
        return self.evaluations[-1]

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **kwargs: Any) -> None:
        names = ("loss", "exact", "answers", "beginnings_said", "beginnings_right")
        entry = {"step": state.global_step}
        entry |= {name: metrics[f"eval_{name}"] for name in names if f"eval_{name}" in metrics}
        if self._shown:  # by all processes, each of which may hold a part of the weights alone
            entry["samples"] = [self._answer(sample) for sample in self._shown]
        self.evaluations.append(entry)
        if not state.is_world_process_zero:
            return
        write_json(self.file, self.evaluations)
        for line in self.lines(entry):
            print(line, file=sys.stderr, flush=True)
        writer = self.tensorboard.tb_writer if self.tensorboard is not None else None
        if writer is not None and "samples" in entry:
            writer.add_text("eval/answers", "\n".join(f"- {shown(one)}" for one in entry["samples"]), state.global_step)

    def lines(self, entry: dict[str, Any]) -> list[str]:
        """What is said of an evaluation."""
        said = f"held out, step {entry['step']}: loss {entry['loss']:.4f}"
        if "exact" in entry:
            said += f", {round(entry['exact'] * entry['answers'])} of {entry['answers']} answers exact"
        if entry["step"] > 0:
            best = self.best
            said += ", the best so far" if best is entry else f", above the {best['loss']:.4f} of step {best['step']}"
        return [said, *(f"  {shown(one)}" for one in entry.get("samples", ()))]

    # --- a few answers in full ---------------------------------------------------------------------------------------

    def _choose(self, num: int) -> list[dict[str, Any]]:
        """Rows with as many different right answers as can be."""
        fresh: list[dict[str, Any]] = []
        again: list[dict[str, Any]] = []
        seen: set[str] = set()
        rows: Any = self.trainer.eval_dataset
        for row in itertools.islice(rows, NUM_LOOKED_AT if num else 0):
            (again if _first_turn(row)[1] in seen else fresh).append(row)
            seen.add(_first_turn(row)[1])
        return [*fresh, *again][:num]

    def _answer(self, row: dict[str, Any]) -> dict[str, str]:
        """What the model says to the first question of a row; all processes come here together, with the same row."""
        trainer = self.trainer
        question, right = _first_turn(row)
        result = {"video": ", ".join(path for _, path in videos_of(row)), "question": question, "right": right}
        collator: VideoChatCollator = trainer.data_collator  # type: ignore[assignment]
        batch = collator([row])
        supervised = (batch["labels"][0] != -100).nonzero()[:, 0]
        if not self._by_all(len(supervised) > 0):
            return {**result, "said": "(the sample cannot be read)"}
        prompt = batch["input_ids"][:, : supervised[0]]
        inputs: dict[str, Any] = {"input_ids": prompt}
        processor, tokenizer = collator.processor, collator.processor.tokenizer
        for name, token in (("pixel_values_videos", processor.video_token_id),
                            ("pixel_values", processor.image_token_id)):  # fmt: skip
            if num_frames := int((prompt == token).sum()) // processor.tokens_per_frame:
                inputs[name] = batch[name][:, :num_frames]
        num_tokens = len(tokenizer(right)["input_ids"]) + MAX_MORE_TOKENS
        was_training, model = trainer.model.training, trainer.model.eval()
        with torch.no_grad(), trainer.compute_loss_context_manager():
            inputs = {name: value.to(trainer.args.device) for name, value in inputs.items()}
            ids = model.generate(
                **inputs, max_new_tokens=num_tokens, do_sample=False, use_cache=True,
                synced_gpus=trainer.args.world_size > 1,  # none stops before the others
            )  # fmt: skip
        model.train(was_training)
        return {**result, "said": tokenizer.decode(ids[0, prompt.shape[1] :], skip_special_tokens=True).strip()}

    def _by_all(self, found: bool) -> bool:
        """Whether all processes found something."""
        accelerator = self.trainer.accelerator
        return bool(accelerator.gather(torch.tensor([found], dtype=torch.int32, device=accelerator.device)).all())


def shown(sample: dict[str, str]) -> str:
    """A sample answer in a line."""
    verdict = "right" if sample["said"] == sample["right"] else f'right is "{_short(sample["right"])}"'
    return f'{sample["video"]}, "{_short(sample["question"])}": "{_short(sample["said"])}" ({verdict})'


def _short(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= 60 else f"{text[:57]}..."


def _first_turn(row: dict[str, Any]) -> tuple[str, str]:
    """The first question and its answer."""
    question = ""
    for message in row["messages"]:
        text = " ".join(entry["text"] or "" for entry in message["content"] if entry["type"] == "text").strip()
        if message["role"] == "assistant":
            return question, text
        if message["role"] == "user":
            question = text
    return question, ""


def advice(
    evaluations: Sequence[dict[str, Any]], losses: Sequence[dict[str, Any]], *, num_samples: int | None,
    max_steps: int, keeps_best: bool,
) -> list[str]:  # fmt: skip
    """What the held-out data say that a summary line would hide, each with what to do.

    Args:
        evaluations: Of `HeldOut`. losses: Of training, {"step", "loss"}.
        num_samples: That were trained on; None where they were streamed.
        max_steps: That were planned.
    """
    later = [entry for entry in evaluations if entry["step"] > 0]
    if not later or evaluations[0]["step"] > 0:
        return []
    first, last, said = evaluations[0], later[-1], []
    best = min(later, key=lambda entry: entry["loss"])
    kept = best if keeps_best else last
    samples = "training samples" if num_samples is None else f"{num_samples} training samples"
    if kept["loss"] >= first["loss"]:
        said.append(
            f"the held-out loss did not fall below the {first['loss']:.4f} it began with: nothing was learned that "
            "holds for new videos"
        )
    if last["loss"] > 1.1 * best["loss"]:
        taken = "model/ is that step's" if keeps_best else "model/ is that of the last step: let keep_best be true"
        said.append(
            f"the held-out loss rose from {best['loss']:.4f} at step {best['step']} to {last['loss']:.4f} at step "
            f"{last['step']}: from there on the {samples} were learned by heart; {taken}"
        )
    before = later[-2]["loss"] if len(later) > 1 else first["loss"]
    still_falling = best is last and last["loss"] < 0.95 * before and last["step"] >= max_steps
    if still_falling and kept.get("exact", 0.0) < 1:
        said.append(
            f"the held-out loss was still falling at step {last['step']}: the steps were too few, go further with "
            f"--set max_steps={2 * last['step']}"
        )
    if kept.get("beginnings_said") == 1 and kept.get("beginnings_right", 0) > 1:
        said.append(
            f"all {kept['answers']} held-out answers begin alike, whatever the video; the right ones begin in "
            f"{kept['beginnings_right']} ways: the model answers without looking"
        )
    if "exact" in kept and kept["exact"] < 0.8:
        trained = sum(one["loss"] for one in losses[-3:]) / max(len(losses[-3:]), 1)
        if losses and trained < 0.5 * kept["loss"]:
            said.append(
                f"{kept['exact']:.0%} of held-out answers are exact while the training loss is {trained:.4f}: the "
                f"{samples} do not show what all videos of a kind have in common; what is missing are more of them"
            )
        elif not still_falling:
            said.append(
                f"{kept['exact']:.0%} of held-out answers are exact and the training loss is still {trained:.4f}: not "
                "even the training samples are learned; what is missing are more steps (--set max_steps), a higher "
                "rate (--set learning_rate) or, with adapters, a higher lora.rank or `finetune`, which trains all "
                "weights"
            )
    return said
