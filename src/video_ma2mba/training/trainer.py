"""A thin subclass of the HF Trainer: rates by part, failing samples by name, counts, checkpoints that are whole."""

import json
import math
import shutil
import time
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, IterableDataset
from safetensors.torch import save_file
from torch.nn import functional as F
from torch.utils.data import get_worker_info
from transformers import Trainer, TrainerState
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_optimizer import is_optimizer_factory
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, get_last_checkpoint

from ..data.collator import INFO
from ..data.sampling import LengthGroupedSampler
from ..modeling.modeling_video_ma2mba import VideoMa2mbaModel
from .initial_states import InitialStates, InitialStatesOptions
from .parameters import parameter_groups

COMPLETE = "complete"  # written into a checkpoint when all else is
OWN_GROUPS = {"params", "model", "optimizer_dict"}  # options of optimizers that group parameters themselves
COUNTS = ("samples", "tokens", "supervised_tokens", "skipped_samples", "changed_samples")

# Transformers 5.17 resumes several processes on CPUs by loading the optimizer to "cpu:0", a place torch does not know.
torch.serialization.register_package(
    50, lambda storage: None, lambda storage, location: storage if location.startswith("cpu:") else None
)


class NonFiniteLoss(ValueError):
    """The loss is not a number any more; the message says where the batch was saved."""


