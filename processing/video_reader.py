"""Reads a video file frame by frame, at a chosen rate, without ever holding more than the frame at hand.

The paper watches every video at 1 FPS (section 3.5), for hours. So frames are picked while the file is decoded, shrunk
at once, and handed on one at a time: memory depends neither on the length nor on the resolution of the source.

    for frame in read_frames("talk.mp4", fps=1.0, resize=(336, 336)):
        frame.timestamp_s, frame.pixels      # float, (336, 336, 3) uint8

Rules, cited in the code of `video_source.py` and below:

1. Time zero is the first frame that can be shown, found by decoding. The frame *shown* at time t is the last one whose
   presentation time is at most t; for k = 0, 1, 2, ... the frame shown at `start_s + k / fps` is picked. This is right
   for variable frame rates too. The end is that of the last picture, whatever the header says.
2. Where times go back, or leap in a format whose clock may be set anew, recordings were joined: every picture is used
   once, in the order of the file, on a time line that goes on.
3. Frame times that a container rounds count as what was rounded: at its own rate a file gives each frame once.
4. All comparisons are between integers, in ticks of the stream's time base, so that no rounding moves a pick.
5. What does not decode is left out, and what was predicted from it; the last good picture stands in. Missing seconds
   are warned about, or raised with `strict=True`. A mere gap in times is no damage: screen recorders make them.
6. Decoding is sequential, unless keyframes come at least about as often as the picks: then each pick is sought.

PyAV, which brings its own FFmpeg, is the one decoder of videos, and PIL that of pictures. torchcodec would give 5 to
12 % on H.264 with rare keyframes and is 1.8 times slower with dense ones; it wants FFmpeg's libraries on the machine,
has no word on damage, joints or first frames, and so would need all of these rules again. `video-ma2mba bench decode`
prints its row, and decord's, where they are installed.
"""

import math
import os
import warnings
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np

from .frame_pixels import Size
from .media_location import VideoReadError, locate
from .picture_source import PictureSource, is_picture
from .video_source import TRUNCATION_TOLERANCE_S, VideoSource

# A keyframe gap up to this many sampling steps still makes seeking cheaper than decoding everything: 29.97 fps with a
# keyframe every 30 frames has a gap of 1.001 s.
_SEEK_MARGIN = Fraction(11, 10)


