"""The frames of a manifest's entries: from the file, or from the cache beside the manifest."""

import bisect
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from .frame_cache import cache_folder, read_frames_between, read_index, reading_stored, settings

if TYPE_CHECKING:
    from ..processing import VideoMa2mbaVideoProcessor

KEPT_BYTES = 2**26  # of decoded frames, in each process that loads; what comes first stays
TOLERANCE = 1e-6  # of a frame: a time that was a whole number of frames before it became a float is one again


class MediaLoader:
    """Turns entries {"type", "path", "start_s", "end_s", "duration_s"} into frames.

    A clip holds those frames of its whole video, sampled from its beginning, whose times lie in the clip: clips that
    follow each other then show every frame once. A clip shorter than the step between frames shows its middle.
    Clips that come again in each epoch are decoded once, as far as they find room.
    """

    def __init__(self, video_processor: "VideoMa2mbaVideoProcessor", fps: float):
        self.video_processor, self.fps = video_processor, fps
        self._kept: dict[tuple, torch.Tensor] = {}

    def num_frames(self, entry: dict[str, Any]) -> int:
        """How many frames an entry has at the full rate; a file that breaks off yields fewer."""
        if entry["type"] == "image":
            return 1
        first, last = self._span(entry)
        return max(last - first, 1)

    def load(self, entry: dict[str, Any], media_root: Path, folder: Path, max_frames: int, cut: bool) -> torch.Tensor:
        """uint8 (frames, 3, side, side): at most `max_frames`, the first ones (`cut`) or spread evenly.

        Raises:
            VideoReadError, OSError: The medium cannot be read. ValueError: The cache was made with other settings.
        """
        path = media_root / entry["path"]
        if entry["type"] == "image":
            return self.video_processor.load_image(path)
        first, last = self._span(entry)
        cached = cache_folder(folder / "frames", entry["path"])
        if cached.is_dir():
            with reading_stored(cached):
                return self._cached(cached, entry, first, last, max_frames, cut)
        if last <= first:
            start_s, end_s = self._middle_s(entry), None
        else:
            start_s, end_s = first / self.fps, last / self.fps
        if cut and last - first > max_frames:
            end_s = (first + max_frames) / self.fps
        limit = 1 if last <= first else max_frames
        key = path, start_s, end_s, limit
        if (frames := self._kept.get(key)) is None:
            load = self.video_processor.load
            frames = load(path, fps=self.fps, start_s=start_s, end_s=end_s, max_frames=limit).frames
            if frames.nbytes + sum(kept.nbytes for kept in self._kept.values()) <= KEPT_BYTES:
                self._kept[key] = frames
        return frames.clone()  # what goes to another process is moved there

    def _span(self, entry: dict[str, Any]) -> tuple[int, int]:
        """Numbers of the first frame of an entry and of the one after its last, on the grid of the whole video."""
        start_s, end_s = entry.get("start_s", 0.0), entry.get("end_s", entry["duration_s"])
        return math.ceil(start_s * self.fps - TOLERANCE), math.ceil(end_s * self.fps - TOLERANCE)

    def _middle_s(self, entry: dict[str, Any]) -> float:
        return (entry["start_s"] + entry["end_s"]) / 2

    def _cached(self, cached: Path, entry: dict, first: int, last: int, max_frames: int, cut: bool) -> torch.Tensor:
        index = read_index(cached, settings(self.video_processor, self.fps))
        times_s = index["timestamps_s"]
        if last <= first:  # the frame that is shown in the middle
            shown = max(bisect.bisect_right(times_s, self._middle_s(entry)) - 1, 0)
            return read_frames_between(cached, shown, shown + 1)
        first, last = min(first, len(times_s) - 1), min(last, len(times_s))
        if cut:
            last = min(last, first + max_frames)
        frames = read_frames_between(cached, first, last)
        if len(frames) > max_frames:
            frames = frames[[k * len(frames) // max_frames for k in range(max_frames)]]
        return frames
