"""Adapters of the LLaVA family: one JSON record with `conversations` and at most one video or image.

LLaVA-Pretrain 558K, LLaVA-Video-178K and the many sets in the same shape, also with ShareGPT's roles; the `messages` of
chat templates; and the plainest of all, a video, a question and an answer. LLaVA-Video's folders name the kind of
question: `_cap_`, `_oe_`, `_mc_`.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .records import Item, Malformed, Problem, Record, assistant, each, medium, text_of, user

ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
PLACEHOLDER = re.compile(r"[ \t]*\n?[ \t]*<(?:image|video)>[ \t]*\n?[ \t]*")
NOISE = "QA_GT_caption_based_noisy"  # left in some answers of LLaVA-Video
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
    media = [_media(record, name) for name in ("video", "image") if record.get(name)]
    if len(media) > 1:
        raise Malformed("a record has either a video or images, not both")
    turns, num_placeholders = [], 0
    for turn in record["conversations"]:
        role, text = _role_and_text(turn)
        num_placeholders += len(PLACEHOLDER.findall(text))
        turns.append((role, PLACEHOLDER.sub("\n", text).replace(NOISE, "").strip()))
    entries = media[0] if media else []
    if num_placeholders and not entries:
        raise Malformed(f"{num_placeholders} placeholder(s), but neither a video nor an image")
    if len(entries) > 1 and num_placeholders not in (0, len(entries)):
        raise Malformed(f"{num_placeholders} placeholder(s) for {len(entries)} images")
    while turns and turns[0][0] == "assistant":  # as the reference loader does
        turns.pop(0)
    return Record(str(record.get("id", item.where)), item.where, _chat(turns, entries), kind)


def _media(record: dict[str, Any], name: str) -> list[dict[str, Any]]:
    paths = record[name] if isinstance(record[name], list) else [record[name]]
    if not all(isinstance(path, str) for path in paths) or (name == "video" and len(paths) > 1):
        raise Malformed(f"{name!r} must be a path, got {record[name]!r}")
    folder = record.get("data_source")
    # LLaVA-Video: under its folder; some mirrors flatten that, some put `data` between
    prefixes = (f"{folder}/", "", f"{folder}/data/", "data/") if isinstance(folder, str) else ("", "images/", "videos/")
    return [medium(name, *(prefix + path for prefix in prefixes)) for path in paths]


def _role_and_text(turn: Any) -> tuple[str, str]:
    if not isinstance(turn, dict):
        raise Malformed(f"a turn must be an object, got {turn!r}")
    role, text = turn.get("from", turn.get("role")), turn.get("value", turn.get("content"))
    if role not in ROLES:
        raise Malformed(f"unknown role {role!r}; known are {', '.join(ROLES)}")
    if not isinstance(text, str):
        raise Malformed(f"the text of a turn must be a string, got {text!r}")
    return ROLES[role], text


def _chat(turns: list[tuple[str, str]], entries: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Messages with all media before the first question, as the reference loader moves them."""
    result = []
    for role, text in turns:
        if role == "user":
            result.append(user(*entries, text))
            entries = []
        else:
            result.append({"role": role, "content": [{"type": "text", "text": text}]})
    return result


def _from_messages(item: Item) -> Record:
    record = item.value
    if not isinstance(record.get("messages"), list):
        raise Malformed("a record needs a list under 'messages'")
    result = []
    for message in record["messages"]:
        if not isinstance(message, dict) or message.get("role") not in ROLES:
            raise Malformed(f"a message needs a role of {', '.join(ROLES)}: {message!r}")
        content = message.get("content")
        content = [{"type": "text", "text": content}] if isinstance(content, str) else content
        if not isinstance(content, list):
            raise Malformed(f"a content must be a text or a list: {content!r}")
        result.append({"role": ROLES[message["role"]], "content": [_entry(entry) for entry in content]})
    return Record(str(record.get("id", item.where)), item.where, result)


def _entry(entry: Any) -> dict[str, Any]:
    kind = entry.get("type") if isinstance(entry, dict) else None
    if kind == "text" and isinstance(entry.get("text"), str):
        return {"type": "text", "text": entry["text"]}
    if kind not in ("video", "image"):
        raise Malformed(f"an entry must be a text, a video or an image: {entry!r}")
    paths = [entry[key] for key in (kind, "path", "url") if isinstance(entry.get(key), str)]
    if len(paths) != 1:
        raise Malformed(f"a {kind} entry needs one path: {entry!r}")
    start_s, end_s = entry.get("start_s"), entry.get("end_s")
    if (start_s is None) != (end_s is None):
        raise Malformed(f"a clip needs both start_s and end_s: {entry!r}")
    return medium(kind, paths[0], start_s=start_s, end_s=end_s)


def plain(source: Path) -> Iterator[Record | Problem]:
    """`{"video" | "image", "question", "answer"}`: the least that one's own data need."""
    return each(source, lambda item: [_from_plain(item)])


def _from_plain(item: Item) -> Record:
    record = item.value
    question, answer = text_of(record, "question"), text_of(record, "answer")
    kinds = [kind for kind in ("video", "image") if isinstance(record.get(kind), str)]
    if len(kinds) != 1:
        raise Malformed("a record needs the path of either a 'video' or an 'image'")
    messages = [user(medium(kinds[0], record[kinds[0]]), question), assistant(answer)]
    return Record(str(record.get("id", item.where)), item.where, messages)


def question_and_answer(
    identity: str, where: str, video: tuple[str, ...], question: str, answer: str, kind: str
) -> Record:
    """One question about a whole video."""
    return Record(identity, where, [user(medium("video", *video), question), assistant(answer)], kind)
