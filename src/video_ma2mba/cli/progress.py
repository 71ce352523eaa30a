"""Progress of long work: bars on stderr, so that stdout has the results alone."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console


def make_console(**options: Any) -> "Console":
    """rich's, but that a reader who is gone is met as by `print`; by bars not at all, since the work matters."""
    from rich.console import Console

    class Piped(Console):
        def on_broken_pipe(self) -> None:
            if not self.stderr:
                raise BrokenPipeError
            self.quiet = True

    return Piped(**options)


@contextmanager
def progress_bars(in_bytes: bool = False) -> Iterator[Callable[[str, float, float | None], None]]:
    """Gives `show(what, done, total)`: a bar for each `what`; a total of None is one that nobody knows (yet)."""
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        MofNCompleteColumn,
        Progress,
        TaskID,
        TextColumn,
        TimeRemainingColumn,
    )

    amount = DownloadColumn() if in_bytes else MofNCompleteColumn()
    columns = TextColumn("{task.description}"), BarColumn(), amount, TimeRemainingColumn()
    bars = Progress(*columns, console=make_console(stderr=True))
    tasks: dict[str, TaskID] = {}

    def show(what: str, done: float, total: float | None) -> None:
        if what not in tasks:
            bars.start()  # which does nothing the second time
            tasks[what] = bars.add_task(what, total=None)
        bars.update(tasks[what], completed=done, total=total)

    try:
        yield show
        for task in bars.tasks:
            if task.total is None:  # nobody knew it before; now it is what there was
                bars.update(task.id, total=task.completed)
    finally:
        if tasks:  # or it would print an empty line
            bars.stop()
