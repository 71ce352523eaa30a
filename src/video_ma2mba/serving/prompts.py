"""What a conversation is for a server: pieces of token ids and media in order, and a name for each beginning of it."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NotRequired, TypedDict

import torch


class Shown(TypedDict):
    """A medium that a memory is of: its bytes, where they are, and how they are sampled.

    Attributes:
        path: under an allowed folder; None for what was sent.
        fps, snapshots_s: of videos alone.
    """

    type: Literal["video", "image"]
    sha256: str
    path: str | None
    fps: NotRequired[float]
    snapshots_s: NotRequired[list[float]]


Piece = list[int] | Shown  # token ids, or a medium between them
Entry = dict[str, Any]  # a medium as a message has it


def prompt_pieces(processor: Any, messages: Sequence[Mapping[str, Any]]) -> list[list[int] | Entry]:
    """Cut a conversation, as the processor tokenises it, where its media stand.

    Args:
        processor: a `VideoMa2mbaProcessor`.
        messages: as `apply_chat_template` takes them; entries of type "video" or "image" may hold anything else.

    Returns:
        Lists of token ids, and between them the entries of the media as they were given; an answer is to follow.

    Raises:
        ValueError: not a conversation of the chat schema, or one without a question.
    """
    side = processor.video_processor.side
    stand_in = torch.zeros(1, 3, side, side, dtype=torch.uint8)
    media: list[Entry] = []

    def shown(entry: Any) -> Any:
        if not isinstance(entry, dict) or entry.get("type") not in ("video", "image"):
            return entry
        media.append(entry)
        return {"type": "video", "video": stand_in}  # one frame, as an image

    ids = processor.apply_chat_template(
        [
            {**message, "content": content if isinstance(content, str) else [shown(entry) for entry in content]}
            for message in messages
            for content in [message["content"]]
        ],
        add_generation_prompt=True, tokenize=True, return_tensors=None,
    )["input_ids"][0]  # fmt: skip
    pieces: list[list[int] | Entry] = []
    start = 0
    for entry in media:
        place = ids.index(processor.video_token_id, start)
        pieces += [ids[start:place], entry] if place > start else [entry]
        start = place + processor.tokens_per_frame
    return [*pieces, ids[start:]]


def prefix_hash(before: str, pieces: Sequence[list[int] | Mapping[str, Any]]) -> str:
    """A name for what a conversation begins with: that of what comes before, and the pieces; 32 hexadecimal digits."""
    said = json.dumps([before, *pieces], sort_keys=True)
    return hashlib.sha256(said.encode()).hexdigest()[:32]
