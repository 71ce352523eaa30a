"""From published files to a manifest: converted, checked, all questions about one video in one conversation.

What is left out stands in `left_out.jsonl` with its file, line and reason, the first ones also in `report.json`, and
the counts add up: every record read is either kept or left out. Looking at media is what takes time; it is remembered
in `media.jsonl` as it goes, so that a run that was interrupted goes on where it stood. The manifest appears only when
it is whole. Records pass through: neither their number nor the size of the files counts in memory.
"""

import itertools
import json
import os
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import IO, Any
from zlib import crc32

from ..files import write_json, write_whole
from ..processes import Share, files_of, in_threads
from .conversations import Conversations, text_in
from .formats import FORMATS, detect, source_files
from .frame_cache import write_frames
from .manifest import DESCRIPTION, NAMES, features
from .media import MediaIndex, UnusableMedium
from .records import Problem, Record

REPORT, LEFT_OUT, MEDIA, FRAMES = "report.json", "left_out.jsonl", "media.jsonl", "frames"
NUM_LISTED = 1000  # problems that report.json has too
RECORDS_AT_A_TIME = 4096  # whose media are looked at together
ROWS_AT_A_TIME = 1000  # of a Parquet file
Progress = Callable[[str, int, int | None], None]


class Preparation:
    """One run of `prepare`."""

    def __init__(self, index: MediaIndex, conversations: Conversations, left_out: IO[str]):
        self.index, self.conversations = index, conversations
        self.num_read = self.num_kept = 0
        self.notes: Counter[str] = Counter()
        self._left_out, self._reasons, self._problems = left_out, Counter[str](), list[Problem]()
        self._same: dict[tuple[str, int], str] = {}  # name and size of a video -> the path it was first met under

    def add(self, record: Record | Problem) -> None:
        """Takes in what an adapter yields."""
        self.num_read += 1
        if isinstance(record, Problem):
            self.leave_out(record)
            return
        try:
            record = self._checked(record)
            is_new = self.conversations.add(record)
        except UnusableMedium as error:
            self.leave_out(Problem(record.where, error.reason, str(error), record.id))
        except UnicodeEncodeError:
            self.leave_out(Problem(record.where, "malformed", "a text holds half of a character"))
        else:
            self.num_kept += is_new
            if not is_new:
                said = "the same conversation under the same id"
                self.leave_out(Problem(record.where, "duplicate", said, record.id))

    def leave_out(self, problem: Problem) -> None:
        """Counts and lists it."""
        self._reasons[problem.reason] += 1
        if len(self._problems) < NUM_LISTED:
            self._problems.append(problem)
        self._left_out.write(json.dumps(asdict(problem)) + "\n")

    def rows(self, broken: dict[str, str]) -> Iterator[dict[str, Any]]:
        """The lines of the manifest; samples with a video that is `broken` are left out after all."""
        for row in self.conversations.rows(broken):
            if isinstance(row, dict):
                yield row
                continue
            self.num_kept -= len(row)
            for problem in row:
                self.leave_out(problem)

    def report(self) -> dict[str, Any]:
        return {
            "records": {"read": self.num_read, "kept": self.num_kept, "left_out": dict(self._reasons)},
            "notes": dict(self.notes),
            "problems": [asdict(problem) for problem in self._problems],
        }

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
        if not all(text_in(message).strip() for message in messages if message["role"] == "assistant"):
            raise UnusableMedium("empty answer", "an assistant's turn has no text")
        for message in messages:
            if message["role"] != "user" and any(entry["type"] != "text" for entry in message["content"]):
                raise UnusableMedium("placeholder mismatch", f"a medium stands in a turn of the {message['role']}")
            if not message["content"]:
                raise UnusableMedium("empty question", "a user's turn has neither a text nor a medium")
            if any(token in text_in(message) for token in ("<video>", "<image>")):
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


def prepare(
    source: Path,
    media_root: Path,
    output: Path,
    *,
    name: str | None = None,
    max_duration_s: float = 24 * 3600.0,
    parquet: bool = False,
    rows_per_file: int | None = None,
    cache: dict[str, Any] | None = None,
    num_workers: int = 1,
    share: Share | None = None,
    progress: Progress = lambda what, done, total: None,
) -> dict[str, Any]:
    """Convert SOURCE, a file or a folder in a published format, to a manifest in `output`.

    Args:
        name: Of the format; None looks at each file.
        max_duration_s: A longer video is left out, as its header must be broken.
        parquet: Write Parquet instead of JSON lines.
        rows_per_file: Of Parquet; None writes one file. Streams are dealt to devices file by file.
        cache: `processor`, `fps` and `encoding` of frames to be stored beside the manifest; None stores none.
        num_workers: Videos that are opened or decoded at a time. What comes out does not depend on it.
        share: Of several runs over the same `source`: look at (and store) its part of the media, and write no manifest.
            A run without it takes over what the others found.
        progress: Called with what is being done, how much of it is done, and how much there is (or None).

    Returns:
        The report, as `report.json` has it. Of a share, {"media": how many it looked at, "cached_frames": ...}.

    Raises:
        ValueError: No such source or media root, or a file in no known format.
    """
    if not media_root.is_dir():
        raise ValueError(f"--media-root {media_root}: there is no such folder")
    sources = [(file, name or detect(file)) for file in source_files(source, output)]
    output.mkdir(parents=True, exist_ok=True)
    share = share or Share()
    store = partial(_store_frames, media_root, output / FRAMES, cache, num_workers, progress)
    with closing(MediaIndex(media_root, output / MEDIA, max_duration_s, share, num_workers)) as index:
        if share.count > 1:
            return _look_at_share(index, share, sources, store, progress)
        report: dict[str, Any] = {}
        with closing(Conversations(output / ".conversations.sqlite")) as conversations:

            def write(file: Path) -> None:
                with file.open("w", encoding="utf-8") as left_out:
                    run = Preparation(index, conversations, left_out)
                    for source_file, form in sources:
                        _read(source_file, form, run, progress)
                    num_frames, broken = store(conversations.videos(), conversations.num_videos)
                    counts = _write_manifest(output, run.rows(broken), parquet, rows_per_file)
                    report.update(run.report())
                    report["sources"] = [{"file": file.name, "format": form} for file, form in sources]
                    report.update(counts, cached_frames=num_frames)

            write_whole(output / LEFT_OUT, write)
    write_json(output / REPORT, report)
    described = {
        "media_root": os.path.relpath(media_root.resolve(), output.resolve()), "num_samples": report["samples"]
    }  # fmt: skip
    write_json(output / DESCRIPTION, described)
    return report


