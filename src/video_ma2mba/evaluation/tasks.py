"""The benchmarks: how their published files are read, what the model is asked, how its answers are read."""

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

from ..data.formats import annotation_files
from ..data.llava import MEDIA_KEYS, SPANS
from ..data.question_sets import (
    activitynet_answers,
    as_question,
    letter_of,
    lettered,
    multiple_choice,
    nextqa_videos,
    number_of_answer,
    options_of,
)  # fmt: skip
from ..data.records import SUFFIXES, Item, Malformed, Problem, convert_all, read_items, text_of
from ..loading import not_from_the_hub
from .questions import (
    LETTERS,
    Question,
    bracketed_letter,
    first_capital,
    leading_letter,
    marked_letter,
    own_answer,
    plain_text,
)  # fmt: skip

ONLY_THE_LETTER = "Answer with the option's letter from the given choices directly."
Convert = Callable[[Item], Iterable[Question]]


@dataclass(frozen=True)
class Task:
    """A benchmark.

    Attributes:
        hub: Data set, configuration and split on the Hub; None in place of the configuration where there is more than
            one, and of all where the questions are one's own.
        open_source: Given an annotation file (None: rows of the Hub), how to read its items.
        read_answer: The letter in an answer; None as a letter leaves the question out. None where a judge reads.
        max_new_tokens: Of an answer, as lmms-eval has them.
        files: What the annotation files are called.
    """

    name: str
    hub: tuple[str, str | None, str] | None
    open_source: Callable[[Path | None], Convert]
    read_answer: Callable[[str, Question], str | None] | None
    max_new_tokens: int
    files: str = r".*"


def read_questions(task: Task, data: str) -> Iterator[Question | Problem]:
    """Everything a task asks.

    Args:
        data: A folder with the published files, one of them, or the id of a data set on the Hub.

    Raises:
        ValueError: There is no such folder, or none of the task's files is in it.
    """
    folder = Path(data).expanduser()
    if folder.is_file():
        if folder.suffix not in SUFFIXES:
            raise ValueError(f"{data}: questions are read from {', '.join(SUFFIXES)} files, or a folder of them")
        yield from convert_all(read_items(folder), task.open_source(folder))
        return
    if folder.is_dir():
        sources = [path for path in annotation_files(folder) if re.fullmatch(task.files, path.name)]
        if not sources:
            raise ValueError(f"{data}: no file of {task.name} in it; it is looked for as {task.files}")
        for source in sources:
            yield from convert_all(read_items(source), task.open_source(source))
        return
    if task.hub is None:
        raise ValueError(f"--data {data}: there is no such folder or file")
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", data):
        raise ValueError(f"{data}: there is no such folder or file, and a Hub id looks like owner/name")
    import datasets

    try:
        rows = datasets.load_dataset(data, task.hub[1], split=task.hub[2])
    except ConnectionError as error:
        raise ValueError(not_from_the_hub(data)) from error
    yield from convert_all((Item(f"{data}, row {i}", row) for i, row in enumerate(rows, 1)), task.open_source(None))


# --- multiple choice ----------------------------------------------------------------------------------------------


def video_mme(item: Item) -> Iterator[Question]:
    """Options come lettered, "A. ..."; the answer is a letter."""
    row = item.value
    options = options_of(row, most=5)
    answer = text_of(row, "answer")
    if answer not in LETTERS[: len(options)]:
        raise Malformed(f"answer {answer!r} of {len(options)} options")
    video = text_of(row, "videoID")
    prompt = "\n".join(
        [
            "Select the best answer to the following multiple-choice question based on the video and the "
            "subtitles. Respond with only the letter (A, B, C, or D) of the correct option.",
            text_of(row, "question"),
            *options,
            "",
            ONLY_THE_LETTER,
        ]
    )
    yield Question(
        id=text_of(row, "question_id"),
        where=item.where,
        videos=tuple(f"{f}{video}.{s}" for f in ("data/", "", "videomme/data/") for s in ("mp4", "MP4", "mkv")),
        prompt=prompt,
        answer=answer,
        options=tuple(re.sub(r"^[A-E]\.\s*", "", option) for option in options),
        groups=_groups(row, "duration", "domain", "sub_category", "task_type"),
    )


def long_video_bench(item: Item) -> Iterator[Question]:
    """`option0` to `option4` or `candidates`; `correct_choice` is a number, and absent from the test split."""
    row = item.value
    if "candidates" in row:
        options = options_of(row, "candidates", 5)
    else:
        options = [str(row[f"option{i}"]) for i in range(5) if row.get(f"option{i}") not in (None, "", "N/A")]
    if not options:
        raise Malformed("it has no options")
    choice = row.get("correct_choice")
    answer = "" if choice in (None, -1) else letter_of(choice, options)
    video = text_of(row, "video_path")
    yield Question(
        id=text_of(row, "id"),
        where=item.where,
        videos=(f"videos/{video}", video),
        prompt=f"{text_of(row, 'question')}\n{lettered(options)}\n{ONLY_THE_LETTER}\n",
        answer=answer,
        options=tuple(options),
        groups=_groups(row, "duration_group", "question_category"),
    )


