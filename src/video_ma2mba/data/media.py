"""Which media of a data set can be used: found under the media root, opened once, and remembered for the next run."""

import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path

from ..files import read_lines
from ..processes import Share, files_of, in_threads
from ..processing.media_location import locate
from ..processing.picture_source import check_picture
from ..processing.video_reader import probe_video


class UnusableMedium(ValueError):
    """A medium that a sample cannot be made of.

    Attributes:
        reason: In a few words, the same for all of its kind: reports count by it.
    """

    def __init__(self, reason: str, message: str):
        super().__init__(message)
        self.reason = reason


@dataclass(frozen=True)
class Medium:
    """A video or an image that opens.

    Attributes:
        path: Under the media root, with "/".
        duration_s: Seconds of a video; 0 for an image.
        num_bytes, modified_ns: Of the file, by which a later run knows whether it is still the same.
    """

    path: str
    duration_s: float
    num_bytes: int
    modified_ns: int


Key = tuple[str, str]  # kind and path
Look = tuple[int, int, float, str]  # size and time of the file, its duration, or what is wrong with it


class MediaIndex:
    """Looks at every medium once, also over several runs: what it finds is appended to a file as it goes.

    Args:
        root: Nothing outside this folder is ever opened.
        remembered: The file of what was found; a line that was cut off by a crash is looked at again.
        max_duration_s: A longer video is taken for a broken header.
        share: Of several processes, which look at different media: what it finds goes to a file of its own.
        num_workers: How many media `look_at_all` opens at a time.
    """

    def __init__(
        self, root: Path, remembered: Path, max_duration_s: float, share: Share | None = None, num_workers: int = 1
    ):
        self.root, self.max_duration_s, self.num_workers = root.resolve(), max_duration_s, num_workers
        self._known: dict[Key, Look] = {}  # of this run and of earlier ones
        self._fresh: set[Key] = set()  # what this run knows to be still so
        for file in files_of(remembered):
            for entry in read_lines(file):
                try:
                    look = entry["num_bytes"], entry["modified_ns"], float(entry.get("duration_s", 0.0))
                    self._known[entry["kind"], entry["path"]] = (*look, str(entry.get("error", "")))
                except (ValueError, TypeError, LookupError):
                    continue  # damaged
        self._file = (share or Share()).file(remembered).open("a", encoding="utf-8")
        self._file.write("\n")  # ends a line that a crash left open
        self._locate = lru_cache(1 << 16)(self._locate_first)

    def close(self) -> None:
        self._file.close()

    def find(self, kind: str, candidates: Sequence[str]) -> Medium:
        """The first of the candidates that is there, opened.

        Raises:
            UnusableMedium: None is there, it does not open, it lies outside the root, or its duration is absurd.
        """
        key = kind, self._locate(tuple(candidates))
        if key not in self._fresh:
            self._take(key, self._look(key))
        num_bytes, modified_ns, duration_s, error = self._known[key]
        if error:
            raise UnusableMedium("unreadable medium", error)
        if kind == "video" and not (math.isfinite(duration_s) and 0 < duration_s <= self.max_duration_s):
            raise UnusableMedium(
                "absurd duration",
                f"{key[1]!r} says it lasts {duration_s:.0f} s; at most {self.max_duration_s:.0f} are taken",
            )
        return Medium(key[1], duration_s, num_bytes, modified_ns)

    def look_at_all(
        self, wanted: Iterable[tuple[str, Sequence[str]]], is_mine: Callable[[str], bool] = lambda path: True
    ) -> Iterator[Key]:
        """Look at the media of (kind, candidates) that were not looked at yet, several at a time; gives each once.

        Args:
            is_mine: Says of a path whether this process is to look at it.
        """
        keys: dict[Key, None] = {}
        for kind, candidates in wanted:
            with suppress(UnusableMedium):  # who asks for it is told
                key = kind, self._locate(tuple(candidates))
                if key not in self._fresh and is_mine(key[1]):
                    keys[key] = None
        for key, look in in_threads(self._look, keys, self.num_workers):
            self._take(key, look)
            yield key

    def _locate_first(self, candidates: tuple[str, ...]) -> str:
        root = str(self.root)
        for candidate in candidates:
            path = os.path.join(root, candidate)
            is_there = os.path.isfile(path)
            path = os.path.realpath(path) if is_there else os.path.normpath(path)
            if not path.startswith(root.rstrip(os.sep) + os.sep) and path != root:
                raise UnusableMedium("outside the media root", f"{candidate!r} leads out of the media root")
            if is_there:
                return Path(path).relative_to(root).as_posix()
        raise UnusableMedium("missing medium", f"{candidates[0]!r} is not under the media root")

    def _look(self, key: Key) -> Look:
        kind, name = key
        path = self.root / name
        stat = path.stat()
        known = self._known.get(key)
        if known is not None and known[:2] == (stat.st_size, stat.st_mtime_ns):
            return known
        try:
            duration_s = 0.0
            if kind == "video":
                duration_s = probe_video(path).duration_s
            else:
                check_picture(locate(path))
            return stat.st_size, stat.st_mtime_ns, duration_s, ""
        except (ValueError, OSError) as error:
            return stat.st_size, stat.st_mtime_ns, 0.0, str(error) or type(error).__name__

    def _take(self, key: Key, look: Look) -> None:
        self._fresh.add(key)
        if self._known.get(key) is look:
            return
        self._known[key] = look
        num_bytes, modified_ns, duration_s, error = look
        entry = {"kind": key[0], **asdict(Medium(key[1], duration_s, num_bytes, modified_ns))}
        self._file.write(json.dumps(entry | ({"error": error} if error else {})) + "\n")
        self._file.flush()
