"""The loop of an evaluation: every video watched once for all of its questions, answers kept as they come.

Videos may be dealt to several processes (`processes`): each appends to an `answers-...jsonl` of its own, and the first
one puts them together.
"""

import json
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, get_type_hints

from ..data.media import MediaIndex, UnusableMedium
from ..data.records import Problem
from ..files import read_lines, write_text
from ..modeling.stopping import RepetitionStop
from ..modeling.video_memory import VideoMemory
from ..processes import Ranks, files_of, remove_shares
from .questions import LETTERS, Question
from .tasks import Task

ANSWERS, MEDIA, QUESTIONS = "answers.jsonl", "media.jsonl", "questions.jsonl"
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
    """What can be asked: questions by video, in the order of the files, and what was left out.

    Attributes:
        durations_s: Of the videos, by which they are dealt to processes.
    """

    by_video: dict[str, list[Question]]
    problems: list[Problem]
    durations_s: dict[str, float] = field(default_factory=dict)

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
    found = Found({}, [])
    known: set[str] = set()
    index = MediaIndex(media_root, output / MEDIA, MAX_DURATION_S)
    try:
        for question in read:
            if isinstance(question, Problem):
                found.problems.append(question)
                continue
            if limit is not None and len(known) >= limit:
                break
            if question.id in known:
                found.problems.append(Problem(question.where, "duplicate", "the same id a second time", question.id))
                continue
            try:
                video = index.find("video", question.videos)
            except UnusableMedium as error:
                found.problems.append(Problem(question.where, error.reason, str(error), question.id))
                continue
            known.add(question.id)
            found.by_video.setdefault(video.path, []).append(question)
            found.durations_s[video.path] = video.duration_s
    finally:
        index.close()
    return found


def write_found(output: Path, found: Found) -> None:
    """Write questions.jsonl, from which the other processes, and whoever merges shards, read what is asked."""
    lines: list[dict[str, Any]] = [
        {"video": video, "duration_s": found.durations_s[video], "question": asdict(question)}
        for video, questions in found.by_video.items()
        for question in questions
    ]
    lines += [{"problem": asdict(problem)} for problem in found.problems]
    write_text(output / QUESTIONS, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))


def read_found(output: Path) -> Found:
    """What `write_found` wrote.

    Raises:
        ValueError: It is not there, or damaged.
    """
    file, found = output / QUESTIONS, Found({}, [])
    if not file.is_file():
        raise ValueError(f"{file} is not there; all processes must see the same {output}, on a disk that they share")
    try:
        for line in read_lines(file):
            if "problem" in line:
                found.problems.append(Problem(**line["problem"]))
                continue
            asked = line["question"]
            question = Question(**asked | {name: tuple(asked[name]) for name in ("videos", "options")})
            found.by_video.setdefault(line["video"], []).append(question)
            found.durations_s[line["video"]] = line["duration_s"]
    except (TypeError, LookupError) as error:
        raise ValueError(f"{file}: damaged; run the evaluation again with --resume") from error
    return found


