"""Long work that several processes share: who does what, where each writes, how they wait for each other.

The work is a set of pieces that do not depend on each other, videos mostly. Three rules make it safe to kill:

1. Who does which piece follows from the pieces alone (`deal`), so that processes need not talk about it.
2. A process appends what it has done to a file of its own (`Share.file`), piece by piece.
3. What is done is what all those files say together (`files_of`): a run goes on with any number of processes.

Processes come from a launcher (`torchrun`, `accelerate launch`), and then wait for each other (`launched`); or each is
started by hand with its own share, and what they wrote is put together later.
"""

import os
import re
import threading
import time
from collections import deque
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

Piece = TypeVar("Piece", bound=Hashable)
Result = TypeVar("Result")
SILENT_AFTER_S = 60.0  # a process that gave no sign of life for so long has died
_SIGN_EVERY_S = 5.0
_LOOK_EVERY_S = 0.2


@dataclass(frozen=True)
class Share:
    """The part of the work that is one process's: number `index`, from 0, of `count`."""

    index: int = 0
    count: int = 1

    @classmethod
    def parse(cls, text: str) -> "Share":
        """ "2/4", the second of four.

        Raises:
            ValueError: It is not of this form.
        """
        found = re.fullmatch(r"([0-9]{1,6})/([0-9]{1,6})", text)
        if not found or not 1 <= int(found[1]) <= int(found[2]):
            raise ValueError(f"a shard is written i/n with i from 1 to n, as in 1/4; got {text!r}")
        return cls(int(found[1]) - 1, int(found[2]))

    def __str__(self) -> str:
        return f"{self.index + 1}/{self.count}"

    def of(self, costs: Mapping[Piece, float]) -> list[Piece]:
        """Its pieces, in the order in which they came."""
        return deal(costs, self.count)[self.index]

    def file(self, path: Path) -> Path:
        """Where this process writes what goes into `path` in the end; alone it is that file itself."""
        if self.count == 1:
            return path
        return path.with_name(f"{path.stem}-{self.index + 1}-of-{self.count}{path.suffix}")

    def folder(self, output: Path) -> Path:
        """As `file`, for a process that writes more than one."""
        return output if self.count == 1 else output / f"shard-{self.index + 1}-of-{self.count}"


def deal(costs: Mapping[Piece, float], count: int) -> list[list[Piece]]:
    """Pieces for `count` processes: from the most expensive on, each goes to who has the least to do so far."""
    order = {piece: number for number, piece in enumerate(costs)}
    hands: list[list[Piece]] = [[] for _ in range(count)]
    load = [0.0] * count
    for piece in sorted(costs, key=lambda piece: (-costs[piece], order[piece])):
        to = load.index(min(load))
        hands[to].append(piece)
        load[to] += costs[piece]
    return [sorted(hand, key=order.__getitem__) for hand in hands]


def files_of(path: Path) -> list[Path]:
    """`path` and what processes wrote beside it, as far as they are there."""
    numbered = re.compile(re.escape(path.stem) + r"-(\d+)-of-(\d+)" + re.escape(path.suffix))
    found = [(int(named[2]), int(named[1]), file) for file in path.parent.glob(f"{path.stem}-*-of-*{path.suffix}")
             if (named := numbered.fullmatch(file.name))]  # fmt: skip
    return [file for file in (path, *(file for _, _, file in sorted(found))) if file.is_file()]


def remove_shares(path: Path) -> None:
    """What processes wrote beside `path`, which has it all now."""
    for file in files_of(path):
        if file != path:
            file.unlink()


def in_threads(
    do: Callable[[Piece], Result], pieces: Iterable[Piece], num_workers: int, stop: threading.Event | None = None
) -> Iterator[tuple[Piece, Result]]:
    """`do` of every piece, in their order; `num_workers` at a time, of which few wait to be taken.

    Threads, since what is long here, decoding, lets other threads run: they start at once and share what is loaded.

    Args:
        stop: Set when no more is wanted, for instance after Ctrl-C; `do` may look at it and end early.
    """
    if num_workers == 1:
        yield from ((piece, do(piece)) for piece in pieces)
        return
    pool = ThreadPoolExecutor(num_workers)
    waiting: deque[tuple[Piece, Future[Result]]] = deque()
    try:
        for piece in pieces:
            waiting.append((piece, pool.submit(do, piece)))
            if len(waiting) >= 4 * num_workers:
                first, future = waiting.popleft()
                yield first, future.result()
        while waiting:
            first, future = waiting.popleft()
            yield first, future.result()
    finally:
        if stop is not None:
            stop.set()
        pool.shutdown(cancel_futures=True)


