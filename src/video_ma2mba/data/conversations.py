"""Conversations on their way into a manifest, kept on disk: memory does not grow with their number.

A small database beside the manifest finds what was there before and puts the questions about one video together.
"""

import hashlib
import json
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .records import Problem, Record, media_of

KIND_ORDER = ("caption", "open_ended", "multiple_choice", "chat")  # of the turns about one video
_TABLES = """
PRAGMA journal_mode = OFF; PRAGMA synchronous = OFF; PRAGMA cache_size = -65536;
CREATE TABLE seen (digest BLOB PRIMARY KEY) WITHOUT ROWID;
CREATE TABLE ids (id TEXT PRIMARY KEY, num INTEGER) WITHOUT ROWID;
CREATE TABLE samples (key TEXT PRIMARY KEY, number INTEGER) WITHOUT ROWID;
CREATE TABLE parts (number INTEGER PRIMARY KEY, sample INTEGER, kind INTEGER, id TEXT, num INTEGER, place TEXT,
    messages TEXT);
CREATE TABLE videos (path TEXT PRIMARY KEY) WITHOUT ROWID;
"""
Part = tuple[int, int, str, int, str, str]  # sample, number, id, which of those under this id, place, messages


class Conversations:
    """Records by the sample they become part of; samples come in the order in which their first records came.

    Args:
        file: Of the database, which is made anew and removed at the end: a run that was killed reads its sources again.
    """

    def __init__(self, file: Path):
        self.file = file
        file.unlink(missing_ok=True)
        self._base = sqlite3.connect(file)
        self._base.executescript(_TABLES)
        self._num = 0

    def close(self) -> None:
        self._base.close()
        self.file.unlink(missing_ok=True)

    def add(self, record: Record) -> bool:
        """False where the same conversation was there before under the same id.

        Raises:
            UnicodeEncodeError: A text of it cannot be written.
        """
        do = self._base.execute
        content = json.dumps(record.messages, ensure_ascii=False)
        digest = hashlib.blake2b(f"{record.id}\0{content}".encode(), digest_size=16).digest()
        if not do("INSERT OR IGNORE INTO seen VALUES (?)", (digest,)).rowcount:
            return False
        self._num += 1
        insert = "INSERT INTO ids VALUES (?, 1) ON CONFLICT DO UPDATE SET num = num + 1 RETURNING num"
        ((num_of_id,),) = do(insert, (record.id,)).fetchall()
        key = json.dumps(_grouping_key(record) or [record.id, num_of_id])
        sample = self._num
        if not do("INSERT OR IGNORE INTO samples VALUES (?, ?)", (key, sample)).rowcount:
            ((sample,),) = do("SELECT number FROM samples WHERE key = ?", (key,)).fetchall()
        part = (self._num, sample, KIND_ORDER.index(record.kind), record.id, num_of_id, record.where, content)
        do("INSERT INTO parts VALUES (?, ?, ?, ?, ?, ?, ?)", part)
        for entry in record.media():
            if entry["type"] == "video":
                do("INSERT OR IGNORE INTO videos VALUES (?)", (entry["path"],))
        return True

    def videos(self) -> Iterator[str]:
        """All that are watched, sorted."""
        return (path for (path,) in self._base.execute("SELECT path FROM videos ORDER BY path"))

    @property
    def num_videos(self) -> int:
        return self._base.execute("SELECT count(*) FROM videos").fetchone()[0]

    def rows(self, broken: dict[str, str]) -> Iterator[dict[str, Any] | list[Problem]]:
        """The lines of the manifest; or, of a sample that shows one of the videos that are `broken`, what to report."""
        self._base.execute("CREATE INDEX by_sample ON parts (sample, kind, number)")
        query = "SELECT sample, number, id, num, place, messages FROM parts ORDER BY sample, kind, number"
        parts: list[Part] = []
        for part in self._base.execute(query):
            if parts and part[0] != parts[0][0]:
                yield _row(parts, broken)
                parts = []
            parts.append(part)
        if parts:
            yield _row(parts, broken)


def _row(parts: list[Part], broken: dict[str, str]) -> dict[str, Any] | list[Problem]:
    conversations = [json.loads(content) for *_, content in parts]
    media = [entry for messages in conversations for entry in media_of(messages)]
    if broken and (paths := [entry["path"] for entry in media if entry["path"] in broken]):
        said = broken[paths[0]]
        return [Problem(place, "unreadable medium", said, identity) for _, _, identity, _, place, _ in parts]
    _, _, identity, num, *_ = min(parts, key=lambda part: part[1])  # the first that came
    messages = _merged(conversations)
    media = list(media_of(messages))
    return {
        "id": identity if num == 1 else f"{identity}#{num}",
        "messages": messages,
        "watched_s": sum(
            entry.get("end_s", entry["duration_s"]) - entry.get("start_s", 0.0)
            for entry in media
            if entry["type"] == "video"
        ),
        "num_images": sum(entry["type"] == "image" for entry in media),
        "num_characters": sum(len(text_in(message)) for message in messages),
    }


def _merged(conversations: list[list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """The turns of all: captions first, the medium once, a question that was asked before left out."""
    if len(conversations) == 1:
        return conversations[0]
    merged: list[dict[str, Any]] = []
    asked: set[str] = set()
    for messages in conversations:
        if merged:
            messages = [{**m, "content": [e for e in m["content"] if e["type"] == "text"]} for m in messages]
        for question, answer in zip(messages[::2], messages[1::2], strict=True):
            text = text_in(question)
            if text not in asked:
                merged += [question, answer]
                asked.add(text)
    return merged


def _grouping_key(record: Record) -> list[Any] | None:
    """What records must share to become one conversation: one video, shown before the first question."""
    media = list(record.media())
    first = next(message for message in record.messages if message["role"] == "user")
    if len(media) != 1 or media[0]["type"] != "video" or media[0] not in first["content"]:
        return None
    if record.messages[0]["role"] == "system":
        return None
    return ["video", media[0]["path"], media[0].get("start_s"), media[0].get("end_s")]


def text_in(message: dict[str, Any]) -> str:
    """All texts of a message."""
    return "".join(entry["text"] for entry in message["content"] if entry["type"] == "text")
