"""The published formats by name, and which of them a file is in."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from . import captions, llava, question_sets
from .records import SUFFIXES, Problem, Record, read_items

FORMATS: dict[str, Callable[[Path], Iterator[Record | Problem]]] = {
    "llava": llava.llava,  # LLaVA-Pretrain, LLaVA-Video-178K, ShareGPT
    "messages": llava.messages,
    "plain": llava.plain,
    "webvid": captions.webvid,
    "scenewalk-clips": captions.scenewalk_clips,
    "scenewalk": captions.scenewalk,
    "nextqa": question_sets.nextqa,
    "activitynet-qa": question_sets.activitynet_qa,
    "perception-test": question_sets.perception_test,
}
# By which files a folder is known that a command of ours wrote: it may lie among the data, and holds none.
_WRITTEN = (
    ("dataset.json", "report.json"),
    ("settings.json", "media.jsonl"),
    ("settings.json", "cells.jsonl"),
    ("train_report.json",),
    ("held_out_history.json",),
    ("comparison.json", "comparison.md"),
)
# Files that lie beside the data and are no records of their own.
_COMPANIONS = ("map_vid_vidorID.json", "_a.json", "_meta.json", "dataset.json", "report.json")


def source_files(source: Path, output: Path | None = None) -> list[Path]:
    """The data files that SOURCE, a file or a folder, stands for: not what this program wrote, in `output` or before.

    Raises:
        ValueError: There is no such thing, or nothing in it.
    """
    if source.is_file():
        return [source]
    if not source.is_dir():
        raise ValueError(f"{source}: there is no such file or folder")
    files = annotation_files(source, output)
    files = [file for file in files if not file.name.endswith(_COMPANIONS) and "cut_frame_mapping" not in file.name]
    if not files:
        raise ValueError(f"{source}: this folder holds no {', '.join(SUFFIXES)} file")
    return files


def annotation_files(folder: Path, output: Path | None = None) -> list[Path]:
    """All files below a folder that may hold records, sorted; none of what a command of ours wrote there."""
    if output is not None and output.resolve() == folder.resolve():
        raise ValueError(f"{folder} holds the data: choose another output, {folder / 'prepared'} for instance")
    written = {output.resolve()} if output is not None else set()
    for file in folder.rglob("*.json"):
        if any(mark[0] == file.name and all((file.parent / name).is_file() for name in mark) for mark in _WRITTEN):
            written.add(file.parent.resolve())
    written.discard(folder.resolve())
    return sorted(
        path
        for path in folder.rglob("*")
        if path.suffix in SUFFIXES and path.is_file() and written.isdisjoint(path.resolve().parents)
    )


def detect(file: Path) -> str:
    """The name of the format of a file, from its first readable entry.

    Raises:
        ValueError: It looks like none of them.
    """
    first: Any = next((item.value for item in read_items(file) if not isinstance(item, Problem)), None)
    keys = set(first) if isinstance(first, dict) else set()
    for name, wanted in (
        ("webvid", {"videoid", "name"}),
        ("nextqa", {"video", "question", "answer", "qid"}),
        ("scenewalk", {"scenes", "conversations"}),
        ("scenewalk-clips", {"time_stamp", "conversations"}),
        ("activitynet-qa", {"video_name", "question_id"}),
        ("llava", {"conversations"}),
        ("messages", {"messages"}),
        ("plain", {"question", "answer"}),
    ):
        if wanted <= keys:
            return name
    if keys == {"key", "value"} and isinstance(first["value"], dict) and "mc_question" in first["value"]:
        return "perception-test"
    raise ValueError(
        f"{file}: none of the known formats ({', '.join(FORMATS)}); its first entry has the keys "
        f"{', '.join(sorted(map(str, keys))) or 'none'}. Name the format with --format"
    )