MVBENCH_FOLDERS = {
    **dict.fromkeys(("object_interaction", "action_sequence", "action_prediction"), "star/Charades_segment"),
    "action_localization": "sta/sta_video_segment",
    **dict.fromkeys(
        ("moving_count", "moving_direction", "moving_attribute", "counterfactual_inference", "object_existence"),
        "clevrer/video_validation",
    ),
    "fine_grained_pose": "nturgbd_convert",
    **dict.fromkeys(("character_order", "object_shuffle", "state_change", "action_count"), "perception/videos"),
    "egocentric_navigation": "vlnqa",
    "episodic_reasoning": "tvqa/video_fps3_hq_segment",
    "fine_grained_action": "Moments_in_Time_Raw/videos",
    "scene_transition": "scene_qa/video",
    "action_antonym": "ssv2_video_mp4",
    "unexpected_action": "FunQA_test/test",
}


def mv_bench(source: Path | None) -> Convert:
    """A file (or a folder of Parquet) for each of twenty subtasks; the answer is the text of a candidate.

    Videos of bounded clips are taken from the folders in which they are cut already.
    """
    if source is None:
        raise ValueError("MVBench has a configuration for each subtask: download it and name its folder with --data")
    subtask = source.stem if source.suffix != ".parquet" else source.parent.name
    if subtask not in MVBENCH_FOLDERS:
        raise ValueError(f"{source}: {subtask!r} is no subtask of MVBench; there are {', '.join(MVBENCH_FOLDERS)}")

    number = count(1)  # rows have no name of their own

    def convert(item: Item) -> Iterator[Question]:
        row, identity = item.value, f"{subtask} {next(number)}"
        options, answer = options_of(row, "candidates", 5), text_of(row, "answer")
        if answer not in options:
            raise Malformed(f"answer {answer!r} is not among the candidates")
        video = text_of(row, "video")
        folder = MVBENCH_FOLDERS[subtask]
        yield Question(
            id=identity,
            where=item.where,
            videos=tuple(f"{place}{video}" for place in (f"{folder}/", f"video/{folder}/", f"{subtask}/", "")),
            prompt=f"Question:{text_of(row, 'question')}\nOption:\n{lettered(options, '({}) {}')}\n"
            "Only give the best option.\n",
            answer=LETTERS[options.index(answer)],
            options=tuple(options),
            groups={"subtask": subtask},
        )

    return convert


KINDS_OF_NEXTQA = {"C": "causal", "T": "temporal", "D": "descriptive"}


def next_qa(source: Path | None) -> Convert:
    """The CSV of the multiple choice; `map_vid_vidorID.json` beside it says where videos lie."""
    videos_of = nextqa_videos(source)

    def convert(item: Item) -> Iterator[Question]:
        row = item.value
        if row.get("a0") is None:
            raise Malformed("no options: this task is the multiple choice, not the open-ended set")
        video, kind = str(row.get("video") or ""), text_of(row, "type").upper()
        if not video:
            raise Malformed("'video' is missing")
        options = [text_of(row, f"a{i}") for i in range(5)]
        yield Question(
            id=f"{video}_{row.get('qid')}",
            where=item.where,
            videos=videos_of(video),
            prompt=f"{as_question(text_of(row, 'question'))}\n{lettered(options)}",
            answer=letter_of(row.get("answer"), options),
            options=tuple(options),
            groups={"kind": KINDS_OF_NEXTQA.get(kind[0], kind), "type": "TN" if kind == "TP" else kind},
        )

    return convert


# --- free answers -------------------------------------------------------------------------------------------------

KINDS_OF_ACTIVITYNET = ("motion", "spatial", "temporal", "yes/no", "colour", "object", "location", "number", "other")


def activitynet_qa(source: Path | None) -> Convert:
    """`test_q.json`, with `test_a.json` beside it joined on `question_id`; or rows that hold both."""
    beside = source.with_name(source.name.replace("_q.json", "_a.json")) if source else None
    answers: dict[Any, dict[str, Any]] = {}
    if beside and beside != source:
        if not beside.is_file():
            raise ValueError(f"{source}: its answers are not beside it: {beside.name}")
        answers = activitynet_answers(beside)

    def convert(item: Item) -> Iterator[Question]:
        row, identity = item.value, text_of(item.value, "question_id")
        if beside and beside != source and identity not in answers:
            raise Malformed(f"no answer to {identity} in {beside.name}")
        answer = {**row, **answers.get(identity, {})}
        video, asked = text_of(row, "video_name"), text_of(row, "question").capitalize() + "?"
        names = [f"{prefix}{video}" for prefix in ("v_", "")]
        kind = str(answer.get("type", ""))
        yield Question(
            id=identity,
            where=item.where,
            videos=tuple(f"{f}{n}.{s}" for n in names for f in ("", "videos/") for s in ("mp4", "mkv", "webm")),
            prompt=f"{asked} Answer the question using a single word or phrase.",
            answer=text_of(answer, "answer"),
            groups={"type": KINDS_OF_ACTIVITYNET[int(kind)] if kind in list("012345678") else kind or "unknown"},
            asked=asked,
            dimension="match",
        )

    return convert


