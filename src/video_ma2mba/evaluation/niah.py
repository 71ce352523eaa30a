"""Needle in a haystack: one second somewhere in hours of video, and a question about it.

The protocol of V-NIAH (LongVA, Zhang et al. 2024): a needle is put at a share of the length into a haystack, and counts
as found if the model's first choice is right at every token of the answer. Without data of one's own, the haystacks are
synthetic stories without a circle, and the needles are circles of six colours, each in a haystack of its own: what
fills the hours moves a state of fixed size too, and what one story leaves in it says little about the next.
"""

import itertools
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..data.synthetic import COLOURS, make_story
from ..files import new_figure, read_lines, write_png, write_text
from ..modeling.video_memory import VideoMemory
from ..processes import Ranks, files_of, remove_shares

CELLS = "cells.jsonl"
QUESTION = "What colour was the circle?"
FRAMES_PER_PUSH = 512
Key = tuple[int, float, int, int]  # of a cell: length in frames, depth, numbers of the needle and of its haystack
Haystack = Callable[[int], torch.Tensor]  # for so many frames: uint8 (frames, 3, side, side)


@dataclass(frozen=True)
class Needle:
    """Frames that are put in, uint8 (frames, 3, side, side), and what is asked about them."""

    frames: torch.Tensor
    question: str
    answer: str


def synthetic_needles(processor: Any, seconds: int = 1) -> list[Needle]:
    """A circle of each colour, shown for some seconds."""
    needles: dict[str, Needle] = {}
    seed = 10**9
    while len(needles) < len(COLOURS):
        story, seed = make_story(seed, 6 + seconds, circle_s=seconds), seed + 1
        circle = story.circle
        if circle.colour not in needles:
            frames = story.frames()[circle.start_s : circle.end_s]
            needles[circle.colour] = Needle(processor.video_processor.load(frames).frames, QUESTION, circle.colour)
    return [needles[colour] for colour in COLOURS]


def synthetic_haystack(processor: Any, number: int, num_frames: int) -> torch.Tensor:
    """Distractors at 1 FPS without a circle, others for each number and length: uint8 (frames, 3, side, side)."""
    story = make_story(10**9 + number, num_frames + 8)
    circle = story.circle
    seconds = enumerate(story.iter_frames(1.0))
    frames = (frame for second, frame in seconds if not circle.start_s <= second < circle.end_s)
    batches = iter(lambda: list(itertools.islice(frames, FRAMES_PER_PUSH)), [])
    return torch.cat([processor.video_processor.load(np.stack(batch)).frames for batch in batches])[:num_frames]


def read_needles(folder: Path, processor: Any) -> list[Needle]:
    """`needles.jsonl` in a folder: lines of {"image", "question", "answer"}, images beside it.

    Raises:
        ValueError: A line that is not so, an image outside the folder, or one that cannot be read; says which.
    """
    file, needles = folder / "needles.jsonl", []
    if not file.is_file():
        raise ValueError(f"{folder}: there is no needles.jsonl in it")
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
        try:
            entry = json.loads(line)
            image, question, answer = (str(entry[name]) for name in ("image", "question", "answer"))
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise ValueError(f"{file.name}:{number}: must be an object with image, question and answer") from error
        path = (folder / image).resolve()
        if not path.is_relative_to(folder.resolve()) or not path.is_file():
            raise ValueError(f"{file.name}:{number}: {image!r} is no file in {folder}")
        needles.append(Needle(processor.video_processor.load_image(path), question, answer))
    return needles