def _read(file: Path, form: str, run: Preparation, progress: Progress) -> None:
    what, opening, records = f"checking {file.name}", f"opening media of {file.name}", FORMATS[form](file)
    num_opened = 0
    while window := list(itertools.islice(records, RECORDS_AT_A_TIME)):
        for _ in run.index.look_at_all(_media(window)):
            num_opened += 1
            progress(opening, num_opened, None)
        for record in window:
            run.add(record)
        progress(what, run.num_read, None)
    if num_opened:  # how many there are is known when all were opened
        progress(opening, num_opened, num_opened)
    progress(what, run.num_read, run.num_read)


def _media(records: Iterable[Record | Problem]) -> Iterator[tuple[str, list[str]]]:
    """(kind, candidates) of all media of the records."""
    for record in records:
        if isinstance(record, Record):
            yield from ((entry["type"], entry["candidates"]) for entry in record.media())


def _look_at_share(
    index: MediaIndex, share: Share, sources: list[tuple[Path, str]], store: Callable, progress: Progress
) -> dict[str, Any]:
    videos: set[str] = set()
    num = 0
    for file, form in sources:
        records = FORMATS[form](file)
        while window := list(itertools.islice(records, RECORDS_AT_A_TIME)):
            looked = index.look_at_all(_media(window), lambda path: crc32(path.encode()) % share.count == share.index)
            for kind, path in looked:
                num += 1
                progress(f"opening media of shard {share}", num, None)
                if kind == "video":
                    videos.add(path)
    progress(f"opening media of shard {share}", num, num)
    num_frames, _ = store(sorted(videos), len(videos))
    return {"media": num, "cached_frames": num_frames}


def _store_frames(
    root: Path, folder: Path, cache: dict[str, Any] | None, num_workers: int, progress: Progress,
    videos: Iterable[str], total: int,
) -> tuple[int, dict[str, str]]:  # fmt: skip
    """Stores the frames of videos beside the manifest; returns their number, and what is wrong with some videos."""
    if cache is None:
        return 0, {}
    stop = threading.Event()
    # alone, a decoder takes all cores; of several, each has its part of them
    num_threads = None if num_workers == 1 else max((os.cpu_count() or 1) // num_workers, 1)

    def write(video: str) -> int | str:
        try:
            return write_frames(root, video, folder, **cache, num_threads=num_threads, stop=stop.is_set)
        except (ValueError, OSError) as error:
            return str(error)

    num_frames, broken = 0, {}
    for number, (video, result) in enumerate(in_threads(write, videos, num_workers, stop), 1):
        if isinstance(result, int):
            num_frames += result
        else:
            broken[video] = result
        progress("storing frames", number, total)
    return num_frames, broken


def _write_manifest(
    output: Path, rows: Iterator[dict[str, Any]], parquet: bool, rows_per_file: int | None
) -> dict[str, Any]:
    """Writes the rows and counts them. Until `dataset.json` is written again, there is no manifest."""
    counts = {"samples": 0, "turns": 0, "watched_s": 0}

    def counted() -> Iterator[dict[str, Any]]:
        for row in rows:
            counts["samples"] += 1
            counts["turns"] += len(row["messages"]) // 2
            counts["watched_s"] += row["watched_s"]
            yield row

    lines, table = (output / name for name in NAMES)
    write, name = (_write_parquet, table) if parquet else (_write_lines, lines)
    wanted, written = counted(), list[Path]()
    try:
        for number in itertools.count(1):
            file = name.with_name(f".{number}.{name.name}.partial")
            written.append(file)
            if not write(file, itertools.islice(wanted, rows_per_file)) and number > 1:
                written.pop().unlink()
                break
            if rows_per_file is None:
                break
        for old in (output / DESCRIPTION, *files_of(lines), *files_of(table)):
            old.unlink(missing_ok=True)
        for index, file in enumerate(written):
            file.rename(Share(index, len(written)).file(name))
    finally:
        for file in written:
            file.unlink(missing_ok=True)
    return counts


def _write_lines(path: Path, rows: Iterable[dict[str, Any]]) -> int:
    num = 0
    with path.open("w", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
            num += 1
    return num


def _write_parquet(path: Path, rows: Iterable[dict[str, Any]]) -> int:
    import pyarrow
    from pyarrow.parquet import ParquetWriter

    num, rows, columns = 0, iter(rows), features()
    with ParquetWriter(path, columns.arrow_schema) as writer:
        while part := list(itertools.islice(rows, ROWS_AT_A_TIME)):
            writer.write_table(pyarrow.Table.from_pylist(part, schema=columns.arrow_schema))
            num += len(part)
    return num
