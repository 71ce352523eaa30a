"""What the Trainer of transformers offers, with this model: with the stock Trainer and with ours."""

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from transformers import Trainer, TrainingArguments

from video_ma2mba import VideoMa2mbaForConditionalGeneration
from video_ma2mba.training.parameters import parameter_groups
from video_ma2mba.training.trainer import VideoMa2mbaTrainer

BOTH = pytest.mark.parametrize("kind", [Trainer, VideoMa2mbaTrainer])
QUESTIONS = (("What colour was the circle?", "red"), ("Which shape came first of all?", "the green square"))


def conversation(seed):
    question, answer = QUESTIONS[seed % 2]
    frames = torch.randint(0, 256, (2 + seed % 3, 3, 28, 28), dtype=torch.uint8, generator=torch.manual_seed(seed))
    content = [{"type": "video", "video": frames}, {"type": "text", "text": question}]
    return [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]


@pytest.fixture
def collate(processor):
    def collate(rows):
        talks = [conversation(row["seed"]) for row in rows]
        return dict(processor.apply_chat_template(talks, tokenize=True, return_labels=True, padding_side="right"))

    return collate


@pytest.fixture
def make(model_folder, collate, tmp_path):
    """A trainer of the kind on eight conversations; `settings` are of TrainingArguments, `more` of the trainer."""

    def make(kind, more=None, folder="run", **settings):
        arguments = TrainingArguments(
            str(tmp_path / folder), **{
                "report_to": "none", "use_cpu": True, "disable_tqdm": True, "remove_unused_columns": False,
                "save_strategy": "no", "per_device_train_batch_size": 2, "per_device_eval_batch_size": 2,
                "max_steps": 2, **settings,
            },
        )  # fmt: skip
        model = VideoMa2mbaForConditionalGeneration.from_pretrained(model_folder)
        rows = [{"seed": seed} for seed in range(8)]
        return kind(model, arguments, collate, rows, rows[:4], **(more or {}))

    return make


def logits_and_targets(model, batch):
    """Of a plain pass: float64 (supervised, vocabulary), and the ids that come next."""
    with torch.no_grad():
        logits = model.eval()(**{name: value for name, value in batch.items() if name != "labels"}).logits[:, :-1]
    target = batch["labels"][:, 1:]
    return logits[target != -100].double(), target[target != -100]


def smoothed(logits, target, factor=0.1):
    """Label smoothing as a loop: the likelihood of the target, and the mean over the whole vocabulary."""
    losses = []
    for row, right in zip(logits.log_softmax(-1), target, strict=True):
        losses.append(-(1 - factor) * row[right] - factor * row.mean())
    return torch.stack(losses).mean().item()


def test_label_smoothing_is_of_the_next_token(make, collate):
    trainer = make(VideoMa2mbaTrainer, label_smoothing_factor=0.1)
    batch = collate([{"seed": 0}, {"seed": 1}])
    logits, target = logits_and_targets(trainer.model, batch)
    assert trainer.compute_loss(trainer.model, dict(batch)).item() == pytest.approx(smoothed(logits, target), rel=1e-5)
    loss, outputs = trainer.compute_loss(trainer.model, dict(batch), return_outputs=True)
    assert loss.item() == pytest.approx(smoothed(logits, target), rel=1e-5)
    assert outputs.logits.shape[:2] == batch["labels"].shape


def test_label_smoothing_holds_over_accumulated_batches_and_in_evaluation(make, collate):
    """The gradient of a step in two halves is that of the mean over all their tokens."""
    trainer = make(
        VideoMa2mbaTrainer, label_smoothing_factor=0.1, gradient_accumulation_steps=2, max_steps=1, logging_steps=1,
        per_device_train_batch_size=1, max_grad_norm=1e9, learning_rate=0.0,
    )  # fmt: skip
    trainer.train_dataset = trainer.train_dataset[:2]
    batches = [collate([{"seed": seed}]) for seed in (0, 1)]
    parts = [logits_and_targets(trainer.model, batch) for batch in batches]
    whole = smoothed(torch.cat([logits for logits, _ in parts]), torch.cat([target for _, target in parts]))
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(whole, rel=1e-3)  # logs are rounded
    trainer.eval_dataset = trainer.eval_dataset[:2]
    held_out = collate([{"seed": 0}, {"seed": 1}])
    assert trainer.evaluate()["eval_loss"] == pytest.approx(
        smoothed(*logits_and_targets(trainer.model, held_out)), rel=1e-5
    )