@dataclass(frozen=True)
class VideoInfo:
    """What `probe_video` finds out about a file.

    Attributes:
        path: The file or URL; of bytes and objects, what they are called in messages.
        duration_s: Seconds from the first frame to the end of the last (a file that breaks off holds less).
        width, height: Pixels of a frame as displayed, that is after rotation, and with pixels made square.
        average_fps: Frames per second on average, or None where the file does not tell.
        num_frames: Number of frames in the file, or None where the container does not tell.
        keyframe_interval_s: Largest gap seen between keyframes near the beginning; None if fewer than two were seen, or
            if seeking would land in another part of joined recordings.
    """

    path: str
    duration_s: float
    width: int
    height: int
    average_fps: float | None
    num_frames: int | None
    keyframe_interval_s: float | None


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
        num_frames: How many frames will come, for progress bars; a file that breaks off yields fewer.
    """

    def __init__(self, info: VideoInfo, num_frames: int, frames: Iterator[VideoFrame], close: Callable[[], None]):
        self.info = info
        self.num_frames = num_frames
        self._frames = frames
        self._close = close

    def __next__(self) -> VideoFrame:
        return next(self._frames)

    def close(self) -> None:
        """Stops early and closes the file."""
        if isinstance(self._frames, Generator):
            self._frames.close()
        self._close()


def probe_video(path: Any) -> VideoInfo:
    """Looks at the first frame, the first keyframes and the end of a file; decodes little more than one frame.

    Args:
        path: As of `read_frames`.

    Raises:
        VideoReadError: The file is missing, empty, a folder, not a video, has no pictures, or its first frame is
            damaged.
    """
    source = _open(path)
    try:
        source.examine()
        source.begin("SLICE")
        return _info(source)
    finally:
        source.close()


def read_frames(
    path: str | os.PathLike | bytes | Any,
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
        path: A local path; a `file:`, `http:`, `https:` or `data:` URL; bytes; or a binary file object with `read`,
            which stays open. A picture is a video of one frame, and of an animation all frames are taken.
        fps: Frames per second of video time: any positive finite number. Above the source's own rate frames repeat.
        max_frames: If `fps` would pick more than this, that many frames are spread evenly over the range instead: at
            `start_s + k * (end - start_s) / max_frames`.
        start_s: Where to begin, in seconds from the first frame.
        end_s: Where to stop (exclusive), in seconds; None, or anything beyond the end, means the end of the video.
        resize: (height, width) of the pixels handed on, or a function from the displayed (height, width) to it, or None
            to keep the source's size. libswscale's bicubic filter, widened when it shrinks.
        strict: Raise where seconds are missing or damaged, instead of warning how many, and putting the last good
            picture in their place. The error comes after the frames before them.
        num_threads: Of the decoder; None leaves it to FFmpeg, which takes the cores that there are.

    Returns:
        An iterator of `VideoFrame`, with `info` and `num_frames`.

    Raises:
        VideoReadError: As `probe_video`; also if `start_s` lies beyond the end, or (while iterating) if nothing
            decodes.
        ValueError: `fps` not positive and finite, `max_frames` below 1, `start_s` negative, `end_s` not after
            `start_s`.
    """
    check_span(fps, max_frames, start_s, end_s)
    step, start = 1 / _as_fraction(fps), _as_fraction(start_s)
    end = None if end_s is None or math.isinf(end_s) else _as_fraction(end_s)
    source = _open(path, num_threads)
    try:
        # Spread over the whole video, even rare keyframes may be dense enough: then they must all be looked at.
        source.examine(stop_at_gap=step * _SEEK_MARGIN if max_frames is None else None)
        num_frames, probable_step = _grid(source, start, end, step, max_frames)
        gap = source.keyframe_interval
        seek = num_frames > 1 and gap is not None and gap <= probable_step * _SEEK_MARGIN  # rule 6
        source.begin("SLICE" if seek or num_frames == 1 else "AUTO")
        info = _info(source)
        if start >= source.duration:
            error = VideoReadError(
                f"{source.name}: a start at {start_s:g} s lies beyond the end of the video, which lasts "
                f"{info.duration_s:.3f} s. Choose an earlier one."
            )
            error.beyond_the_end = True
            raise error
        num_frames, step = _grid(source, start, end, step, max_frames)
    except BaseException:
        source.close()
        raise
    times = (start + k * step for k in range(num_frames))
    frames = _decode(source, times, num_frames, resize=resize, seek=seek, strict=strict)
    return VideoFrames(info, num_frames, frames, source.close)


def check_span(fps: float | None, max_frames: int | None, start_s: float, end_s: float | None) -> None:
    """Raises a ValueError where these make no sense, for whatever video; see `read_frames`."""
    if fps is not None and not (math.isfinite(fps) and fps > 0):
        raise ValueError(f"fps must be a positive finite number, got {fps}. Use fps=1.0 for one frame per second.")
    if max_frames is not None and max_frames < 1:
        raise ValueError(f"max_frames must be at least 1, got {max_frames}. Use None for no limit.")
    if not (math.isfinite(start_s) and start_s >= 0):
        raise ValueError(f"start_s must be zero or a positive number of seconds, got {start_s}.")
    if end_s is not None and not end_s > start_s:
        raise ValueError(f"end_s must lie after start_s, got start_s={start_s} and end_s={end_s}.")


def _open(path: Any, num_threads: int | None = None) -> VideoSource | PictureSource:
    location = locate(path)
    return PictureSource(location) if is_picture(location) else VideoSource(location, num_threads)


def _info(source: VideoSource | PictureSource) -> VideoInfo:
    height, width = source.size
    gap = source.keyframe_interval
    return VideoInfo(
        path=source.path,
        duration_s=float(source.duration),
        width=width,
        height=height,
        average_fps=source.average_fps,
        num_frames=source.num_frames,
        keyframe_interval_s=None if gap is None else float(gap),
    )


