"""Adapters of captioned video: WebVid's clips, and SceneWalk's long videos whose scenes have captions of their own.

Stage 1.5 of the paper trains on SceneWalk with clips and captions interleaved: here each scene is a user turn that
holds nothing but its frames, and its caption is the answer. The paper does not publish its exact template.
"""

import re
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .llava import PLACEHOLDER, from_conversations
from .records import (
    Item,
    Malformed,
    Problem,
    Record,
    assistant,
    each,
    medium,
    question_and_answer,
    read_items,
    text_of,
    user,
)

DESCRIBE = "Describe the video."


def webvid(source: Path) -> Iterator[Record | Problem]:
    """`videoid,contentUrl,duration,page_dir,name` in CSV; `name` is the caption."""

    def convert(item: Item) -> list[Record]:
        video, folder = text_of(item.value, "videoid"), (item.value.get("page_dir") or "").strip()
        paths = (f"videos/{folder}/{video}.mp4", f"{folder}/{video}.mp4", f"videos/{video}.mp4", f"{video}.mp4")
        caption = text_of(item.value, "name")
        return [question_and_answer(video, item.where, paths, DESCRIBE, caption, "caption")]

    return each(source, convert)


def scenewalk_clips(source: Path) -> Iterator[Record | Problem]:
    """SceneWalk's first release: a row per clip. The clips of one URL become one conversation, in time order.

    No media come with it: a file is looked for under the video's id, as the URL has it.
    """
    clips = sqlite3.connect("")  # a file of its own, as far as it does not fit into memory
    clips.execute("CREATE TABLE clips (number INTEGER PRIMARY KEY, url, start_s, end_s, caption, place)")
    for item in read_items(source):
        if isinstance(item, Problem):
            yield item
            continue
        row = item.value if isinstance(item.value, dict) else {}
        try:
            url, span = text_of(row, "url"), row.get("time_stamp")
            start_s, end_s = _seconds(span, "start"), _seconds(span, "end")
            if not 0 <= start_s < end_s:
                raise Malformed(f"a clip from {start_s:g} s to {end_s:g} s")
            clip = (url, start_s, end_s, _caption(row), item.where)
            clips.execute("INSERT INTO clips (url, start_s, end_s, caption, place) VALUES (?, ?, ?, ?, ?)", clip)
        except (Malformed, UnicodeEncodeError) as error:
            yield Problem(item.where, "malformed", str(error), str(row.get("id", "")))
    clips.execute("CREATE INDEX by_url ON clips (url, start_s, end_s, number)")
    for (url,) in clips.execute("SELECT url FROM clips GROUP BY url ORDER BY min(number)"):
        query = "SELECT start_s, end_s, caption, place FROM clips WHERE url = ? ORDER BY start_s, end_s, number"
        scenes = clips.execute(query, (url,)).fetchall()
        name = re.split(r"[/=]", url.rstrip("/"))[-1]
        paths = [f"{folder}{name}{suffix}" for folder in ("", "videos/") for suffix in (".mp4", ".mkv", ".webm")]
        yield Record(url, scenes[0][3], _interleave(paths, [scene[:3] for scene in scenes]), "caption")
    clips.close()


def scenewalk(source: Path) -> Iterator[Record | Problem]:
    """SceneWalk's later release: a line per video, with `scenes` and a question and answer for each.

    Where the conversations do not pair up with the scenes they are questions about the whole video.
    """

    def convert(item: Item) -> list[Record]:
        record = item.value
        scenes, turns = record.get("scenes"), record.get("conversations")
        if not isinstance(scenes, list) or not isinstance(turns, list):
            raise Malformed("a record needs lists under 'scenes' and 'conversations'")
        if len(turns) != 2 * len(scenes) or not scenes:
            try:
                return [from_conversations(item, "chat")]
            except Malformed as error:
                raise Malformed("neither a pair of turns for each scene nor an ordinary conversation") from error
        spans = [(_seconds(scene, "start"), _seconds(scene, "end")) for scene in scenes]
        captions = [_caption({"conversations": turns[2 * i : 2 * i + 2]}) for i in range(len(scenes))]
        timed = sorted(
            (start_s, end_s, caption)
            for (start_s, end_s), caption in zip(spans, captions, strict=True)
            if end_s > start_s
        )
        video = text_of(record, "video")
        messages = _interleave([video, f"videos/{video}"], timed)
        return [Record(str(record.get("id", video)), item.where, messages, "caption")]

    return each(source, convert)


def _interleave(paths: list[str], scenes: list[tuple[float, float, str]]) -> list[dict[str, Any]]:
    messages = []
    for start_s, end_s, caption in scenes:
        messages += [user(medium("video", *paths, start_s=start_s, end_s=end_s)), assistant(caption)]
    return messages


def _caption(record: dict[str, Any]) -> str:
    for turn in record.get("conversations") or []:
        if isinstance(turn, dict) and turn.get("from") in ("gpt", "assistant"):
            caption = PLACEHOLDER.sub("\n", text_of(turn, "value")).strip()
            if caption:
                return caption
    raise Malformed("no caption: no turn of 'gpt' in 'conversations'")


def _seconds(span: Any, end: str) -> float:
    """A border of a scene: its frame over the frame rate, or else its written time."""
    if not isinstance(span, dict):
        raise Malformed(f"a scene must be an object, got {span!r}")
    frame, fps, time = span.get(f"{end}_frame"), span.get(f"{end}_fps"), span.get(f"{end}_time")
    if isinstance(frame, int | float) and isinstance(fps, int | float) and fps > 0:
        return frame / fps
    if isinstance(time, str) and re.fullmatch(r"(\d+:)?\d+:\d+(\.\d+)?", time):
        seconds = 0.0
        for part in time.split(":"):
            seconds = 60 * seconds + float(part)
        return seconds
    raise Malformed(f"a scene needs {end}_frame with {end}_fps, or {end}_time as HH:MM:SS.mmm")
