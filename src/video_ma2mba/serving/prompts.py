"""What a conversation is for a server: pieces of token ids and media in order, and a name for each beginning of it."""

import hashlib
import json
from collections.abc import Sequence
from typing import Any

import torch

Piece = list[int] | dict[str, Any]


def prompt_pieces(processor: Any, messages: Sequence[dict]) -> list[Piece]:
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
    media: list[dict] = []

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
    pieces: list[Piece] = []
    start = 0
    for entry in media:
        place = ids.index(processor.video_token_id, start)
        pieces += [ids[start:place], entry] if place > start else [entry]
        start = place + processor.tokens_per_frame
    return [*pieces, ids[start:]]


def prefix_hash(before: str, pieces: Sequence[Piece]) -> str:
    """A name for what a conversation begins with: that of what comes before, and the pieces; 32 hexadecimal digits."""
    said = json.dumps([before, *pieces], sort_keys=True)
    return hashlib.sha256(said.encode()).hexdigest()[:32]