def test_label_smoothing_of_a_batch_without_answers_is_zero(make, collate):
    trainer = make(VideoMa2mbaTrainer, label_smoothing_factor=0.1)
    batch = collate([{"seed": 0}])
    batch["labels"].fill_(-100)
    loss = trainer.compute_loss(trainer.model.train(), batch, num_items_in_batch=torch.tensor(0))
    loss.backward()
    assert loss.item() == 0


@BOTH
def test_compute_loss_func_is_asked(make, collate, kind):
    def mean_square(outputs, labels, num_items_in_batch=None):
        real = labels[:, 1:] != -100
        return outputs.logits[:, :-1][real].square().mean()

    trainer = make(kind, {"compute_loss_func": mean_square})
    batch = collate([{"seed": 0}, {"seed": 1}])
    logits, _ = logits_and_targets(trainer.model, batch)
    loss = trainer.compute_loss(trainer.model.train(), batch)
    assert loss.item() == pytest.approx(logits.square().mean().item(), rel=1e-5)
    trainer.train()


def token_accuracy(result):
    said = np.asarray(result.predictions)
    said = (said.argmax(-1) if said.ndim == 3 else said)[:, :-1]
    target = result.label_ids[:, 1:]
    return {"accuracy": (said == target)[target != -100].mean()}


@pytest.mark.parametrize(("kind", "smoothing"), [(Trainer, 0.0), (VideoMa2mbaTrainer, 0.0), (VideoMa2mbaTrainer, 0.1)])
def test_compute_metrics_sees_predictions(make, collate, kind, smoothing):
    trainer = make(kind, {"compute_metrics": token_accuracy}, label_smoothing_factor=smoothing)
    logits, target = zip(
        *(logits_and_targets(trainer.model, collate([row])) for row in trainer.eval_dataset), strict=True
    )
    right = (torch.cat(logits).argmax(-1) == torch.cat(target)).double().mean().item()
    assert trainer.evaluate()["eval_accuracy"] == pytest.approx(right)


@BOTH
def test_predict_gives_the_logits_of_a_plain_pass(make, collate, kind):
    trainer = make(kind)
    result = trainer.predict(trainer.eval_dataset[:2])
    batch = collate(trainer.eval_dataset[:2])
    logits, target = logits_and_targets(trainer.model, batch)
    got = torch.from_numpy(result.predictions[:, :-1])[batch["labels"][:, 1:] != -100]
    torch.testing.assert_close(got.double(), logits, rtol=1e-5, atol=1e-5)
    assert result.metrics["test_loss"] == pytest.approx(F.cross_entropy(logits, target).item(), rel=1e-5)


def test_an_evaluation_without_metrics_makes_no_logits(make, collate):
    trainer, sizes = make(VideoMa2mbaTrainer), []
    trainer.model.register_forward_hook(lambda module, args, outputs: sizes.append(outputs.logits.numel()))
    loss = trainer.evaluate()["eval_loss"]
    assert sizes == [0, 0]
    parts = [logits_and_targets(trainer.model, collate([row])) for row in trainer.eval_dataset]
    losses = [F.cross_entropy(logits, target, reduction="none") for logits, target in parts]
    means = [torch.cat(losses[start : start + 2]).mean() for start in (0, 2)]  # the Trainer's: of batches
    assert loss == pytest.approx(torch.stack(means).mean().item(), rel=1e-5)


