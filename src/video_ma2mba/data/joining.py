"""Samples longer than the data: videos shown one after another, and then the questions about each of them.

What was asked about one video is asked again when others have been watched since: by joining, a data set of minutes
teaches to remember for hours. The lengths are drawn evenly on a logarithmic scale, so the short ones are not forgotten.
"""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import datasets


@dataclass(frozen=True)
class JoiningOptions:
    """How long samples become; longer ones stay as they are.

    Attributes:
        shortest_s: Seconds of video in a sample, at least.
        longest_s: Seconds of video in a sample, at most.
    """

    shortest_s: float = 60.0
    longest_s: float = 3600.0

    def __post_init__(self) -> None:
        if not 0 < self.shortest_s <= self.longest_s < math.inf:
            raise ValueError(
                f"joining: shortest_s and longest_s must be positive and in this order, got {self.shortest_s} and "
                f"{self.longest_s}"
            )


def join(rows: "datasets.Dataset", options: JoiningOptions, seed: int) -> "datasets.Dataset":
    """A data set of as many samples, each of a row and others of its folder, up to a length that is drawn.

    Rows without a video, or with one after the first question, are kept and join no others. What is drawn follows from
    the seed.

    Args:
        rows: Of `load_manifest`.
    """
    folders = np.asarray(rows["folder"][:])
    watched_s = np.asarray(rows["watched_s"][:])
    joinable = np.asarray([_joinable(messages) for messages in rows["messages"]])
    partners = {folder: np.flatnonzero((folders == folder) & joinable) for folder in np.unique(folders)}

    def make(row: dict[str, Any], index: int) -> dict[str, Any]:
        if not joinable[index]:
            return row
        draw = np.random.default_rng([seed, index])
        wanted_s = math.exp(draw.uniform(math.log(options.shortest_s), math.log(options.longest_s)))
        chosen, total_s = [index], watched_s[index]
        for other in draw.permutation(partners[folders[index]]).tolist():
            if total_s >= wanted_s:
                break
            if other != index and total_s + watched_s[other] <= options.longest_s:
                chosen.append(other)
                total_s += watched_s[other]
        if len(chosen) == 1:
            return row
        chosen = [chosen[i] for i in draw.permutation(len(chosen))]
        return _together([rows[i] for i in chosen], draw.permutation(len(chosen)).tolist())

    return rows.map(make, with_indices=True, features=rows.features)


def _joinable(messages: list[dict[str, Any]]) -> bool:
    kinds = [[entry["type"] for entry in message["content"]] for message in messages if message["role"] != "system"]
    return bool(kinds) and "video" in kinds[0] and all(set(later) == {"text"} for later in kinds[1:])


def _together(rows: list[dict[str, Any]], order: list[int]) -> dict[str, Any]:
    """One row: all videos, then the turns about each, in this order of rows; every question says which it is about."""
    media, turns = [], []
    for row in rows:
        first = next(message for message in row["messages"] if message["role"] == "user")
        media += [entry for entry in first["content"] if entry["type"] != "text"]
    for number in order:
        for message in rows[number]["messages"]:
            if message["role"] == "system":
                continue
            content = [entry for entry in message["content"] if entry["type"] == "text"]
            if message["role"] == "user":
                said = content[0] if content else {}
                text = f"Video {number + 1} of {len(rows)}: {said.get('text') or ''}".rstrip()
                content = [{**dict.fromkeys(media[0]), "type": "text", "text": text}, *content[1:]]
            turns.append({"role": message["role"], "content": content})
    turns[0] = {**turns[0], "content": media + turns[0]["content"]}
    system = [message for message in rows[0]["messages"] if message["role"] == "system"]
    return {
        **rows[0],
        "id": "+".join(row["id"] for row in rows),
        "messages": system + turns,
        **{name: sum(row[name] for row in rows) for name in ("watched_s", "num_images", "num_characters")},
    }
