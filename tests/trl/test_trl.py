"""TRL's trainers, with its own collators, train this model on videos; skipped where TRL is not (`make test-trl`)."""

import copy
import math

import pytest
import torch

pytest.importorskip("trl")

from datasets import Dataset
from PIL import Image
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer

from video_ma2mba import VideoMa2mbaForConditionalGeneration
from video_ma2mba.data.synthetic import make_story

MA_GC = {"axes": ["layer", "sequence"], "layer_interval": 1, "sequence_interval": 16}
CHECKPOINTING = pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "MA-GC"])
QUESTIONS = ("What colour was the circle?", "Which shape came first?")
ANSWERS = ("red", "the green square")


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("videos")
    return [str(make_story(seed, 3 + seed).render(folder / f"{seed}.mp4")) for seed in range(2)]


@pytest.fixture
def tuned(model_folder):
    return VideoMa2mbaForConditionalGeneration.from_pretrained(model_folder)


def asked(number, *media):
    return {"role": "user", "content": [*media, {"type": "text", "text": QUESTIONS[number % 2]}]}


def answered(text):
    return {"role": "assistant", "content": [{"type": "text", "text": text}]}


def frames_of(number):
    """A video as TRL hands it on where it knows images alone: its frames."""
    pixels = make_story(number, 3).frames()
    return [Image.fromarray(frame).resize((28, 28)) for frame in pixels[: 2 + number % 2]]


def with_frames(number):
    frames = frames_of(number)
    return {"images": frames, "prompt": [asked(number, *({"type": "image"} for _ in frames))]}


@pytest.fixture
def messages_with_videos(videos):
    """An empty column `images` tells TRL that there is something to see; the videos stand in the messages."""
    rows = [
        {"messages": [asked(n, {"type": "video", "path": videos[n % 2]}), answered(ANSWERS[n % 2])], "images": []}
        for n in range(6)
    ]
    return Dataset.from_list(rows)


@pytest.fixture
def messages_with_images():
    rows = [with_frames(n) for n in range(6)]
    return Dataset.from_list(
        [
            {"messages": [*row["prompt"], answered(ANSWERS[n % 2])], "images": row["images"]}
            for n, row in enumerate(rows)
        ]
    )


@pytest.fixture
def prompts_and_completions():
    return Dataset.from_list([{**with_frames(n), "completion": [answered(ANSWERS[n % 2])]} for n in range(6)])


@pytest.fixture
def preferences():
    rows = [{**with_frames(n), "chosen": [answered("red")], "rejected": [answered("a square")]} for n in range(6)]
    return Dataset.from_list(rows)


def settings(checkpointing, tmp_path, **more):
    return {
        "output_dir": str(tmp_path), "max_steps": 3, "per_device_train_batch_size": 2, "learning_rate": 1e-2,
        "lr_scheduler_type": "constant", "report_to": "none", "save_strategy": "no", "use_cpu": True, "bf16": False,
        "disable_tqdm": True, "logging_steps": 1, "max_length": None, "gradient_checkpointing": checkpointing,
        "gradient_checkpointing_kwargs": MA_GC if checkpointing else None, **more,
    }  # fmt: skip


def trains_every_tensor(trainer):
    before = {name: parameter.detach().clone() for name, parameter in trainer.model.named_parameters()}
    trainer.train()
    assert len([entry for entry in trainer.state.log_history if "loss" in entry]) == 3
    unchanged = [name for name, value in trainer.model.named_parameters() if torch.equal(value, before[name])]
    assert unchanged == []  # those of the tower too, which only pixels reach


def gradients(model):
    return {name: parameter.grad for name, parameter in model.named_parameters()}


@CHECKPOINTING
@pytest.mark.parametrize(
    ("data", "options"),
    [
        ("messages_with_videos", {"assistant_only_loss": True}),
        ("messages_with_images", {}),
        ("prompts_and_completions", {"completion_only_loss": True}),
    ],
)
def test_supervised(request, tuned, processor, tmp_path, data, options, checkpointing):
    rows = request.getfixturevalue(data)
    ours = copy.deepcopy(tuned).train()
    trainer = SFTTrainer(
        tuned, SFTConfig(**settings(checkpointing, tmp_path, **options)), train_dataset=rows, processing_class=processor
    )
    batch = next(iter(trainer.get_train_dataloader()))
    assert {"pixel_values_videos", "pixel_values"} & batch.keys()
    assert (batch["labels"] != -100).any()

    expected = ours(**batch).loss
    expected.backward()
    trainer.model.train()
    loss = trainer.compute_loss(trainer.model, dict(batch))
    loss.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
    whole = torch.stack([gradient.norm() for gradient in gradients(ours).values()]).norm()
    for name, gradient in gradients(ours).items():
        error = (gradients(trainer.model)[name] - gradient).norm()
        # the second term: a bias of keys has no gradient but what rounding leaves of it, as softmax does not see it
        assert error <= 1e-5 * gradient.norm() + 1e-8 * whole, name
    trainer.model.zero_grad()
    trains_every_tensor(trainer)


def test_the_masks_of_answers_are_ours(tuned, processor, tmp_path, messages_with_videos):
    config = SFTConfig(**settings(False, tmp_path, assistant_only_loss=True))
    trainer = SFTTrainer(tuned, config, train_dataset=messages_with_videos, processing_class=processor)
    rows = [messages_with_videos[n] for n in range(4)]
    ours = processor.apply_chat_template(
        [row["messages"] for row in rows], tokenize=True, return_labels=True, padding_side="right"
    )
    batch = trainer.data_collator([dict(row) for row in rows])
    assert torch.equal(batch["input_ids"], ours["input_ids"])
    assert torch.equal(batch["labels"], ours["labels"])


@CHECKPOINTING
def test_preferences(tuned, processor, tmp_path, preferences, checkpointing):
    config = DPOConfig(**settings(checkpointing, tmp_path))
    trainer = DPOTrainer(tuned, args=config, train_dataset=preferences, processing_class=processor)
    batch = next(iter(trainer.get_train_dataloader()))
    assert trainer.compute_loss(trainer.model.train(), dict(batch)).item() == pytest.approx(math.log(2), abs=1e-6)
    trains_every_tensor(trainer)


@CHECKPOINTING
def test_rollouts(tuned, processor, tmp_path, checkpointing):
    """Prompts of different lengths; of two answers to one question the second is the better one."""
    config = settings(
        checkpointing, tmp_path, num_generations=2, max_completion_length=4, per_device_train_batch_size=4,
        chat_template_kwargs={"padding": False, "return_tensors": None},
        generation_kwargs={"suppress_tokens": [processor.image_token_id, processor.video_token_id]},
    )  # fmt: skip
    del config["max_length"]
    trainer = GRPOTrainer(
        tuned, lambda completions, **rest: [float(n % 2) for n in range(len(completions))], GRPOConfig(**config),
        train_dataset=Dataset.from_list([with_frames(n) for n in range(6)]), processing_class=processor,
    )  # fmt: skip
    trains_every_tensor(trainer)
