"""What the adapters of published data sets hand on, and how their files are read: item by item, each with its line."""

import csv
import itertools
import json
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO, Any, TypeVar

Converted = TypeVar("Converted")
_CHARACTERS = 1 << 16  # of a JSON file that are read at a time
_MEDIA_WORDS = re.compile(r"video|image|picture|photo|frame|clip|audio|sound|media|pixel", re.IGNORECASE)
_SYSTEM_KEYS = ("system", "system_prompt")
SUFFIXES = (".json", ".jsonl", ".csv", ".parquet")


@dataclass(frozen=True)
class Record:
    """One conversation of a published file.

    Attributes:
        id: As the file has it, or made of what identifies it there.
        where: File and line (or row), for reports.
        messages: {"role", "content"}; content is a list of {"type": "text", "text"} and
            {"type": "video" | "image", "candidates", "start_s", "end_s"}. The candidates are paths under the media
            root, tried in order; the times bound a clip and may be absent.
        kind: "caption", "open_ended", "multiple_choice" or "chat": turns of one video are grouped in this order.
    """

    id: str
    where: str
    messages: list[dict[str, Any]]
    kind: str = "chat"

    def media(self) -> Iterator[dict[str, Any]]:
        """The video and image entries, in order."""
        return media_of(self.messages)


@dataclass(frozen=True)
class Problem:
    """Why a record, or a part of one, was left out."""

    where: str
    reason: str
    message: str
    id: str = ""


@dataclass(frozen=True)
class Item:
    """One raw entry of a file."""

    where: str
    value: Any = field(hash=False)


class Malformed(ValueError):
    """An item that is not what its format says; the message says how."""


