"""Files and folders that are written whole or not at all, and files that grow line by line."""

import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def write_whole(path: Path, write: Callable[[Path], Any]) -> None:
    """Let `write` make a file beside `path`, then put it in its place."""
    partial = path.with_name(f".{path.name}.partial")  # one name: what a killed process left is written over
    try:
        write(partial)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """A new folder beside `folder`, which gets its name when all that is to be written there is written.

    Raises:
        OSError: By then there is something in `folder`; it stays as it is.
    """
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        if folder.exists():
            folder.rmdir()
        partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def write_text(path: Path, text: str) -> None:
    write_whole(path, lambda partial: partial.write_text(text, encoding="utf-8"))


def write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The objects of a file that grows by JSON lines; one that a crash cut off, or that is damaged, is passed over."""
    if not path.is_file():
        return
    with path.open(encoding="utf-8", errors="replace", newline="\n") as file:
        for line in file:
            try:
                value = json.loads(line)
            except ValueError:
                continue
            if isinstance(value, dict):
                yield value


def new_figure(
    width: float, height: float, rows: int = 1, columns: int = 1, grid: bool = True, **shared: Any
) -> tuple["Figure", list[Any]]:
    """An empty picture, its sides in inches, and its panels, row by row."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False, **shared).flatten().tolist()
    for panel in panels if grid else ():
        panel.grid(alpha=0.3)
    return figure, panels


def write_png(path: Path, figure: "Figure") -> None:
    write_whole(path, lambda partial: figure.savefig(partial, dpi=110, format="png"))