def find_needles(
    model: Any,
    processor: Any,
    haystacks: Sequence[Haystack],
    needles: Sequence[Needle],
    lengths: Sequence[int],
    depths: Sequence[float],
    output: Path,
    progress: Callable[[int, int], None] | None = None,
    ranks: Ranks | None = None,
) -> list[dict[str, Any]]:
    """Ask for every needle at every depth of every length; cells that stand in `output` already are not asked again.

    Needles are dealt to the haystacks in turn. What comes before them is watched once for all needles and depths of a
    length and a haystack, by each process, and one haystack is held at a time.

    Args:
        haystacks: Each is called with a length.
        lengths: In frames. depths: From 0.0, before everything, to 1.0, after it.
        progress: Called with (cells done, cells), of all processes.
        ranks: The processes that share this; None for this one alone.

    Returns:
        In the first process, dicts of num_frames, depth, needle, haystack, answer, found; in the others nothing.

    Raises:
        ValueError: A haystack is too short. OSError: Another process has died, or failed.
    """
    ranks, file = ranks or Ranks(), output / CELLS
    wanted = {
        (num_frames, depth, number, number % len(haystacks)): num_frames * (1 - depth) + len(needle.frames)
        for num_frames in lengths
        for depth in sorted(depths)
        for number, needle in enumerate(needles)
    }
    if ranks.is_first:
        _write_cells(file, _read(files_of(file)))
    ranks.after_first("cells of before")
    cells = _read([file])  # not what another process has written since: all must deal alike
    num_before = len(wanted.keys() & cells.keys())
    mine = ranks.share.of({key: cost for key, cost in wanted.items() if key not in cells})
    mine.sort(key=lambda key: (-key[0], key[3], key[1]))  # a haystack that is too short shows at once
    with ranks.writing(file, num_before, len(wanted), progress) as write:
        for (num_frames, of_haystack), keys in itertools.groupby(mine, key=lambda key: (key[0], key[3])):
            haystack = haystacks[of_haystack](num_frames)
            if len(haystack) < num_frames:
                raise ValueError(
                    f"the haystack has {len(haystack)} frames, and {num_frames} are asked for: take a longer one"
                )
            before, at = VideoMemory(model, processor), 0
            for _, depth, number, _ in keys:
                place, needle = round(depth * num_frames), needles[number]
                _push(before, haystack[at:place])
                at = place
                memory = before.copy()
                _push(memory, needle.frames)
                _push(memory, haystack[place:num_frames])
                said, found = _ask(memory, needle)
                cell = {"num_frames": num_frames, "depth": depth, "needle": number, "haystack": of_haystack}
                write([json.dumps(cell | {"answer": said, "found": found}) + "\n"], 1)
    if not ranks.is_first:
        return []
    cells = _read(files_of(file))
    if missing := wanted.keys() - cells.keys():
        raise ValueError(f"{len(missing)} cells were not written to {output}: all processes must share its disk")
    _write_cells(file, cells)
    return [cells[key] for key in wanted]


def _read(files: Iterable[Path]) -> dict[Key, dict[str, Any]]:
    cells: dict[Key, dict[str, Any]] = {}
    for file in files:
        for cell in read_lines(file):
            try:
                if isinstance(cell["found"], bool):
                    cells[cell["num_frames"], cell["depth"], cell["needle"], cell["haystack"]] = cell
            except (TypeError, LookupError):
                continue  # damaged
    return cells


def _write_cells(file: Path, cells: dict[Key, dict[str, Any]]) -> None:
    write_text(file, "".join(json.dumps(cell) + "\n" for cell in cells.values()))
    remove_shares(file)


def _push(memory: VideoMemory, frames: torch.Tensor) -> None:
    for start in range(0, len(frames), FRAMES_PER_PUSH):
        memory.push_frames(frames[start : start + FRAMES_PER_PUSH])


def _ask(memory: VideoMemory, needle: Needle) -> tuple[str, bool]:
    """Greedy decoding agrees with an answer exactly where the first choice at each of its tokens is right."""
    tokenizer = memory.processor.tokenizer
    truth = tokenizer(needle.answer, add_special_tokens=False)["input_ids"]
    (ids,) = memory.generate([needle.question], max_new_tokens=len(truth), do_sample=False)
    return tokenizer.decode(ids, skip_special_tokens=True), ids.tolist() == truth


def summarise(cells: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The share of needles found, for every length and depth."""
    grouped: dict[tuple[int, float], list[bool]] = {}
    for cell in cells:
        grouped.setdefault((cell["num_frames"], cell["depth"]), []).append(cell["found"])
    return [
        {"num_frames": n, "depth": depth, "found": sum(found) / len(found), "num_needles": len(found)}
        for (n, depth), found in grouped.items()
    ]


def draw(rows: Sequence[dict[str, Any]], title: str, path: Path) -> None:
    """The heat map of depth over length."""
    lengths, depths = sorted({row["num_frames"] for row in rows}), sorted({row["depth"] for row in rows})
    values = np.full((len(depths), len(lengths)), np.nan)
    for row in rows:
        values[depths.index(row["depth"]), lengths.index(row["num_frames"])] = row["found"]
    figure, (axes,) = new_figure(1.5 + 0.9 * len(lengths), 1.5 + 0.5 * len(depths), grid=False)
    picture = axes.imshow(values, cmap="RdYlGn", vmin=0, vmax=1, aspect="auto")
    for (y, x), value in np.ndenumerate(values):
        axes.text(x, y, f"{value:.0%}", ha="center", va="center", fontsize=9)
    hours = [f"{n / 3600:g} h" if n >= 3600 else f"{n / 60:g} min" for n in lengths]
    axes.set_xticks(range(len(lengths)), hours)
    axes.set_yticks(range(len(depths)), [f"{depth:.0%}" for depth in depths])
    axes.set(xlabel="length of the video at 1 FPS", ylabel="depth of the needle", title=title)
    figure.colorbar(picture, label="needles found")
    write_png(path, figure)