def media_of(messages: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    return (entry for message in messages for entry in message["content"] if entry["type"] != "text")


def medium(kind: str, *candidates: str, start_s: float | None = None, end_s: float | None = None) -> dict[str, Any]:
    """A video or image entry of a message."""
    entry: dict[str, Any] = {"type": kind, "candidates": list(candidates)}
    if start_s is not None and end_s is not None:
        entry |= {"start_s": float(start_s), "end_s": float(end_s)}
    return entry


def user(*parts: dict[str, Any] | str) -> dict[str, Any]:
    """A user turn of media and texts; empty texts are left out."""
    content = [{"type": "text", "text": part} if isinstance(part, str) else part for part in parts if part]
    return {"role": "user", "content": content}


def assistant(text: str) -> dict[str, Any]:
    return {"role": "assistant", "content": [{"type": "text", "text": text}]}


def question_and_answer(
    identity: str, where: str, video: tuple[str, ...], question: str, answer: str, kind: str
) -> Record:
    """One question about a whole video."""
    return Record(identity, where, [user(medium("video", *video), question), assistant(answer)], kind)


def text_of(item: dict[str, Any], key: str) -> str:
    """A text that must be there and must say something."""
    value = item.get(key)
    if not isinstance(value, str) or not value.strip():
        raise Malformed(f"{key!r} must be a text, got {value!r}")
    return value.strip()


def each(source: Path, convert: Callable[[Item], Iterable[Converted]]) -> Iterator[Converted | Problem]:
    """Converts a file item by item; an item that is malformed becomes a Problem and the others go on."""
    return convert_all(read_items(source), convert)


def convert_all(
    items: Iterable[Item | Problem], convert: Callable[[Item], Iterable[Converted]]
) -> Iterator[Converted | Problem]:
    """As `each`, of items that were read already."""
    for item in items:
        if isinstance(item, Problem):
            yield item
            continue
        try:
            if not isinstance(item.value, dict):
                raise Malformed(f"a record must be an object, got {str(item.value)[:60]!r}")
            for converted in convert(item):
                if isinstance(converted, Record):
                    converted = _complete(converted, item.value)  # type: ignore[assignment]  # what it was
                yield converted
        except (ValueError, TypeError, LookupError, AttributeError) as error:  # the last three: a list for a text, ...
            identity = item.value.get("id", "") if isinstance(item.value, dict) else ""
            said = "" if isinstance(error, ValueError) else "a value of another kind than the format's: "
            yield Problem(item.where, "malformed", f"{said}{error}", str(identity))


def named_media(item: dict[str, Any]) -> list[str]:
    """The keys that may name a medium, by their words, and hold something that may."""
    return [key for key, value in item.items() if _MEDIA_WORDS.search(str(key)) and isinstance(value, str | list | dict)
            and value]  # fmt: skip


def _complete(record: Record, item: dict[str, Any]) -> Record:
    """The record with the system prompt that stands beside it; refused where its medium was not read."""
    if not any(record.media()) and (names := named_media(item)):
        raise Malformed(f"{', '.join(names)} may name a medium, and is not read: call it 'video' or 'image'")
    for key in _SYSTEM_KEYS:
        prompt = item.get(key)
        if not prompt:
            continue
        if not isinstance(prompt, str):
            raise Malformed(f"{key!r} must be a text, got {prompt!r}")
        system = {"role": "system", "content": [{"type": "text", "text": prompt.strip()}]}
        if record.messages[:1] == [system]:
            continue
        if any(message["role"] == "system" for message in record.messages):
            raise Malformed(f"a system prompt stands under {key!r} and in the turns; leave one out")
        record = replace(record, messages=[system, *record.messages])
    return record


def read_items(source: Path) -> Iterator[Item | Problem]:
    """The entries of a .json list, a .jsonl, a .csv or a .parquet file, each with its place.

    A file of which the rest cannot be read ends with a Problem.
    """
    if source.suffix == ".parquet":
        import pyarrow.parquet

        try:
            rows = pyarrow.parquet.ParquetFile(source)
            number = 0
            for batch in rows.iter_batches():
                for row in batch.to_pylist():
                    number += 1
                    yield Item(f"{source.name}, row {number}", row)
        except (pyarrow.ArrowInvalid, OSError) as error:
            yield Problem(source.name, "malformed", f"not a Parquet file that can be read: {error}")
        return
    if source.suffix == ".csv":
        with source.open(encoding="utf-8", errors="replace", newline="") as file:
            reader = csv.DictReader(file)
            for row in reader:
                yield Item(f"{source.name}:{reader.line_num}", row)
        return
    if source.suffix == ".jsonl":
        with source.open(encoding="utf-8", errors="replace") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield _parse(line, f"{source.name}:{number}")
        return
    yield from _read_json(source)


def _parse(line: str, where: str) -> Item | Problem:
    try:
        return Item(where, json.loads(line))
    except json.JSONDecodeError as error:
        return Problem(where, "malformed", f"not JSON: {error.msg} at character {error.pos + 1}")


def _read_json(source: Path) -> Iterator[Item | Problem]:
    """The elements of a list, or the values of an object as {"key", "value"}; read one by one, for their places.

    The place is the line, and which entry it is where several stand on one line.
    """
    with source.open(encoding="utf-8", errors="replace") as file:
        text = _Text(file)
        opening = text.next_mark()
        if opening not in ("[", "{"):
            yield Problem(f"{source.name}:1", "malformed", "neither a JSON list nor a JSON object")
            return
        text.skip()
        line_before = text.line
        for number in itertools.count(1):
            if text.next_mark() in ("]", "}"):
                return
            place = f"{source.name}:{text.line}"
            where = place if text.line != line_before else f"{place}, entry {number}"
            line_before = text.line
            try:
                value = text.value()
                if opening == "{":
                    if text.next_mark() != ":":
                        raise json.JSONDecodeError("no colon after a key", "", 0)
                    text.skip()
                    value = {"key": value, "value": text.value()}
            except json.JSONDecodeError as error:
                yield Problem(place, "malformed", f"not JSON from here on: {error.msg}")
                return
            yield Item(where, value)
            mark = text.next_mark()
            if mark == ",":
                text.skip()
            elif mark not in ("]", "}"):
                yield Problem(place, "malformed", f"the file ends, or breaks off, after entry {number}")
                return


class _Text:
    """A JSON file of which only the value at hand is in memory."""

    def __init__(self, file: IO[str]):
        self._file, self._text, self._at, self._decoder = file, "", 0, json.JSONDecoder()
        self.line, self._counted = 1, 0  # the line of what comes next; up to where its breaks are counted
        self._is_whole = False

    def next_mark(self) -> str:
        """The next character that is no space, which stays; "" at the end."""
        while True:
            while self._at < len(self._text) and self._text[self._at] in " \t\r\n\ufeff":
                self._at += 1
            if self._at < len(self._text) or not self._read(_CHARACTERS):
                break
        self.line += self._text.count("\n", self._counted, self._at)
        self._counted = self._at
        return self._text[self._at : self._at + 1]

    def skip(self) -> None:
        """Goes over one character."""
        self._at += 1

    def value(self) -> Any:
        """The value that begins here.

        Raises:
            json.JSONDecodeError: There is none.
        """
        self.next_mark()
        num_characters = _CHARACTERS
        while True:
            try:
                value, end = self._decoder.raw_decode(self._text, self._at)
                if end < len(self._text) or self._is_whole:  # a number may go on
                    self._at = end
                    return value
            except json.JSONDecodeError as error:
                near_the_end = error.msg.startswith("Unterminated string") or error.pos > len(self._text) - 16
                if self._is_whole or not near_the_end:  # then more text does not put it right
                    raise
            self._read(num_characters)
            num_characters *= 2  # a value that is longer than all that was read is not tried too often

    def _read(self, num_characters: int) -> bool:
        more = self._file.read(num_characters)
        self._is_whole = not more
        self.line += self._text.count("\n", self._counted, self._at)
        self._text, self._at, self._counted = self._text[self._at :] + more, 0, 0
        return bool(more)
