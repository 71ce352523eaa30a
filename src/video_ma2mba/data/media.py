"""Which media of a data set can be used: found under the media root, opened once, and remembered for the next run."""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from ..files import read_lines
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


class MediaIndex:
    """Looks at every medium once, also over several runs: what it finds is appended to a file as it goes.

    Args:
        root: Nothing outside this folder is ever opened.
        remembered: The file of what was found; a line that was cut off by a crash is looked at again.
        max_duration_s: A longer video is taken for a broken header.
    """

    def __init__(self, root: Path, remembered: Path, max_duration_s: float):
        self.root, self.max_duration_s = root.resolve(), max_duration_s
        self._found: dict[tuple[str, str], Medium | UnusableMedium] = {}
        self._known: dict[tuple[str, str, int, int], dict] = {}
        for entry in read_lines(remembered):
            try:
                if "error" not in entry:
                    entry["duration_s"] = float(entry["duration_s"])
                self._known[entry["kind"], entry["path"], entry["num_bytes"], entry["modified_ns"]] = entry
            except (ValueError, TypeError, LookupError):
                continue  # damaged
        self._file = remembered.open("a", encoding="utf-8")
        self._file.write("\n")  # ends a line that a crash left open

    def close(self) -> None:
        self._file.close()

    def find(self, kind: str, candidates: Sequence[str]) -> Medium:
        """The first of the candidates that is there, opened.

        Raises:
            UnusableMedium: None is there, it does not open, it lies outside the root, or its duration is absurd.
        """
        path = self._locate(candidates)
        key = kind, path.relative_to(self.root).as_posix()
        if key not in self._found:
            self._found[key] = self._look(*key)
        found = self._found[key]
        if isinstance(found, UnusableMedium):
            raise found
        return found

    def _locate(self, candidates: Sequence[str]) -> Path:
        for candidate in candidates:
            path = (self.root / candidate).resolve()
            if not path.is_relative_to(self.root):
                raise UnusableMedium("outside the media root", f"{candidate!r} leads out of the media root")
            if path.is_file():
                return path
        raise UnusableMedium("missing medium", f"{candidates[0]!r} is not under the media root")

    def _look(self, kind: str, name: str) -> Medium | UnusableMedium:
        path = self.root / name
        stat = path.stat()
        entry = self._known.get((kind, name, stat.st_size, stat.st_mtime_ns))
        if entry is None:
            medium = Medium(name, 0.0, stat.st_size, stat.st_mtime_ns)
            try:
                duration_s = 0.0
                if kind == "video":
                    duration_s = probe_video(path).duration_s
                else:
                    check_picture(locate(path))
                entry = {"kind": kind, **asdict(medium), "duration_s": duration_s}
            except (ValueError, OSError) as error:
                entry = {"kind": kind, **asdict(medium), "error": str(error)}
            self._file.write(json.dumps(entry) + "\n")
            self._file.flush()
        if "error" in entry:
            return UnusableMedium("unreadable medium", str(entry["error"]))
        duration_s = entry["duration_s"]
        if kind == "video" and not (math.isfinite(duration_s) and 0 < duration_s <= self.max_duration_s):
            return UnusableMedium(
                "absurd duration",
                f"{name!r} says it lasts {duration_s:.0f} s; at most {self.max_duration_s:.0f} are taken",
            )
        return Medium(name, duration_s, stat.st_size, stat.st_mtime_ns)