class VideoMa2mbaTrainer(Trainer):
    """`transformers.Trainer` for `VideoMa2mbaForConditionalGeneration`.

    Beyond the stock Trainer, which works too:

    - the vision tower has a rate of its own, and only matrices decay (`parameters.parameter_groups`);
    - `label_smoothing_factor` smooths the loss of the next token, at the cost of logits for the supervised tokens alone
      (the stock Trainer shifts labels only for the text models it knows by name);
    - a data set with `num_tokens` is sampled by length (`LengthGroupedSampler`);
    - samples that `VideoChatCollator(with_info=True)` left out are counted, warned of and written to
      `skipped_samples.jsonl`; an error names the samples and videos of its batch;
    - a loss that is not finite stops the training, with the batch saved;
    - an evaluation without metrics asks for no logits;
    - the log has tokens and samples per second, and the part of the tokens that is supervised;
    - a checkpoint counts only when it is whole: see `last_checkpoint`.

    Args:
        vision_learning_rate: Of the tower; None for that of the rest.
        initial_states: Where the states of a training sample begin; None: with zeros.
        The others: as of `transformers.Trainer`.
    """

    model: Any  # of `Trainer`, which declares that it may be missing
    autocast_dtype: torch.dtype | None = None  # in which to compute where the engine would cast the weights for it
    compares_answers = False  # in an evaluation with metrics: these are given `answers_in`, and no logits

    def __init__(
        self,
        *args: Any,
        vision_learning_rate: float | None = None,
        initial_states: InitialStatesOptions | None = None,
        **kwargs: Any,
    ):
        super().__init__(*args, **kwargs)
        self.vision_learning_rate = vision_learning_rate
        self.initial_states = None
        if initial_states is not None and initial_states.kind != "zeros":
            self.initial_states = InitialStates(initial_states, self.args.seed, self.args.process_index)
        self._counts = dict.fromkeys(COUNTS, 0)
        self._counted_since = time.perf_counter()
        self._batch_info: list[dict[str, Any]] = []
        self._loss_only = self._predicts = False
        self._unread: set[str] = set()  # held-out samples that were spoken of
        self._batches_done = 0

    def create_optimizer(self, model: torch.nn.Module | None = None) -> torch.optim.Optimizer:
        if self.optimizer is not None:
            return self.optimizer
        model = self.model if model is None else model
        given = self.optimizer_cls_and_kwargs
        make, options = given or self.get_optimizer_cls_and_kwargs(self.args, self.model)
        if is_optimizer_factory(make) or not OWN_GROUPS.isdisjoint(options):
            if self.vision_learning_rate is not None:
                raise ValueError(
                    f"{make} groups the parameters itself: leave out vision_learning_rate, or take another"
                )
        else:
            rate = options.get("lr", self.args.learning_rate)
            decay = options.get("weight_decay", self.args.weight_decay)
            options = {**options, "params": parameter_groups(model, rate, self.vision_learning_rate, decay)}
        self.optimizer_cls_and_kwargs = make, options  # which the stock Trainer reads, with all else it does for it
        try:
            return super().create_optimizer(model)
        finally:
            self.optimizer_cls_and_kwargs = given

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        data = self.train_dataset if train_dataset is None else train_dataset
        if not isinstance(data, Dataset) or "num_tokens" not in data.column_names:
            return super()._get_train_sampler(train_dataset)
        batch_size = self.get_total_train_batch_size(self.args)
        return LengthGroupedSampler(data["num_tokens"][:], batch_size, self.args.seed)

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        found = get_last_checkpoint(self.args.output_dir) if resume_from_checkpoint is True else resume_from_checkpoint
        if found and isinstance(self.train_dataset, IterableDataset):
            state = TrainerState.load_from_json(str(Path(str(found)) / TRAINER_STATE_NAME))
            self._batches_done = state.global_step * self.args.gradient_accumulation_steps
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def _train_collator(self) -> Any:
        """Of a stream that is gone on with, the batches that were trained pass by without being decoded."""
        return _AfterBatches(self.data_collator, self._batches_done) if self._batches_done else self.data_collator

    def get_train_dataloader(self) -> Any:
        whole, self.data_collator = self.data_collator, self._train_collator()
        try:
            return super().get_train_dataloader()
        finally:
            self.data_collator = whole

    # --- samples -----------------------------------------------------------------------------------------------------

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        self._batch_info = inputs.pop(INFO, [])
        if self.model.training:
            self._count(self._batch_info)
        else:
            for info in self._batch_info:
                if "error" in info and info["id"] not in self._unread:
                    self._unread.add(info["id"])
                    self._warn(
                        f"held-out sample {info['id']} counts as a loss of 0, it cannot be read: {info['error']}"
                    )
        return super()._prepare_inputs(inputs)

    def _count(self, infos: list[dict[str, Any]]) -> None:
        for info in infos:
            if "error" in info:
                self._counts["skipped_samples"] += 1
                with (self._folder / "skipped_samples.jsonl").open("a", encoding="utf-8") as file:
                    file.write(json.dumps({"step": self.state.global_step, **info}, ensure_ascii=False) + "\n")
                self._warn(f"sample {info['id']} is left out: {info['error']}")
                continue
            self._counts["samples"] += 1
            self._counts["tokens"] += info["tokens"]
            self._counts["supervised_tokens"] += info["supervised"]
            self._counts["changed_samples"] += "changed" in info

    def _warn(self, text: str) -> None:
        for callback in self.callback_handler.callbacks:
            bar = getattr(callback, "training_bar", None)
            if write := getattr(bar, "write", None) or getattr(callback, "write_line", None):
                write(f"warning: {text}")
                return
        print(f"warning: {text}", flush=True)

    def training_step(self, model: torch.nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> torch.Tensor:
        try:
            return super().training_step(model, inputs, *args, **kwargs)
        except Exception as error:
            names = [f"{info['id']} ({', '.join(info['videos']) or 'text only'})" for info in self._batch_info]
            error.add_note(f"step {self.state.global_step}, samples: {'; '.join(names) or 'unknown'}")
            raise

    def prediction_step(self, model: Any, inputs: Any, prediction_loss_only: bool, ignore_keys: Any = None) -> Any:
        self._loss_only, self._predicts = prediction_loss_only, True
        try:
            loss, logits, labels = super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        finally:
            self._predicts = False
        if self.compares_answers and logits is not None and labels is not None:
            logits = answers_in(logits, labels)
        return loss, logits, labels

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        if self.label_smoother is not None and self.compute_loss_func is None and "labels" in inputs:
            inputs = for_label_smoothing(inputs, all_logits=return_outputs and not self._loss_only)
            if num_items_in_batch is not None:
                num_items_in_batch = max(num_items_in_batch, 1)  # nothing supervised: a loss of zero
        elif self._loss_only and not self.model.training and "labels" in inputs:
            inputs = {"logits_to_keep": torch.arange(0), **inputs}  # no logits, however long the video
        elif self.compares_answers and not self.model.training and "labels" in inputs:
            inputs = {"logits_to_keep": (inputs["labels"][:, 1:] != -100).any(dim=0).nonzero()[:, 0], **inputs}
        states = self.initial_states if self.model.training else None
        base = next(module for module in self.model.modules() if isinstance(module, VideoMa2mbaModel))
        if states is not None:  # the model moves the cache on in place
            ids = inputs["input_ids"]
            inputs["cache"] = states.begin(base.language_model.new_cache(len(ids), ids.device))
        result = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        if states is not None:
            states.end(inputs.pop("cache"))
        loss, *rest = result if isinstance(result, tuple) else (result,)
        if self.model.training and not torch.isfinite(loss):
            raise NonFiniteLoss(self._save_batch(inputs, loss))
        return (loss, *rest) if rest else loss

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: Any) -> Any:
        """In an evaluation those of this process alone: a sample counts the same whatever others read meanwhile.

        The stock Trainer divides by the tokens that all processes hold at the time, so that its loss of the same data
        differs with their number.
        """
        if not self._predicts or not self.args.average_tokens_across_devices:
            return super()._get_num_items_in_batch(batch_samples, device)
        self.args.average_tokens_across_devices = False
        try:
            found = super()._get_num_items_in_batch(batch_samples, device)
        finally:
            self.args.average_tokens_across_devices = True
        return None if found is None else found * self.args.world_size  # by which compute_loss multiplies

    def compute_loss_context_manager(self) -> Any:
        context = super().compute_loss_context_manager()
        if self.autocast_dtype is not None:
            context.enter_context(torch.autocast(self.args.device.type, self.autocast_dtype))
        return context

    @property
    def _folder(self) -> Path:
        return Path(str(self.args.output_dir))

    def _save_batch(self, inputs: dict[str, Any], loss: torch.Tensor) -> str:
        """Writes the batch for study; returns what to say."""
        name = f"non_finite_step{self.state.global_step}_rank{self.args.process_index}"
        tensors = {key: value.contiguous().cpu() for key, value in inputs.items() if torch.is_tensor(value)}
        save_file(tensors, self._folder / f"{name}.safetensors")
        (self._folder / f"{name}.json").write_text(json.dumps(self._batch_info, indent=2), encoding="utf-8")
        return (
            f"the loss is {loss.item()} at step {self.state.global_step}; the batch is in {self._folder / name}"
            ".safetensors. Lower the learning rate, raise the warm-up, or look for what is odd in these samples"
        )

    # --- logs --------------------------------------------------------------------------------------------------------

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if "loss" in logs or "train_loss" in logs:  # of training: every process comes here at the same step
            counts = torch.tensor([self._counts[name] for name in COUNTS], device=self.args.device)
            if self.args.world_size > 1:
                counts = self.accelerator.gather(counts[None]).sum(dim=0)
            totals = dict(zip(COUNTS, counts.tolist(), strict=True))
            elapsed_s = time.perf_counter() - self._counted_since
            if totals["samples"] or totals["skipped_samples"]:
                logs |= totals
                logs["tokens_per_s"] = round(totals["tokens"] / elapsed_s, 1)
                logs["samples_per_s"] = round(totals["samples"] / elapsed_s, 3)
                logs["supervised_part"] = round(totals["supervised_tokens"] / max(totals["tokens"], 1), 4)
            self._counts = dict.fromkeys(COUNTS, 0)
            self._counted_since = time.perf_counter()
        super().log(logs, *args, **kwargs)

    # --- checkpoints -------------------------------------------------------------------------------------------------

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        super()._save_checkpoint(model, trial)
        folder = Path(self._get_output_dir(trial)) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        if self.initial_states is not None:
            self.initial_states.save(folder)
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            (folder / COMPLETE).touch()

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None and self.initial_states is not None:
            self.initial_states.load(Path(checkpoint))


