"""Reads a video file frame by frame, at a chosen rate, without ever holding more than the frame at hand.

The paper watches every video at 1 FPS (section 3.5), for hours. So frames are picked while the file is decoded, shrunk
at once, and handed on one at a time: memory depends neither on the length nor on the resolution of the source.

    for frame in read_frames("talk.mp4", fps=1.0, resize=(336, 336)):
        frame.timestamp_s, frame.pixels      # float, (336, 336, 3) uint8

Rules, cited in the code below:

1. Time zero is the first frame of the video stream. The frame *shown* at time t is the last one whose presentation time
   is at most t; for k = 0, 1, 2, ... the frame shown at `start_s + k / fps` is picked. This is right for variable frame
   rates too.
2. All comparisons are between integers, in ticks of the stream's time base, so that no rounding moves a pick.
3. Decoding is sequential, unless keyframes come at least about as often as the picks: then each pick is sought.
4. What does not decode is left out. Missing seconds are warned about, or raised with `strict=True`.

Only PyAV and NumPy are needed here.
"""

import math
import os
import warnings
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

from .video_source import VideoInfo, VideoReadError, VideoSource, orientation_of

try:
    import av
    from av.video.reformatter import VideoReformatter
except ImportError:  # the folder must stay loadable without PyAV: frames may also come as arrays
    av = None  # type: ignore[assignment]  # `video_source` says what to install

Size = tuple[int, int]  # height, width

# A keyframe gap up to this many sampling steps still makes seeking cheaper than decoding everything: 29.97 fps with a
# keyframe every 30 frames has a gap of 1.001 s.
_SEEK_MARGIN = Fraction(11, 10)
# Containers round durations, and sound may end a little after the pictures: less than this is not "missing".
_TRUNCATION_TOLERANCE_S = 0.5


@dataclass(frozen=True, eq=False)
class VideoFrame:
    """One picked frame.

    Attributes:
        timestamp_s: When the frame is first shown, in seconds from the first frame of the video.
        pixels: (height, width, 3) uint8, RGB.
    """

    timestamp_s: float
    pixels: np.ndarray


class VideoFrames(Iterator[VideoFrame]):
    """The iterator `read_frames` returns: decodes on demand, closes the file at the end or on `close()`.

    Attributes:
        info: The file's `VideoInfo`.
        num_frames: How many frames will come, for progress bars and for allocating; a truncated file yields fewer.
    """

    def __init__(self, info: VideoInfo, num_frames: int, frames: Generator[VideoFrame, None, None]):
        self.info = info
        self.num_frames = num_frames
        self._frames = frames

    def __next__(self) -> VideoFrame:
        return next(self._frames)

    def close(self) -> None:
        """Stops early and closes the file."""
        self._frames.close()


def probe_video(path: str | os.PathLike) -> VideoInfo:
    """Looks at the header, the first frame and the first keyframes of a file; decodes one frame only.

    Raises:
        VideoReadError: The file is missing, empty, a folder, not a video, has no pictures, or its first frame is
            damaged.
    """
    with VideoSource(path) as source:
        return source.examine()


def read_frames(
    path: str | os.PathLike,
    fps: float = 1.0,
    *,
    max_frames: int | None = None,
    start_s: float = 0.0,
    end_s: float | None = None,
    resize: Size | Callable[[int, int], Size] | None = None,
    strict: bool = False,
    num_threads: int | None = None,
) -> VideoFrames:
    """Picks the frames shown at `start_s`, `start_s + 1/fps`, `start_s + 2/fps`, ... before `end_s`, lazily.

    The arguments and the file's header are checked at once; decoding begins with the first `next()`. There is always at
    least one frame, however short the clip.

    Args:
        path: A local path, a `file://` URL, or any URL FFmpeg can stream (`https://...`).
        fps: Frames per second of video time: any positive finite number. Above the source's own rate frames repeat.
        max_frames: If `fps` would pick more than this, that many frames are spread evenly over the range instead: at
            `start_s + k * (end - start_s) / max_frames`.
        start_s: Where to begin, in seconds from the first frame.
        end_s: Where to stop (exclusive), in seconds; None, or anything beyond the end, means the end of the video.
        resize: (height, width) of the pixels handed on, or a function from the displayed (height, width) to it, or None
            to keep the source's size. libswscale's bicubic filter, widened when it shrinks.
        strict: Raise if the file ends before its declared end, instead of warning how many seconds are missing. The
            error comes where the file breaks off, after the frames before it.

    Returns:
        An iterator of `VideoFrame`, with `info` and `num_frames`.

    Raises:
        VideoReadError: As `probe_video`; also if `start_s` lies beyond the end, or (while iterating) if nothing
            decodes.
        ValueError: `fps` not positive and finite, `max_frames` below 1, `start_s` negative, `end_s` not after
            `start_s`.
    """
    if not (math.isfinite(fps) and fps > 0):
        raise ValueError(f"fps must be a positive finite number, got {fps}. Use fps=1.0 for one frame per second.")
    if max_frames is not None and max_frames < 1:
        raise ValueError(f"max_frames must be at least 1, got {max_frames}. Use None for no limit.")
    if not (math.isfinite(start_s) and start_s >= 0):
        raise ValueError(f"start_s must be zero or a positive number of seconds, got {start_s}.")
    if end_s is not None and not end_s > start_s:
        raise ValueError(f"end_s must lie after start_s, got start_s={start_s} and end_s={end_s}.")

    step = 1 / _as_fraction(fps)
    start = _as_fraction(start_s)
    with VideoSource(path) as source:
        # Spread over the whole video, even rare keyframes may be dense enough: then they must all be looked at.
        info = source.examine(stop_at_gap=step * _SEEK_MARGIN if max_frames is None else None)
        if start >= source.duration:
            raise VideoReadError(
                f"{source.name}: start_s={start_s} lies beyond the end of the video, which lasts {info.duration_s:.3f} "
                "s. Choose an earlier start."
            )
        end = source.duration if end_s is None or end_s >= source.duration else _as_fraction(end_s)
        num_frames = math.ceil((end - start) / step)
        if max_frames is not None and num_frames > max_frames:
            num_frames = max_frames
            step = (end - start) / max_frames

    times = (start + k * step for k in range(num_frames))
    gap = info.keyframe_interval_s
    seek = num_frames > 1 and gap is not None and gap <= step * _SEEK_MARGIN  # rule 3
    frames = _decode(info, times, num_frames, resize=resize, seek=seek, strict=strict, num_threads=num_threads)
    return VideoFrames(info, num_frames, frames)