@BOTH
def test_neftune_adds_noise_to_whole_rows_while_training(make, collate, kind):
    """Uniform within alpha / sqrt(tokens of a row x width), as its paper has it."""
    alpha, seen = 5.0, []
    trainer = make(kind, neftune_noise_alpha=alpha)
    trainer.model.model.language_model.register_forward_pre_hook(lambda module, args: seen.append(args[0].detach()))
    batch = collate([{"seed": 0}, {"seed": 1}])
    trainer.train_dataset = trainer.train_dataset[:2]
    trainer.args.max_steps, trainer.args.learning_rate = 1, 0.0
    trainer.train()
    with torch.no_grad():
        trainer.model(**batch)  # the noise is gone with the training
        trainer.model.eval()(**batch)
    noisy, after, without = (rows.flatten(0, 1) for rows in seen)
    assert torch.equal(after, without)
    distances = (noisy[:, None] - without).abs().amax(-1).amin(1)  # the Trainer may have swapped the rows
    bound = alpha / (seen[0].shape[1] * seen[0].shape[2]) ** 0.5
    text = distances[distances > 0]
    assert len(text) > 40
    assert 0.9 * bound < text.max() <= bound * 1.0001


def shapes_that_decay(optimizer):
    return {
        parameter.ndim for group in optimizer.param_groups if group["weight_decay"] for parameter in group["params"]
    }


def by_optimizer(optimizer):
    return sum(len(group["params"]) for group in optimizer.param_groups)


@BOTH
def test_only_matrices_decay(make, kind):
    trainer = make(kind, weight_decay=0.1)
    if kind is Trainer:
        groups = parameter_groups(trainer.model, 1e-3, weight_decay=0.1)
        trainer = make(kind, {"optimizers": (torch.optim.AdamW(groups), None)})
    optimizer = trainer.create_optimizer()
    assert min(shapes_that_decay(optimizer)) >= 2
    assert by_optimizer(optimizer) == len(list(trainer.model.parameters()))
    trainer.train()


def test_matrices_that_zero_3_has_cut_into_parts_decay_too(make):
    """As it leaves them where the model is read after `TrainingArguments(deepspeed=...)` was made."""
    model = make(VideoMa2mbaTrainer).model
    for parameter in model.parameters():
        parameter.ds_shape, parameter.data = parameter.shape, torch.empty(0)
    groups = parameter_groups(model, 1e-3, weight_decay=0.1)
    assert {len(parameter.ds_shape) >= 2 for group in groups for parameter in group["params"]} == {True, False}
    assert all((len(p.ds_shape) >= 2) == (group["weight_decay"] > 0) for group in groups for p in group["params"])


def test_optimizer_cls_and_kwargs_is_honoured(make):
    given = (torch.optim.SGD, {"lr": 0.3, "momentum": 0.9})
    trainer = make(VideoMa2mbaTrainer, {"optimizer_cls_and_kwargs": given, "vision_learning_rate": 0.01})
    optimizer = trainer.create_optimizer()
    assert isinstance(optimizer, torch.optim.SGD)
    assert {group["name"].partition(",")[0]: group["lr"] for group in optimizer.param_groups} == {
        "language": 0.3,
        "vision": 0.01,
    }
    assert {group["momentum"] for group in optimizer.param_groups} == {0.9}
    assert given == (torch.optim.SGD, {"lr": 0.3, "momentum": 0.9})
    assert trainer.optimizer_cls_and_kwargs == given


def test_an_optimizer_with_groups_of_its_own_keeps_them(make):
    def given(trainer):
        return (torch.optim.SGD, {"params": [trainer.model.lm_head.weight], "lr": 0.1})

    trainer = make(VideoMa2mbaTrainer)
    trainer.optimizer_cls_and_kwargs = given(trainer)
    assert by_optimizer(trainer.create_optimizer()) == 1
    trainer = make(VideoMa2mbaTrainer, {"vision_learning_rate": 0.01})
    trainer.optimizer_cls_and_kwargs = given(trainer)
    with pytest.raises(ValueError, match="leave out vision_learning_rate"):
        trainer.create_optimizer()


@BOTH
def test_resume_equals_the_uninterrupted_run(make, kind, tmp_path):
    settings = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "learning_rate": 1e-3}
    whole = make(kind, folder="whole", **settings)
    whole.train()
    resumed = make(kind, folder="whole", **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    expected = whole.model.state_dict()
    for name, value in resumed.model.state_dict().items():
        assert torch.equal(value, expected[name]), name