class Ranks:
    """The processes that were launched together, and which of them this is; one that runs alone is the first of one.

    Args:
        store: What they share: `torch.distributed.Store`. None where there is but one.
    """

    def __init__(self, share: Share | None = None, store: Any = None):
        self.share, self._store = share or Share(), store
        self._total = 0

    @property
    def is_first(self) -> bool:
        return self.share.index == 0

    def after_first(self, what: str) -> None:
        """The first process says that `what` is there; the others wait for that.

        Raises:
            OSError: It has died, or failed.
        """
        if self.is_first:
            self._say(what, 0)
        else:
            self._wait(what, [0])

    @contextmanager
    def writing(
        self, file: Path, num_done: int, num_all: int, progress: Callable[[int, int], None] | None
    ) -> Iterator[Callable[[Iterable[str], int], None]]:
        """Gives `write(lines, num)`: lines of this process, in its own part of `file` at once, and `num` more done.

        Args:
            progress: Called with (done, all) of all processes: first, after every write, and while the first process
                waits in the end for the others.
        """

        def show(num: int = 0) -> None:
            total = self.add(num)
            if progress is not None:
                progress(num_done + total, num_all)

        show()
        with self.share.file(file).open("a", encoding="utf-8") as stream:

            def write(lines: Iterable[str], num: int) -> None:
                stream.writelines(lines)
                stream.flush()
                show(num)

            yield write
        self.finish(show)

    def finish(self, while_waiting: Callable[[], None] = lambda: None) -> None:
        """Says that this process is through with its work; the first one waits for the others.

        Raises:
            OSError: One of them has died, or failed.
        """
        self._say("finished", self.share.index)
        if self.is_first:
            self._wait("finished", range(1, self.share.count), while_waiting)

    def fail(self) -> None:
        """Says that this process ends with an error."""
        self._say("failed", self.share.index)

    def add(self, num: int) -> int:
        """The sum of all that the processes have added so far."""
        self._total += num
        return self._total if self._store is None else int(self._reach(self._store.add, "sum", num))

    def give_sign(self) -> None:
        """Says that this process lives."""
        self._say("alive", self.share.index, str(time.monotonic()))

    def _said(self, what: str, index: int) -> bool:
        return bool(self._reach(self._store.check, [f"{what}/{index}"]))

    def _say(self, what: str, index: int, value: str = "yes") -> None:
        if self._store is not None:
            self._reach(self._store.set, f"{what}/{index}", value)

    def _wait(self, what: str, indices: Iterable[int], meanwhile: Callable[[], None] = lambda: None) -> None:
        signs: dict[int, tuple[bytes, float]] = {index: (b"", time.monotonic()) for index in indices}
        while signs:
            for index, (sign, since_s) in list(signs.items()):
                if self._said(what, index):
                    del signs[index]
                    continue
                if self._said("failed", index):
                    raise OSError(f"process {index + 1} of {self.share.count} ended with an error, which it printed")
                now = self._reach(self._store.get, f"alive/{index}") if self._said("alive", index) else b""
                if now != sign:
                    signs[index] = now, time.monotonic()
                elif time.monotonic() - since_s > SILENT_AFTER_S:
                    raise OSError(
                        f"process {index + 1} of {self.share.count} gave no sign of life for {SILENT_AFTER_S:.0f} s"
                    )
            meanwhile()
            time.sleep(_LOOK_EVERY_S)

    def _reach(self, do: Callable[..., Any], *args: Any) -> Any:
        try:
            return do(*args)
        except RuntimeError as error:  # of torch, whose own classes of it differ between versions
            raise OSError("the processes of this run cannot reach each other any more: one of them has died") from error


@contextmanager
def launched() -> Iterator[Ranks]:
    """The processes that `torchrun` or `accelerate launch` started, or this one alone.

    One that dies is noticed by those that wait for it: after `SILENT_AFTER_S` where no launcher ends them all before.
    Each takes the GPU of its number on its machine.
    """
    count = int(os.environ.get("WORLD_SIZE", "1"))
    if count == 1:
        yield Ranks()
        return
    import torch
    from torch.distributed import PrefixStore, rendezvous

    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
    try:
        store, index, count = next(iter(rendezvous("env://", timeout=timedelta(seconds=SILENT_AFTER_S))))
    except RuntimeError as error:
        raise OSError(f"WORLD_SIZE is {count}, but the other processes cannot be reached: {error}") from error
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")  # a launcher that starts anew keeps the store
    ranks = Ranks(Share(index, count), PrefixStore(f"video_ma2mba/{attempt}", store))
    over = threading.Event()

    def live() -> None:
        while not over.is_set():
            try:
                ranks.give_sign()
            except OSError:
                return  # who works notices too
            over.wait(_SIGN_EVERY_S)

    signs = threading.Thread(target=live, daemon=True)
    signs.start()
    try:
        yield ranks
    except BaseException:
        over.set()
        with suppress(OSError):  # nobody may be there to be told
            ranks.fail()
        raise
    finally:
        over.set()
        signs.join()
