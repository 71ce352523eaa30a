"""From published files to a manifest: converted, checked, all questions about one video in one conversation.

What is left out stands in `report.json` with its file, line and reason, and the counts add up: every record read is
either kept or left out. Looking at media is what takes time; it is remembered in `media.jsonl` as it goes, so that a
run that was interrupted goes on where it stood. The manifest appears only when it is whole.
"""

import json
import os
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ..files import write_json, write_text, write_whole
from .formats import FORMATS, detect, source_files
from .frame_cache import write_frames
from .manifest import DESCRIPTION, NAMES, features
from .media import MediaIndex, UnusableMedium
from .records import Problem, Record

KIND_ORDER = ("caption", "open_ended", "multiple_choice", "chat")  # of the turns about one video
REPORT = "report.json"
Progress = Callable[[str, int, int | None], None]


@dataclass
class Sample:
    """A conversation on its way into the manifest."""

    id: str
    parts: list[Record] = field(default_factory=list)

    @property
    def messages(self) -> list[dict[str, Any]]:
        """The turns of all parts: captions first, the medium once, a question that was asked before left out."""
        if len(self.parts) == 1:
            return self.parts[0].messages
        merged: list[dict[str, Any]] = []
        asked: set = set()
        for part in sorted(self.parts, key=lambda part: KIND_ORDER.index(part.kind)):
            messages = part.messages
            if merged:
                messages = [{**m, "content": [e for e in m["content"] if e["type"] == "text"]} for m in messages]
            for question, answer in zip(messages[::2], messages[1::2], strict=True):
                text = _text(question)
                if text not in asked:
                    merged += [question, answer]
                    asked.add(text)
        return merged


