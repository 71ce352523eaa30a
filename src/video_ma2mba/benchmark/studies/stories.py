"""Questions about synthetic videos as batches for any backbone, seen by the tiny model's tower and projector."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence

from ...data.synthetic import QUESTION_KINDS, Question, Story, make_story
from ...loading import find_model

SEEDS = {"train": 3 * 10**9, "test": 4 * 10**9}


@dataclass(frozen=True)
class Batch:
    """Dialogues about videos of one length.

    Attributes:
        features: float32 (batch, frames, hidden), one token a frame.
        ids: int64 (batch, tokens), the dialogue after the video, padded on the right.
        labels: int64 (batch, frames + tokens), -100 except at answers.
    """

    features: torch.Tensor
    ids: torch.Tensor
    labels: torch.Tensor

    def embedded(self, model: Any) -> torch.Tensor:
        """The whole input of a backbone: float32 (batch, frames + tokens, hidden)."""
        return torch.cat([self.features, model.get_input_embeddings()(self.ids)], dim=1)

    def loss(self, model: Any) -> torch.Tensor:
        return model(inputs_embeds=self.embedded(model), labels=self.labels).loss


class Stories:
    """Makes batches with the tiny model of the repository's clone as eyes."""

    def __init__(self) -> None:
        from ... import VideoMa2mbaForConditionalGeneration, VideoMa2mbaProcessor

        folder = find_model(None)
        self.tiny = VideoMa2mbaForConditionalGeneration.from_pretrained(folder).eval()
        self.processor = VideoMa2mbaProcessor.from_pretrained(folder)
        self.tokenizer = self.processor.tokenizer

    @torch.no_grad()
    def features(self, pictures: Sequence[np.ndarray]) -> torch.Tensor:
        """uint8 videos (frames, height, width, 3) of one length -> (batch, frames, hidden)."""
        frames = self.processor.video_processor.load(np.concatenate(pictures)).frames
        pooled = self.tiny.model.get_video_features(frames).pooler_output.flatten(0, 1)
        return pooled.unflatten(0, (len(pictures), -1))

    def batch(self, stories: Sequence[Story], questions: Sequence[Sequence[Question]]) -> Batch:
        """Each story with its questions, one after another in one dialogue."""
        features = self.features([story.frames() for story in stories])
        ids, labels = self._padded([self._dialogue(asked) for asked in questions])
        nothing = torch.full(features.shape[:2], -100)
        return Batch(features, ids, torch.cat([nothing, labels], dim=1))

    def _padded(self, rows: Sequence[tuple[list[int], list[int]]]) -> tuple[torch.Tensor, torch.Tensor]:
        (ids, labels), pad = zip(*rows, strict=True), self.tokenizer.pad_token_id
        return (
            pad_sequence([torch.tensor(row) for row in ids], batch_first=True, padding_value=pad),
            pad_sequence([torch.tensor(row) for row in labels], batch_first=True, padding_value=-100),
        )

    def training_batch(self, step: int, shortest_s: int, longest_s: int, size: int) -> Batch:
        """Fresh stories of one length, as many short ones as long; the same for the same step."""
        rng = np.random.default_rng([1, step])
        duration_s = round(float(np.exp(rng.uniform(np.log(shortest_s), np.log(longest_s)))))
        stories = [make_story(SEEDS["train"] + step * size + i, duration_s) for i in range(size)]
        counts = dict.fromkeys(QUESTION_KINDS, 1) | {"ever_appears": 3, "which_first": 3}
        return self.batch(stories, [story.questions(rng, counts) for story in stories])

    def _dialogue(self, questions: Sequence[Question]) -> tuple[list[int], list[int]]:
        ids: list[int] = []
        labels: list[int] = []
        for question in questions:
            asked = self.tokenizer(f"<|user|>{question.text}<|assistant|>")["input_ids"]
            said = [*self.tokenizer(question.answer)["input_ids"], self.tokenizer.eos_token_id]
            ids += asked + said
            labels += [-100] * len(asked) + said
        return ids, labels

    @torch.no_grad()
    def accuracy(self, model: Any, duration_s: int, num_stories: int, sample: Any = None) -> dict[str, float]:
        """The share of questions of every kind whose greedy answer is right, each asked on its own.

        An answer is greedy decoding's where the first choice at each of its tokens is right.

        Args:
            sample: Given a story, the pictures to show of it; None shows one a second.
        """
        model.eval()
        rng = np.random.default_rng([2, duration_s])
        right = []
        for i in range(num_stories):
            story = make_story(SEEDS["test"] + i, duration_s)
            asked = [story.question(kind, rng) for kind in QUESTION_KINDS]
            pictures = story.frames() if sample is None else sample(story)
            features = self.features([pictures]).expand(len(asked), -1, -1)
            ids, labels = self._padded([self._dialogue([question]) for question in asked])
            logits = model(inputs_embeds=Batch(features, ids, labels).embedded(model)).logits
            logits = logits[:, -ids.shape[1] - 1 : -1]  # the predictions of `ids`
            right.append(are_right(logits, labels))
        return shares(right)


def are_right(logits: torch.Tensor, labels: torch.Tensor) -> list[bool]:
    """Of each row, whether the likeliest tokens are its labels wherever it has some."""
    return ((logits.argmax(-1) == labels) | (labels == -100)).all(dim=1).tolist()


def shares(right: Sequence[Sequence[bool]]) -> dict[str, float]:
    """How many are right by kind and of all, where each row is of one question of each kind."""
    return {**dict(zip(QUESTION_KINDS, np.mean(right, axis=0).tolist(), strict=True)), "all": float(np.mean(right))}