def _grid(
    source: VideoSource | PictureSource, start: Fraction, end: Fraction | None, step: Fraction, max_frames: int | None
) -> tuple[int, Fraction]:
    """How many frames are picked, and the seconds between them."""
    whole = end is None or end >= source.duration
    last = source.duration if whole or end is None else end
    # Rule 3: where the end is that of the last picture, it is as rounded as the times are.
    num_frames = max(1, math.ceil((last - start - (source.slack if whole else 0)) / step))
    if max_frames is not None and num_frames > max_frames:
        return max_frames, (last - start) / max_frames
    return num_frames, step


def _as_fraction(number: float) -> Fraction:
    """A nearby simple fraction: 0.1 becomes 1/10, so that ten seconds at 0.1 FPS give one frame and not two."""
    return Fraction(number).limit_denominator(1_000_000) or Fraction(number)


def _decode(
    source: VideoSource | PictureSource, times: Iterator[Fraction], num_frames: int, *, resize, seek: bool, strict: bool
) -> Generator[VideoFrame, None, None]:
    """Yields the frame shown at each of the `num_frames` ascending `times` (seconds), and closes the source."""
    num_picked, last, pixels, first_target = 0, None, None, None
    try:
        for target, frame in _pick(source, map(source.ticks, times), seek):
            first_target = target if first_target is None else first_target
            if strict and any(begin <= target and end > first_target for begin, end in source.holes):
                break
            if frame is not last:
                last, pixels = frame, source.pixels(frame, resize)
            num_picked += 1
            yield VideoFrame(source.seconds(frame.pts), pixels)
        message = _what_is_missing(source, first_target, num_picked, num_frames)
    finally:
        source.close()
    if message and (strict or num_picked == 0):
        raise VideoReadError(message)
    if message:
        warnings.warn(f"{message} Going on with what could be decoded.", stacklevel=2)


def _what_is_missing(
    source: VideoSource | PictureSource, first_target: int | None, num_picked: int, num_frames: int
) -> str | None:
    """One line about the seconds that could not be read (rule 5), or None."""
    remedy = "Copy or download the file again, or repair it with FFmpeg."
    duration_s = float(source.duration)
    missing_s = duration_s - source.seconds(source.end)
    said = []
    holes = [(begin, end) for begin, end in source.holes if first_target is not None and end > first_target]
    if holes:
        lost_s = sum(source.seconds(end) - source.seconds(begin) for begin, end in holes)
        places = ", ".join(f"{max(source.seconds(begin), 0.0):.1f}" for begin, _ in holes[:3])
        more = " and later" if len(holes) > 3 else ""
        said.append(
            f"{lost_s:.1f} s of {duration_s:.1f} s are missing or damaged, at {places} s{more}, where the last good "
            "picture stands in for them"
        )
    if num_picked == 0 or (num_picked < num_frames and missing_s > TRUNCATION_TOLERANCE_S):
        said.append(f"the last {missing_s:.1f} s of {duration_s:.1f} s are missing or damaged")
    if source.unread_bytes:
        said.append(
            f"the last {source.unread_bytes:,} bytes are not read, as if files that cannot be joined so had been put "
            "into one"
        )
    return f"{source.name}: {'; '.join(said)}. {remedy}" if said else None


def _pick(source: VideoSource | PictureSource, targets: Iterator[int], seek: bool) -> Iterator[tuple[int, Any]]:
    """Yields each of the ascending `targets` (ticks) with the frame shown at it, as far as there are frames."""
    for target in targets:
        frame = source.frame_at(target) if seek else None
        if frame is None:  # from here on in order, which also knows how to deal with damage
            if seek:
                source.restart()
            yield from _pick_in_order(source, target, targets)
            return
        yield target, frame


def _pick_in_order(
    source: VideoSource | PictureSource, target: int | None, targets: Iterator[int]
) -> Iterator[tuple[int, Any]]:
    shown: Any = None
    for frame in source.frames_from(target):
        while target is not None and frame.pts > target:
            yield target, frame if shown is None else shown
            target = next(targets, None)
            if target is None:
                return
        shown = frame
    while shown is not None and target is not None and target < source.end:
        yield target, shown  # the last frame is shown until it has lasted its time
        target = next(targets, None)
