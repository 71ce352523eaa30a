"""The loop of an evaluation: every video watched once for all of its questions, answers kept as they come."""

import json
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, get_type_hints

from ..data.media import MediaIndex, UnusableMedium
from ..data.records import Problem
from ..files import read_lines, write_text
from ..modeling.stopping import RepetitionStop
from ..modeling.video_memory import VideoMemory
from .questions import LETTERS, Question
from .tasks import Task

ANSWERS, MEDIA = "answers.jsonl", "media.jsonl"
MAX_DURATION_S = 24 * 3600.0


@dataclass(frozen=True)
class Answer:
    """One line of answers.jsonl.

    Attributes:
        raw: What the model said, or with likelihoods the letter that it finds likeliest.
        parsed: The letter read from it; None is left out of the score, "" is wrong. Free answers have None.
        num_tokens: Of the answer. num_frames: Of the video.
        watch_s: For the whole video; answer_s: this question's share of its batch.
    """

    id: str
    video: str
    raw: str
    parsed: str | None
    num_tokens: int
    num_frames: int
    watch_s: float
    answer_s: float


@dataclass(frozen=True)
class Found:
    """What can be asked: questions by video, in the order of the files, and what was left out."""

    by_video: dict[str, list[Question]]
    problems: list[Problem]

    @property
    def questions(self) -> list[Question]:
        return [question for questions in self.by_video.values() for question in questions]


def find(read: Iterable[Question | Problem], media_root: Path, output: Path, limit: int | None = None) -> Found:
    """Sort questions by their videos, each of which is opened once.

    Args:
        media_root: No file outside it is opened.
        output: Where the looks of videos are remembered.
        limit: Take no more than so many questions.
    """
    by_video: dict[str, list[Question]] = {}
    problems: list[Problem] = []
    known: set[str] = set()
    index = MediaIndex(media_root, output / MEDIA, MAX_DURATION_S)
    try:
        for question in read:
            if isinstance(question, Problem):
                problems.append(question)
                continue
            if limit is not None and len(known) >= limit:
                break
            if question.id in known:
                problems.append(Problem(question.where, "duplicate", "the same id a second time", question.id))
                continue
            try:
                video = index.find("video", question.videos)
            except UnusableMedium as error:
                problems.append(Problem(question.where, error.reason, str(error), question.id))
                continue
            known.add(question.id)
            by_video.setdefault(video.path, []).append(question)
    finally:
        index.close()
    return Found(by_video, problems)


def answer_all(
    model: Any,
    processor: Any,
    task: Task,
    found: Found,
    media_root: Path,
    output: Path,
    *,
    fps: float | None = None,
    max_frames: int | None = None,
    by_likelihood: bool = False,
    batch_size: int = 16,
    progress: Callable[[int, int], None] | None = None,
) -> list[Answer]:
    """Answer every question that has no answer yet in `output`; a video counts as done once all of its answers stand.

    Args:
        fps, max_frames: Which frames; None of both takes every second of the video.
        by_likelihood: Take the option whose letter the model finds likeliest, instead of letting it speak.
        batch_size: Questions of a video that are answered at once.
        progress: Called with (questions answered, questions) after every video.

    Returns:
        Answers in the order of `found`, from which a video that turns out to be unreadable is moved to its problems.
    """
    file = output / ANSWERS
    done = _answered(file, found)
    with file.open("a", encoding="utf-8") as stream:
        for video, questions in list(found.by_video.items()):
            if video not in done:
                memory = VideoMemory(model, processor)
                start = time.perf_counter()
                try:
                    memory.watch(media_root / video, fps, max_frames=max_frames)
                except (ValueError, OSError) as error:  # it opened, and yet no frame of it can be read
                    del found.by_video[video]
                    found.problems.extend(Problem(q.where, "unreadable medium", str(error), q.id) for q in questions)
                    continue
                watch_s = time.perf_counter() - start
                done[video] = _answer(memory, video, questions, task, watch_s, by_likelihood, batch_size)
                stream.writelines(_line(answer) for answer in done[video])
                stream.flush()
            if progress is not None:
                progress(sum(len(one) for one in done.values()), len(found.questions))
    return [answer for video in found.by_video for answer in done[video]]


def _answer(
    memory: VideoMemory,
    video: str,
    questions: Sequence[Question],
    task: Task,
    watch_s: float,
    by_likelihood: bool,
    batch_size: int,
) -> list[Answer]:
    answers = []
    for first in range(0, len(questions), batch_size):
        batch = questions[first : first + batch_size]
        start = time.perf_counter()
        said = _likeliest(memory, batch) if by_likelihood else _spoken(memory, batch, task.max_new_tokens)
        times = {"watch_s": round(watch_s, 4), "answer_s": round((time.perf_counter() - start) / len(batch), 4)}
        for question, (raw, num_tokens) in zip(batch, said, strict=True):
            parsed = task.read_answer(raw, question) if task.read_answer else None
            answers.append(Answer(question.id, video, raw, parsed, num_tokens, memory.num_frames, **times))
    return answers


def _line(answer: Answer) -> str:
    return json.dumps(asdict(answer), ensure_ascii=False) + "\n"


def _answered(file: Path, found: Found) -> dict[str, list[Answer]]:
    """The videos that are done; what a crash left of others is removed from the file."""
    kept: dict[str, Answer] = {}
    fields = get_type_hints(Answer)
    for entry in read_lines(file):
        if entry.keys() == fields.keys() and all(isinstance(entry[name], kind) for name, kind in fields.items()):
            kept[entry["id"]] = Answer(**entry)
    done = {
        video: [kept[question.id] for question in questions]
        for video, questions in found.by_video.items()
        if all(question.id in kept for question in questions)
    }
    write_text(file, "".join(_line(answer) for answers in done.values() for answer in answers))
    return done


def _spoken(memory: VideoMemory, questions: Sequence[Question], max_new_tokens: int) -> list[tuple[str, int]]:
    prompts = list(dict.fromkeys(question.prompt for question in questions))  # some are judged in several ways
    stop = RepetitionStop(max(memory.num_prompt_tokens(prompt) for prompt in prompts))
    tokenizer = memory.processor.tokenizer
    rows = memory.generate(prompts, max_new_tokens=max_new_tokens, do_sample=False, stopping_criteria=[stop])
    said = {
        prompt: (tokenizer.decode(ids, skip_special_tokens=True).strip(), int((ids != tokenizer.pad_token_id).sum()))
        for prompt, ids in zip(prompts, rows, strict=True)
    }
    return [said[question.prompt] for question in questions]


def _likeliest(memory: VideoMemory, questions: Sequence[Question]) -> list[tuple[str, int]]:
    answers = []
    for question in questions:
        scores = memory.log_likelihoods(question.prompt, list(question.letters))
        answers.append((LETTERS[int(scores.argmax())], 0))
    return answers


def count_reasons(problems: Iterable[Problem]) -> dict[str, int]:
    """How many were left out, by why."""
    return dict(Counter(problem.reason for problem in problems).most_common())
