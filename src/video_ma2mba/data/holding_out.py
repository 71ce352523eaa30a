"""A part of the data that is not trained on, drawn by video: what was seen in training says nothing of what is new."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

MAX_SAMPLES = 100  # held out of large data: enough to tell, and soon asked


def hold_out(rows: Sequence[dict[str, Any]], share: float, seed: int) -> tuple[list[int], list[int]]:
    """Draws videos until their samples are `share` of all, at most `MAX_SAMPLES`; samples of one video stay together.

    Args:
        rows: Of `load_manifest`; `messages`, `folder` and `id` are read.

    Returns:
        Numbers of the rows to train on and of those held out, each in order. One video alone is trained on.
    """
    groups = list(_by_video(rows).values())
    wanted = min(max(math.floor(share * len(rows)), 1), MAX_SAMPLES)
    held: list[int] = []
    for number in np.random.default_rng([seed, len(rows)]).permutation(len(groups)).tolist():
        group = groups[number]
        if len(held) + len(group) > max(wanted, len(group)) or len(held) + len(group) == len(rows):
            continue  # one video of many samples must not take the place of all others
        held += group
        if len(held) >= wanted:
            break
    return sorted(set(range(len(rows))) - set(held)), sorted(held)


def videos_of(row: dict[str, Any]) -> list[tuple[str, str]]:
    """The media of a row: (folder, path)."""
    entries = [entry for message in row["messages"] for entry in message["content"]]
    return [(row["folder"], entry["path"]) for entry in entries if entry.get("path")]


def _by_video(rows: Sequence[dict[str, Any]]) -> dict[int, list[int]]:
    """Rows that share a medium, directly or through others, by the first of them."""
    first_with: dict[tuple[str, str], int] = {}
    leader = list(range(len(rows)))

    def find(index: int) -> int:
        while leader[index] != index:
            index = leader[index]
        return index

    for index, row in enumerate(rows):
        for medium in videos_of(row):
            one, other = sorted((find(index), find(first_with.setdefault(medium, index))))
            leader[other] = one
    groups: dict[int, list[int]] = {}
    for index in range(len(rows)):
        groups.setdefault(find(index), []).append(index)
    return groups