DIMENSIONS = ("correctness", "detail", "context", "temporal", "consistency")


def video_chatgpt(source: Path | None) -> Convert:
    """Generic (three dimensions), Temporal and Consistency, told by the path of the file or by their columns."""
    place = str(source).lower() if source else ""
    number = count(1)  # rows have no name of their own

    def convert(item: Item) -> Iterator[Question]:
        row, identity = item.value, f"{'/'.join(source.parts[-2:]) if source else 'row'} {next(number)}"
        video, answer = text_of(row, "video_name"), text_of(row, "answer")
        texts = [str(row.get(key) or "") for key in ("question_1", "question_2", "question")]
        texts = [text for text in texts if text and text != "None"]
        if not texts:
            raise Malformed("it has no question")
        if "question_1" in row:
            dimensions: tuple[str, ...] = ("consistency",)
        else:
            dimensions = ("temporal",) if "temporal" in place else DIMENSIONS[:3]
        for dimension in dimensions:
            for text in texts:
                yield Question(
                    id=f"{identity}, {dimension}, {texts.index(text)}",
                    where=item.where,
                    videos=tuple(f"{f}{video}.{s}" for f in ("Test_Videos/", "") for s in ("mp4", "mkv", "avi")),
                    prompt=text,
                    answer=answer,
                    groups={"dimension": dimension},
                    asked=text,
                    dimension=dimension,
                )

    return convert


# --- one's own -------------------------------------------------------------------------------------------------------

KNOWN = {"id", "video", "question", "answer", "options"}


def own(item: Item) -> Iterator[Question]:
    """A line of one's own training data: video and question; answer and options may be absent.

    An answer to options is one of them, its letter or its number, from 0; and the model is asked as training asks, in
    `question_sets.multiple_choice`. A free answer is compared as a text. Every other text or number is a category.
    """
    row = item.value
    other = [key for names in MEDIA_KEYS.values() for key in names if key != "video" and row.get(key)]
    other += [key for span in SPANS for key in span if row.get(key) is not None]
    if other:
        raise Malformed(f"{', '.join(other)}: a question is about one whole video, under 'video'")
    video, asked = text_of(row, "video"), text_of(row, "question")
    options = options_of(row) if row.get("options") else []
    answer = "" if row.get("answer") in (None, "") else str(row["answer"]).strip()
    prompt = asked
    if options:
        number = number_of_answer(answer, options) if answer else 0
        prompt, letter = multiple_choice(asked, options, number)
        answer = letter.rstrip(".") if answer else ""
    groups = {key: str(value) for key, value in row.items()
              if key not in KNOWN and isinstance(value, str | int | float) and value != ""}  # fmt: skip
    yield Question(
        id=str(row.get("id") or item.where),
        where=item.where,
        videos=(video, f"videos/{video}"),
        prompt=prompt,
        answer=answer if options else plain_text(answer),
        options=tuple(options),
        groups={**groups, "kind": "multiple choice" if options else "free answer"},
        asked=asked,
        dimension="" if options else "match",
    )


TASKS = {
    task.name: task
    for task in (
        Task("own", None, lambda source: own, own_answer, 64),
        Task("videomme", ("lmms-eval/Video-MME", "videomme", "test"), lambda source: video_mme, marked_letter, 16),
        Task(
            "longvideobench", ("longvideobench/LongVideoBench", None, "validation"), lambda source: long_video_bench,
            first_capital, 32, r"(lvb_(val|test_wo_gt)\.json)|(.*\.parquet)",
        ),
        Task("mvbench", ("OpenGVLab/MVBench", None, "train"), mv_bench, leading_letter, 16, r".*\.(json|parquet)"),
        Task("nextqa", ("lmms-eval/NExTQA", "MC", "test"), next_qa, bracketed_letter, 16, r".*\.(csv|parquet)"),
        Task(
            "activitynetqa", ("lmms-eval/ActivityNetQA", None, "test"), activitynet_qa, None, 64,
            r".*_q\.json|.*\.parquet",
        ),
        Task(
            "videochatgpt", ("lmms-eval/VideoChatGPT", "Generic", "test"), video_chatgpt, None, 1024,
            r".*\.(json|jsonl|parquet)",
        ),
    )
}  # fmt: skip


def _groups(row: dict[str, Any], *keys: str) -> dict[str, str]:
    return {key: str(row[key]) for key in keys if row.get(key) not in (None, "")}