def _as_fraction(number: float) -> Fraction:
    """A nearby simple fraction: 0.1 becomes 1/10, so that ten seconds at 0.1 FPS give one frame and not two."""
    return Fraction(number).limit_denominator(1_000_000) or Fraction(number)


def _decode(
    info: VideoInfo,
    times: Iterator[Fraction],
    num_frames: int,
    *,
    resize,
    seek: bool,
    strict: bool,
    num_threads: int | None,
) -> Generator[VideoFrame, None, None]:
    """Opens the file anew and yields the frame shown at each of the `num_frames` ascending `times` (seconds)."""
    with VideoSource(info.path, num_threads) as source:
        # Frame threads keep the cores busy in a sequential run, but delay the first frame after every seek.
        source.stream.thread_type = "SLICE" if seek else "AUTO"
        reformatter = VideoReformatter()
        num_picked = 0
        last, orientation = None, None
        for frame in _pick(source, map(source.ticks, times), seek):
            if orientation is None:
                orientation = orientation_of(frame)
            if frame is not last:
                last, pixels = frame, _to_pixels(frame, orientation, resize, reformatter)
            num_picked += 1
            yield VideoFrame(source.seconds(frame.pts), pixels)

        missing_s = info.duration_s - source.seconds(source.end)
        if num_picked == 0 or (num_picked < num_frames and missing_s > _TRUNCATION_TOLERANCE_S):
            message = (
                f"{source.name}: the last {missing_s:.1f} s of {info.duration_s:.1f} s are missing or damaged. "
                "Copy or download the file again, or repair it with FFmpeg."
            )
            if strict or num_picked == 0:
                raise VideoReadError(message)
            warnings.warn(f"{message} Going on with what could be decoded.", stacklevel=2)


def _pick(source: VideoSource, targets: Iterator[int], seek: bool) -> Iterator["av.VideoFrame"]:
    """Yields the frame shown at each of the ascending `targets` (ticks), as far as there are frames."""
    for target in targets:
        frame = source.frame_at(target) if seek else None
        if frame is None:  # from here on in order, which also knows how to deal with a damaged end
            if seek:
                source.reopen("AUTO")
            yield from _pick_in_order(source, target, targets)
            return
        yield frame


def _pick_in_order(source: VideoSource, target: int | None, targets: Iterator[int]) -> Iterator["av.VideoFrame"]:
    shown = None
    for frame in source.frames_from(target):
        while frame.pts > target:
            yield frame if shown is None else shown
            target = next(targets, None)
            if target is None:
                return
        shown = frame
    while shown is not None and target is not None and target < source.end:
        yield shown  # the last frame is shown until it has lasted its time
        target = next(targets, None)


def _to_pixels(frame: "av.VideoFrame", orientation: tuple[bool, bool, bool], resize, reformatter) -> np.ndarray:
    """Scales, converts to RGB and turns upright one frame: (height, width, 3) uint8."""
    transpose, flip_x, flip_y = orientation
    height, width = (frame.width, frame.height) if transpose else (frame.height, frame.width)
    if resize is not None:
        height, width = resize(height, width) if callable(resize) else resize
    if transpose:
        height, width = width, height
    pixels = reformatter.reformat(frame, width, height, "rgb24", interpolation="BICUBIC").to_ndarray()
    if not (transpose or flip_x or flip_y):
        return pixels
    if transpose:
        pixels = pixels.swapaxes(0, 1)
    return np.ascontiguousarray(pixels[:: -1 if flip_y else 1, :: -1 if flip_x else 1])
