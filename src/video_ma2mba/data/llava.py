"""Adapters of the LLaVA family: one JSON record with `conversations` and its videos or images beside them.

LLaVA-Pretrain 558K, LLaVA-Video-178K and the many sets in the same shape, also with ShareGPT's roles; the `messages` of
chat templates; and the plainest of all, a video, a question and an answer. LLaVA-Video's folders name the kind of
question: `_cap_`, `_oe_`, `_mc_`.

A medium comes first in the turn that holds its placeholder, and in the first question where there is none: so the
reference loader has it.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .question_sets import multiple_choice, number_of_answer, options_of
from .records import Item, Malformed, Problem, Record, assistant, each, medium, named_media, text_of, user

ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
PLACEHOLDER = re.compile(r"[ \t]*\n?[ \t]*<(?:image|video)>[ \t]*\n?[ \t]*")
NOISE = "QA_GT_caption_based_noisy"  # left in some answers of LLaVA-Video
MEDIA_KEYS = {
    "video": ("video", "videos", "video_path", "video_paths", "video_file"),
    "image": ("image", "images", "image_path", "image_paths", "image_file"),
}
SPANS = (("start_s", "end_s"), ("video_start", "video_end"), ("start", "end"), ("start_time", "end_time"))
Parts = list[dict[str, Any] | str | None]  # of a turn: media, texts, and None where a medium is to stand
KINDS = {"_cap_": "caption", "_oe_": "open_ended", "_mc_": "multiple_choice"}


def llava(source: Path) -> Iterator[Record | Problem]:
    """`{"id", "image" | "video", "conversations": [{"from", "value"}, ...]}`, in a list or a line each."""
    kind = next((kind for mark, kind in KINDS.items() if mark in source.name), "chat")
    return each(source, lambda item: [from_conversations(item, kind)])


def messages(source: Path) -> Iterator[Record | Problem]:
    """`{"id", "messages": [{"role", "content"}, ...]}`, the contents as chat templates take them."""
    return each(source, lambda item: [_from_messages(item)])


def from_conversations(item: Item, kind: str) -> Record:
    """The record of an item with `conversations`."""
    record = item.value
    if not isinstance(record.get("conversations"), list):
        raise Malformed("a record needs a list under 'conversations'")
    entries = _media(record)
    turns: list[tuple[str, Parts]] = []
    for turn in record["conversations"]:
        role, text = _role_and_text(turn)
        turns.append((role, _parts(text)))
    while turns and turns[0][0] == "assistant":  # as the reference loader does
        turns.pop(0)
    return Record(str(record.get("id", item.where)), item.where, _chat(turns, entries), kind)


def _media(record: dict[str, Any]) -> list[dict[str, Any]]:
    """The videos or images that a record names beside its turns, in order."""
    found = [(kind, name) for kind, names in MEDIA_KEYS.items() for name in names if record.get(name)]
    if len({kind for kind, _ in found}) > 1:
        raise Malformed("a record has either a video or images, not both")
    if len(found) > 1:
        raise Malformed(f"a record names its media under one key, not under {' and '.join(name for _, name in found)}")
    if not found:
        return []
    kind, name = found[0]
    paths = record[name] if isinstance(record[name], list) else [record[name]]
    if not all(isinstance(path, str) for path in paths) or (name == "video" and len(paths) > 1):
        raise Malformed(f"{name!r} must be a path, got {record[name]!r}")
    folder = record.get("data_source")
    # LLaVA-Video: under its folder; some mirrors flatten that, some put `data` between
    prefixes = (f"{folder}/", "", f"{folder}/data/", "data/") if isinstance(folder, str) else ("", "images/", "videos/")
    span = _span(record) if kind == "video" and len(paths) == 1 else {}
    return [medium(kind, *(prefix + path for prefix in prefixes), **span) for path in paths]


def _span(value: dict[str, Any]) -> dict[str, float]:
    """The borders of a clip, by any of their names."""
    for first, last in SPANS:
        start_s, end_s = value.get(first), value.get(last)
        if start_s is None and end_s is None:
            continue
        if not isinstance(start_s, int | float) or not isinstance(end_s, int | float):
            raise Malformed(f"a clip needs both {first} and {last}, in seconds: {start_s!r} and {end_s!r}")
        return {"start_s": float(start_s), "end_s": float(end_s)}
    return {}


def _role_and_text(turn: Any) -> tuple[str, str]:
    if not isinstance(turn, dict):
        raise Malformed(f"a turn must be an object, got {turn!r}")
    role, text = turn.get("from", turn.get("role")), turn.get("value", turn.get("content"))
    if role not in ROLES:
        raise Malformed(f"unknown role {role!r}; known are {', '.join(ROLES)}")
    if not isinstance(text, str):
        raise Malformed(f"the text of a turn must be a string, got {text!r}")
    if names := named_media(turn):
        raise Malformed(f"a turn names a medium under {', '.join(names)}; name it beside the turns, or use messages")
    return ROLES[role], text


def _parts(text: str) -> Parts:
    """A text without its placeholders, and before it a place for each."""
    places: Parts = [None] * len(PLACEHOLDER.findall(text))
    return [*places, PLACEHOLDER.sub("\n", text).replace(NOISE, "").strip()]


def _chat(turns: list[tuple[str, Parts]], entries: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Messages with each medium in its place, or all before the first question where no place is marked."""
    num_places = sum(part is None for _, parts in turns for part in parts)
    if num_places and not entries:
        raise Malformed(f"{num_places} placeholder(s), but neither a video nor an image")
    if len(entries) > 1 and num_places not in (0, len(entries)):
        raise Malformed(f"{num_places} placeholder(s) for {len(entries)} {entries[0]['type']}s")
    astray = any(part is None for role, parts in turns for part in parts if role != "user")
    if astray and len(entries) > 1:
        raise Malformed("a placeholder stands in a turn that is not the user's")
    waiting, marked = list(entries), num_places > 0 and not astray
    result = []
    for role, parts in turns:
        if role == "user" and not marked:
            parts, waiting = [*waiting, *parts], []
        content: list[dict[str, Any]] = []
        for part in parts:
            if part is None and marked and waiting:
                part = waiting.pop(0)
            if part:  # one medium that is marked again is shown once
                content.append({"type": "text", "text": part} if isinstance(part, str) else part)
        result.append({"role": role, "content": content})
    return result