def answer_all(
    model: Any,
    processor: Any,
    task: Task,
    found: Found,
    media_root: Path,
    output: Path,
    *,
    videos: Collection[str] | None = None,
    ranks: Ranks | None = None,
    fps: float | None = None,
    max_frames: int | None = None,
    by_likelihood: bool = False,
    batch_size: int = 16,
    progress: Callable[[int, int], None] | None = None,
) -> list[Answer]:
    """Answer every question that has no answer yet in `output`; a video counts as done once all of its answers stand.

    Args:
        videos: Those whose questions are asked; None for all.
        ranks: The processes that share this; None for this one alone.
        fps, max_frames: Which frames; None of both takes every second of the video.
        by_likelihood: Take the option whose letter the model finds likeliest, instead of letting it speak.
        batch_size: Questions of a video that are answered at once.
        progress: Called with (questions dealt with, questions), of all processes, at the start, after every video, and
            while the first process waits for the others.

    Returns:
        In the first process, answers in the order of `found`, from which a video that turns out to be unreadable is
        moved to its problems; in the others nothing.

    Raises:
        OSError: Another process has died, or failed.
    """
    ranks, file = ranks or Ranks(), output / ANSWERS
    asked = {video: found.by_video[video] for video in (found.by_video if videos is None else videos)}
    if ranks.is_first:
        _write_answers(file, _answered(files_of(file), asked))
    ranks.after_first("answers of before")
    done = _answered([file], asked)  # not what another process has written since: all must deal alike
    num_before, num_asked = sum(map(len, done.values())), sum(map(len, asked.values()))
    with ranks.writing(file, num_before, num_asked, progress) as write:
        for video in ranks.share.of({video: found.durations_s.get(video, 0.0) for video in asked if video not in done}):
            memory = VideoMemory(model, processor)
            start = time.perf_counter()
            try:
                memory.watch(media_root / video, fps, max_frames=max_frames)
            except (ValueError, OSError) as error:  # it opened, and yet no frame of it can be read
                lines = [json.dumps({"video": video, "unreadable": str(error)}, ensure_ascii=False) + "\n"]
            else:
                watch_s = time.perf_counter() - start
                answers = _answer(memory, video, asked[video], task, watch_s, by_likelihood, batch_size)
                lines = [_line(answer) for answer in answers]
            write(lines, len(asked[video]))
    if not ranks.is_first:
        return []
    # of a shard the files stay as they are: they also say what could not be read, to whoever merges them
    return collect([file], found, asked, file if videos is None else None)


def collect(files: Sequence[Path], found: Found, videos: Collection[str], output: Path | None) -> list[Answer]:
    """The answers of all processes, put together.

    Args:
        files: `answers.jsonl` of every folder there is; what stands beside one counts too.
        videos: Those that must be done.
        output: The `answers.jsonl` to write, if any.

    Returns:
        As `answer_all`.

    Raises:
        ValueError: There are questions without an answer.
    """
    asked = {video: found.by_video[video] for video in videos}
    done: dict[str, list[Answer]] = {}
    unreadable: dict[str, str] = {}
    for file in files:
        done = _answered(files_of(file), asked) | done
        unreadable |= {
            line["video"]: str(line["unreadable"])
            for part in files_of(file)
            for line in read_lines(part)
            if isinstance(line.get("video"), str) and "unreadable" in line
        }
    missing = [video for video in asked if video not in done and video not in unreadable]
    if missing:
        raise ValueError(
            f"{len(missing)} of {len(asked)} videos are not done yet, the first is {missing[0]}: run what is missing "
            "with --resume"
        )
    for video, questions in asked.items():
        if video not in done:
            del found.by_video[video]
            found.problems.extend(Problem(q.where, "unreadable medium", unreadable[video], q.id) for q in questions)
    done = {video: done[video] for video in asked if video in done}
    if output is not None:
        _write_answers(output, done)
    return [answer for answers in done.values() for answer in answers]


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


def _answered(files: Iterable[Path], asked: dict[str, list[Question]]) -> dict[str, list[Answer]]:
    """The videos that are done, in the order of `asked`."""
    kept: dict[str, Answer] = {}
    fields = get_type_hints(Answer)
    for file in files:
        for entry in read_lines(file):
            if entry.keys() == fields.keys() and all(isinstance(entry[name], kind) for name, kind in fields.items()):
                kept.setdefault(entry["id"], Answer(**entry))
    return {
        video: [kept[question.id] for question in questions]
        for video, questions in asked.items()
        if all(question.id in kept for question in questions)
    }


def _write_answers(file: Path, done: dict[str, list[Answer]]) -> None:
    """All in one file; what a crash left of other videos is gone."""
    write_text(file, "".join(_line(answer) for answers in done.values() for answer in answers))
    remove_shares(file)


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
    scores = (memory.log_likelihoods(question.prompt, list(question.letters)) for question in questions)
    return [(LETTERS[int(one.argmax())], 0) for one in scores]


def count_reasons(problems: Iterable[Problem]) -> dict[str, int]:
    """How many were left out, by why."""
    return dict(Counter(problem.reason for problem in problems).most_common())