class _AfterBatches:
    """A collator that makes nothing of the first batches: the stream is read again, row by row, and not decoded."""

    def __init__(self, collator: Any, num_batches: int):
        self.collator, self.num_batches, self.num_seen = collator, num_batches, 0

    def __call__(self, rows: Any) -> dict[str, Any]:
        worker = get_worker_info()  # each of them makes every so manieth batch, by a copy of this
        number = self.num_seen if worker is None else worker.id + worker.num_workers * self.num_seen
        self.num_seen += 1
        return {} if number < self.num_batches else self.collator(rows)


def for_label_smoothing(inputs: dict[str, Any], all_logits: bool) -> dict[str, Any]:
    """Inputs whose labels stand beside the logits that predict them, as the stock Trainer's label smoother wants them.

    Args:
        inputs: With `labels` (batch, tokens), beside the tokens themselves.
        all_logits: Ask for the logits of all tokens, and not only where a row is supervised.
    """
    labels = F.pad(inputs["labels"][:, 1:], (0, 1), value=-100)  # token t predicts token t + 1
    if all_logits:
        return {**inputs, "labels": labels}
    supervised = (labels != -100).any(dim=0)
    supervised[0] |= not supervised.any()  # a model gives some logits
    positions = supervised.nonzero()[:, 0]
    return {**inputs, "labels": labels[:, positions], "logits_to_keep": positions}


def answers_in(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """How each answer of a batch compares with what greedy decoding would say.

    Greedy decoding gives an answer to the token if and only if, read along, every token of it and its end are the
    likeliest: so one pass tells what asking each question would.

    Args:
        logits: (batch, supervised, vocabulary), of the positions before those where some row is supervised.
        labels: (batch, tokens), -100 where nothing is supervised; an answer is a run of others.

    Returns:
        int64 (batch, answers, 3): exact or not, the first token that would be said, the first of the right ones; rows
        with fewer answers end with -100.
    """
    target = labels[:, 1:]
    positions = (target != -100).any(dim=0).nonzero()[:, 0]
    said = torch.full_like(target, -100)
    said[:, positions] = logits[:, : len(positions)].argmax(-1).to(said)
    rows = []
    for row_said, row_target in zip(said.cpu(), target.cpu(), strict=True):
        answers, start = [], None
        for index, is_supervised in enumerate([*(row_target != -100).tolist(), False]):
            if is_supervised and start is None:
                start = index
            elif not is_supervised and start is not None:
                right = torch.equal(row_said[start:index], row_target[start:index])
                answers.append([int(right), int(row_said[start]), int(row_target[start])])
                start = None
        rows.append(answers)
    longest = max(1, *map(len, rows))
    table = [[*answers, *[[-100] * 3] * (longest - len(answers))] for answers in rows]
    return torch.tensor(table, device=labels.device)


def last_checkpoint(folder: Path) -> Path | None:
    """The newest whole checkpoint in a folder; those that were cut off while they were written are removed."""
    newest, newest_step = None, -math.inf
    for path in folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*"):
        if not (path / COMPLETE).is_file():
            shutil.rmtree(path)
        elif (step := int(path.name.rpartition("-")[2])) > newest_step:
            newest, newest_step = path, step
    return newest