def _from_messages(item: Item) -> Record:
    record = item.value
    if not isinstance(record.get("messages"), list):
        raise Malformed("a record needs a list under 'messages'")
    entries = _media(record)
    turns: list[tuple[str, Parts]] = []
    for message in record["messages"]:
        if not isinstance(message, dict) or message.get("role") not in ROLES:
            raise Malformed(f"a message needs a role of {', '.join(ROLES)}: {message!r}")
        if message.get("tool_calls"):
            raise Malformed("a message has tool_calls, of which the model knows nothing")
        content = message.get("content")
        if isinstance(content, str):
            turns.append((ROLES[message["role"]], _parts(content) if entries else [content]))
            continue
        if not isinstance(content, list):
            raise Malformed(f"a content must be a text or a list: {content!r}")
        turns.append((ROLES[message["role"]], [part for entry in content for part in _entry(entry, bool(entries))]))
    if entries and any(isinstance(part, dict) for _, parts in turns for part in parts):
        raise Malformed("media are named in the messages and beside them; name them in one place")
    return Record(str(record.get("id", item.where)), item.where, _chat(turns, entries))


def _entry(entry: Any, media_beside: bool) -> Parts:
    """An entry of a content; where the media stand beside the messages, an empty one is a place for one of them."""
    kind = entry.get("type") if isinstance(entry, dict) else None
    if kind == "text" and isinstance(entry.get("text"), str):
        return _parts(entry["text"]) if media_beside else [entry["text"]]
    if kind in ("video_url", "image_url"):  # OpenAI's
        inner = entry.get(kind)
        kind = kind.removesuffix("_url")
        entry = {**entry, "type": kind, f"{kind}_url": None, **(inner if isinstance(inner, dict) else {"url": inner})}
    if kind not in ("video", "image"):
        raise Malformed(f"an entry must be a text, a video or an image: {entry!r}")
    given = {key: value for key, value in entry.items() if value is not None}
    known = {"type", kind, "path", "url", "duration_s"}.union(*(SPANS if kind == "video" else ()))
    if unknown := sorted(given.keys() - known):
        raise Malformed(f"a {kind} entry has {', '.join(unknown)}, which a manifest cannot keep: {entry!r}")
    paths = [given[key] for key in (kind, "path", "url") if isinstance(given.get(key), str)]
    if media_beside and not given.keys() & {kind, "path", "url"}:
        return [None]
    if len(paths) != 1:
        raise Malformed(f"a {kind} entry needs one path: {entry!r}")
    return [medium(kind, paths[0], **_span(given))]


def plain(source: Path) -> Iterator[Record | Problem]:
    """`{"video" | "image", "question", "answer"}`: the least that one's own data need; `options` may be given, too."""
    return each(source, lambda item: [_from_plain(item)])


def _from_plain(item: Item) -> Record:
    record = item.value
    question, answer = text_of(record, "question"), text_of(record, "answer")
    if any(record.get(name) for name in MEDIA_KEYS["video"]) == any(record.get(name) for name in MEDIA_KEYS["image"]):
        raise Malformed("a record needs the path of either a 'video' or an 'image'")
    kind = "chat"
    if record.get("options"):
        options, kind = options_of(record), "multiple_choice"
        question, answer = multiple_choice(question, options, number_of_answer(answer, options))
    messages = [user(*_media(record), question), assistant(answer)]
    return Record(str(record.get("id", item.where)), item.where, messages, kind)
