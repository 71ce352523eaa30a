"""Adapters of question sets that come apart from their videos: NExT-QA, ActivityNet-QA, PerceptionTest."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from string import ascii_uppercase
from typing import Any

from .records import Item, Malformed, Problem, Record, each, question_and_answer, text_of

SHORT_ANSWER = "Answer the question using a single word or phrase."
ONLY_THE_LETTER = "Please respond with only the letter of the correct answer."


def nextqa(source: Path) -> Iterator[Record | Problem]:
    """NExT-QA's CSV, multiple choice (`a0` to `a4`, `answer` a number) or open (`answer` a text).

    `map_vid_vidorID.json` beside it says where the videos lie; without it they are looked for by their numbers.
    """
    videos_of = nextqa_videos(source)

    def convert(item: Item) -> list[Record]:
        row = item.value
        video, question = text_of(row, "video"), as_question(text_of(row, "question"))
        paths = videos_of(video)
        identity = f"{video}_{text_of(row, 'qid')}"
        if "a0" not in row:
            answer = text_of(row, "answer")
            return [
                question_and_answer(identity, item.where, paths, f"{question}\n{SHORT_ANSWER}", answer, "open_ended")
            ]
        options = [text_of(row, f"a{i}") for i in range(5)]
        question, answer = multiple_choice(question, options, row.get("answer"))
        return [question_and_answer(identity, item.where, paths, question, answer, "multiple_choice")]

    return each(source, convert)


def activitynet_qa(source: Path) -> Iterator[Record | Problem]:
    """ActivityNet-QA: `{split}_q.json`, joined with `{split}_a.json` beside it on `question_id`."""
    beside = source.with_name(source.name.replace("_q.json", "_a.json"))
    if beside == source or not beside.is_file():
        yield Problem(source.name, "malformed", f"its answers are not beside it: {beside.name}")
        return
    answers = activitynet_answers(beside)

    def convert(item: Item) -> list[Record]:
        video, identity = text_of(item.value, "video_name"), text_of(item.value, "question_id")
        if identity not in answers:
            raise Malformed(f"no answer to {identity} in {beside.name}")
        answer = text_of(answers[identity], "answer")
        question = f"{as_question(text_of(item.value, 'question'))} {SHORT_ANSWER}"
        paths = tuple(f"{folder}v_{video}{s}" for folder in ("", "videos/") for s in (".mp4", ".mkv", ".webm"))
        return [question_and_answer(identity, item.where, paths, question, answer, "open_ended")]

    yield from each(source, convert)


def perception_test(source: Path) -> Iterator[Record | Problem]:
    """PerceptionTest: `{video_id: {"metadata", "mc_question": [{"question", "options", "answer_id"}, ...]}}`.

    In the cup games the end of a video gives the answer away: `cut_frame_mapping_*.json` beside it, where there is one,
    says at which frame to stop.
    """
    cuts: dict[str, int] = {}
    for file in source.parent.glob("cut_frame_mapping_*.json"):
        cuts |= json.loads(file.read_text(encoding="utf-8"))

    def convert(item: Item) -> Iterator[Record]:
        video, entry = item.value.get("key"), item.value.get("value")
        if not isinstance(entry, dict) or not isinstance(entry.get("mc_question"), list):
            raise Malformed("a video needs a list under 'mc_question'")
        paths = (f"{video}.mp4", f"videos/{video}.mp4", f"perception_test/videos/{video}.mp4")
        for asked in entry["mc_question"]:
            if not isinstance(asked, dict) or not isinstance(asked.get("options"), list):
                raise Malformed("a question needs 'options'")
            question, answer = multiple_choice(text_of(asked, "question"), asked["options"], asked.get("answer_id"))
            identity = f"{video}_{asked.get('id', 0)}"
            record = question_and_answer(identity, item.where, paths, question, answer, "multiple_choice")
            if video in cuts:
                rate = entry.get("metadata", {}).get("frame_rate")
                if not isinstance(rate, int | float) or rate <= 0:
                    raise Malformed("a video that is cut needs its frame_rate")
                next(record.media()).update(start_s=0.0, end_s=cuts[video] / rate)
            yield record

    yield from each(source, convert)


def nextqa_videos(source: Path | None) -> Callable[[str], tuple[str, ...]]:
    """Where a video of NExT-QA may lie, given its number; `source`, if any, has the map of numbers beside it."""
    mapping = source.with_name("map_vid_vidorID.json") if source else None
    names = json.loads(mapping.read_text(encoding="utf-8")) if mapping and mapping.is_file() else {}
    folders = ("", "NExTVideo/", "videos/")
    return lambda video: tuple(f"{f}{name}.mp4" for name in (names.get(video), video) if name for f in folders)


def activitynet_answers(beside: Path) -> dict[Any, dict[str, Any]]:
    """The entries of a file of ActivityNet-QA's answers by `question_id`."""
    return {entry.get("question_id"): entry for entry in json.loads(beside.read_text(encoding="utf-8"))}


def as_question(text: str) -> str:
    """ "why did it stop" -> "Why did it stop?" """
    text = text[:1].upper() + text[1:]
    return text if text.endswith(("?", ".", "!")) else text + "?"


def multiple_choice(question: str, options: list[str], answer: Any) -> tuple[str, str]:
    """Question and answer in the words of LLaVA-Video: options "A. ...", answered by "B."."""
    return f"{question}\n{lettered(options)}\n{ONLY_THE_LETTER}", f"{letter_of(answer, options)}."


def options_of(row: dict[str, Any], key: str = "options", most: int = 26) -> list[str]:
    """The options of a multiple choice.

    Raises:
        Malformed: They are no list, or too few or too many.
    """
    options = row.get(key)
    if not isinstance(options, list) or not 2 <= len(options) <= most:
        raise Malformed(f"{key!r} must be a list of two to {most} options, got {str(options)[:60]!r}")
    return [str(option) for option in options]


def lettered(options: list[str], form: str = "{}. {}") -> str:
    """A line for each option, with its letter before it."""
    return "\n".join(form.format(letter, option) for letter, option in zip(ascii_uppercase, options, strict=False))


def letter_of(number: Any, options: list[str]) -> str:
    """The letter of the option that a data set gives by its number, counted from 0."""
    try:
        number = int(number)
    except (TypeError, ValueError):
        raise Malformed(f"the answer must be the number of an option, got {number!r}") from None
    if not 0 <= number < len(options):
        raise Malformed(f"answer {number} of {len(options)} options")
    return ascii_uppercase[number]


def number_of_answer(answer: str, options: list[str]) -> int:
    """The number of an option, from 0, that one's own data give as its text, its letter or its number.

    Raises:
        Malformed: It is none of them, or two options are the same.
    """
    if options.count(answer) > 1:
        raise Malformed(f"two options are {answer!r}")
    if answer in options:
        return options.index(answer)
    letter = answer.rstrip(".)").upper()
    if len(letter) == 1 and letter in ascii_uppercase[: len(options)]:
        return ascii_uppercase.index(letter)
    if answer.isdecimal() and int(answer) < len(options):
        return int(answer)
    raise Malformed(f"the answer {answer!r} is none of the options {', '.join(options)}, nor a letter or number of one")