class Preparation:
    """One run of `prepare`."""

    def __init__(self, index: MediaIndex):
        self.index = index
        self.problems: list[Problem] = []
        self.notes: Counter[str] = Counter()
        self.num_read = self.num_kept = 0
        self.samples: dict[Any, Sample] = {}
        self._seen: dict[str, set[str]] = {}  # id -> conversations under it
        self._same: dict[tuple[str, int], str] = {}  # name and size of a video -> the path it was first met under

    def add(self, record: Record | Problem) -> None:
        """Takes in what an adapter yields."""
        self.num_read += 1
        if isinstance(record, Record):
            try:
                record = self._checked(record)
            except UnusableMedium as error:
                record = Problem(record.where, error.reason, str(error), record.id)
        if isinstance(record, Problem):
            self.problems.append(record)
            return
        content = json.dumps(record.messages)
        if content in self._seen.setdefault(record.id, set()):
            self.problems.append(
                Problem(record.where, "duplicate", "the same conversation under the same id", record.id)
            )
            return
        self._seen[record.id].add(content)
        self.num_kept += 1
        key = _grouping_key(record) or (record.id, len(self._seen[record.id]))
        if key in self.samples:
            self.samples[key].parts.append(record)
        else:
            number = len(self._seen[record.id])
            self.samples[key] = Sample(record.id if number == 1 else f"{record.id}#{number}", [record])

    def _checked(self, record: Record) -> Record:
        """The record with media that exist and clips that lie in them.

        Raises:
            UnusableMedium: It cannot be used; the message says why.
        """
        if not record.messages:
            raise UnusableMedium("empty conversation", "it has no turn")
        messages: list[dict[str, Any]] = []
        dropped = False
        for message in record.messages:
            if dropped and message["role"] == "assistant":  # it described a clip that is not there
                dropped = False
                continue
            content = []
            for entry in message["content"]:
                if entry["type"] != "text":
                    entry = self._locate(entry)
                if entry is None:
                    self.notes["scenes beyond the end of their video"] += 1
                    dropped = True
                    break
                content.append(entry)
            else:
                messages.append({"role": message["role"], "content": content})
        roles = [message["role"] for message in messages if message["role"] != "system"]
        if "assistant" not in roles:
            raise UnusableMedium("no assistant's turn", "nothing in it is answered")
        if roles[-1] != "assistant":  # an open question at the end teaches nothing
            messages, roles = messages[:-1], roles[:-1]
        if roles != ["user", "assistant"] * (len(roles) // 2):
            raise UnusableMedium("turns do not alternate", f"the roles are {', '.join(roles)}")
        if not all(_text(message).strip() for message in messages if message["role"] == "assistant"):
            raise UnusableMedium("empty answer", "an assistant's turn has no text")
        for message in messages:
            if message["role"] != "user" and any(entry["type"] != "text" for entry in message["content"]):
                raise UnusableMedium("placeholder mismatch", f"a medium stands in a turn of the {message['role']}")
            if not message["content"]:
                raise UnusableMedium("empty question", "a user's turn has neither a text nor a medium")
            if any(token in _text(message) for token in ("<video>", "<image>")):
                raise UnusableMedium("placeholder mismatch", "a text holds a placeholder that stands for no medium")
        return Record(record.id, record.where, messages, record.kind)

    def _locate(self, entry: dict[str, Any]) -> dict[str, Any] | None:
        """The entry with its path and duration; None for a clip that begins after its video ends."""
        medium = self.index.find(entry["type"], entry["candidates"])
        if entry["type"] == "image":
            return {"type": "image", "path": medium.path}
        # a clip that some sets have under two paths: the same name, and the same to the byte
        path = self._same.setdefault((Path(medium.path).name, medium.num_bytes), medium.path)
        located = {"type": "video", "path": path, "duration_s": medium.duration_s}
        if "start_s" in entry:
            end_s = min(entry["end_s"], medium.duration_s)
            if not 0 <= entry["start_s"] < end_s:
                return None
            located |= {"start_s": entry["start_s"], "end_s": end_s}
        return located

    def rows(self) -> Iterator[dict[str, Any]]:
        """The lines of the manifest."""
        for sample in self.samples.values():
            messages = sample.messages
            media = [entry for message in messages for entry in message["content"] if entry["type"] != "text"]
            yield {
                "id": sample.id,
                "messages": messages,
                "watched_s": sum(
                    entry.get("end_s", entry["duration_s"]) - entry.get("start_s", 0.0)
                    for entry in media
                    if entry["type"] == "video"
                ),
                "num_images": sum(entry["type"] == "image" for entry in media),
                "num_characters": sum(len(_text(message)) for message in messages),
            }

    def report(self) -> dict[str, Any]:
        left_out = Counter(problem.reason for problem in self.problems)
        return {
            "records": {"read": self.num_read, "kept": self.num_kept, "left_out": dict(left_out)},
            "notes": dict(self.notes),
            "problems": [asdict(problem) for problem in self.problems],
        }


def prepare(
    source: Path,
    media_root: Path,
    output: Path,
    *,
    name: str | None = None,
    max_duration_s: float = 24 * 3600.0,
    parquet: bool = False,
    cache: dict[str, Any] | None = None,
    progress: Progress = lambda what, done, total: None,
) -> dict[str, Any]:
    """Convert SOURCE, a file or a folder in a published format, to a manifest in `output`.

    Args:
        name: Of the format; None looks at each file.
        max_duration_s: A longer video is left out, as its header must be broken.
        parquet: Write Parquet instead of JSON lines.
        cache: `processor`, `fps` and `encoding` of frames to be stored beside the manifest; None stores none.
        progress: Called with what is being done, how much of it is done, and how much there is (or None).

    Returns:
        The report, as `report.json` has it.

    Raises:
        ValueError: No such source or media root, or a file in no known format.
    """
    if not media_root.is_dir():
        raise ValueError(f"--media-root {media_root}: there is no such folder")
    sources = [(file, name or detect(file)) for file in source_files(source)]
    output.mkdir(parents=True, exist_ok=True)
    index = MediaIndex(media_root, output / "media.jsonl", max_duration_s)
    run = Preparation(index)
    try:
        for file, form in sources:
            for record in FORMATS[form](file):
                run.add(record)
                progress(f"checking {file.name}", run.num_read, None)
        num_frames = _cache(run, media_root, output / "frames", cache, progress) if cache else 0
    finally:
        index.close()

    rows = list(run.rows())
    report = run.report() | {
        "sources": [{"file": file.name, "format": form} for file, form in sources],
        "samples": len(rows),
        "turns": sum(len(row["messages"]) // 2 for row in rows),
        "watched_s": sum(row["watched_s"] for row in rows),
        "cached_frames": num_frames,
    }
    write_json(output / REPORT, report)
    _write_manifest(output, rows, parquet)
    described = {"media_root": os.path.relpath(media_root.resolve(), output.resolve()), "num_samples": len(rows)}
    write_json(output / DESCRIPTION, described)
    return report


def _cache(run: Preparation, root: Path, folder: Path, cache: dict[str, Any], progress: Progress) -> int:
    """Stores the frames of all videos; samples of one that does not decode are left out after all."""
    videos = {entry["path"] for sample in run.samples.values() for part in sample.parts for entry in part.media()
              if entry["type"] == "video"}  # fmt: skip
    num_frames, broken = 0, {}
    for number, video in enumerate(sorted(videos), 1):
        try:
            num_frames += write_frames(root, video, folder, **cache)
        except (ValueError, OSError) as error:
            broken[video] = str(error)
        progress("storing frames", number, len(videos))
    for key, sample in list(run.samples.items()):
        paths = {entry.get("path") for part in sample.parts for entry in part.media()} & set(broken)
        if paths:
            del run.samples[key]
            for part in sample.parts:
                run.num_kept -= 1
                run.problems.append(Problem(part.where, "unreadable medium", broken[paths.copy().pop()], part.id))
    return num_frames


def _grouping_key(record: Record) -> tuple | None:
    """What records must share to become one conversation: one video, shown before the first question."""
    media = list(record.media())
    first = next(message for message in record.messages if message["role"] == "user")
    if len(media) != 1 or media[0]["type"] != "video" or media[0] not in first["content"]:
        return None
    if record.messages[0]["role"] == "system":
        return None
    return media[0]["path"], media[0].get("start_s"), media[0].get("end_s")


def _text(message: dict[str, Any]) -> str:
    return "".join(entry["text"] for entry in message["content"] if entry["type"] == "text")


def _write_manifest(output: Path, rows: list[dict[str, Any]], parquet: bool) -> None:
    lines, table = (output / name for name in NAMES)
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    if not parquet:
        write_text(lines, text)
        table.unlink(missing_ok=True)
        return
    from datasets import Dataset

    write_whole(table, Dataset.from_list(rows, features=features()).to_parquet)
    lines.unlink(missing_ok=True)
