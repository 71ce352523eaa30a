"""What a conversation is for a server: pieces of token ids and media in order, and a name for each beginning of it."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NotRequired, TypedDict


class Shown(TypedDict):
    """A medium that a memory is of: its bytes, where they are, and how they are sampled.

    Attributes:
        path: under an allowed folder; None for what was sent.
        fps, snapshots_s, start_s, end_s: of videos alone; the last two where it is a part.
    """

    type: Literal["video", "image"]
    sha256: str
    path: str | None
    fps: NotRequired[float]
    snapshots_s: NotRequired[list[float]]
    start_s: NotRequired[float]
    end_s: NotRequired[float]


Piece = list[int] | Shown  # token ids, or a medium between them
Entry = dict[str, Any]  # a medium as a message has it


def prefix_hash(before: str, pieces: Sequence[list[int] | Mapping[str, Any]]) -> str:
    """A name for what a conversation begins with: that of what comes before, and the pieces; 32 hexadecimal digits."""
    said = json.dumps([before, *pieces], sort_keys=True)
    return hashlib.sha256(said.encode()).hexdigest()[:32]
