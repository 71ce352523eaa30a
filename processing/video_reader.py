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
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from urllib.parse import unquote, urlparse

import numpy as np

try:
    import av
    from av.video.reformatter import VideoReformatter
except ImportError:  # the folder must stay loadable without PyAV: frames may also come as arrays
    av = None

Size = tuple[int, int]  # height, width

# A keyframe gap up to this many sampling steps still makes seeking cheaper than decoding everything: 29.97 fps with a
# keyframe every 30 frames has a gap of 1.001 s.
_SEEK_MARGIN = Fraction(11, 10)
_KEYFRAME_WINDOW_S = 30  # how far from the beginning keyframes are counted
# Containers round durations, and sound may end a little after the pictures: less than this is not "missing".
_TRUNCATION_TOLERANCE_S = 0.5


class VideoReadError(ValueError):
    """A video that cannot be read as asked. The message names the file and the remedy."""


@dataclass(frozen=True)
class VideoInfo:
    """What `probe_video` finds out about a file.

    Attributes:
        path: The file or URL.
        duration_s: Seconds from the first frame to the end, as the file declares them (a truncated file holds less).
        width, height: Pixels of a frame as displayed, that is after rotation.
        average_fps: Frames per second on average, or None where the file does not tell.
        num_frames: Number of frames in the file, or None where the container does not tell.
        keyframe_interval_s: Largest gap seen between keyframes near the beginning; None if fewer than two were seen.
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
        num_frames: How many frames will come, for progress bars and for allocating; a truncated file yields fewer.
    """

    def __init__(self, info: VideoInfo, num_frames: int, frames: Iterator[VideoFrame]):
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
    with _Source(path) as source:
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
    with _Source(path) as source:
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
    frames = _decode(info, times, num_frames, resize=resize, seek=seek, strict=strict)
    return VideoFrames(info, num_frames, frames)


def _as_fraction(number: float) -> Fraction:
    """A nearby simple fraction: 0.1 becomes 1/10, so that ten seconds at 0.1 FPS give one frame and not two."""
    return Fraction(number).limit_denominator(1_000_000) or Fraction(number)


def _decode(
    info: VideoInfo, times: Iterator[Fraction], num_frames: int, *, resize, seek: bool, strict: bool
) -> Iterator[VideoFrame]:
    """Opens the file anew and yields the frame shown at each of the `num_frames` ascending `times` (seconds)."""
    with _Source(info.path) as source:
        # Frame threads keep the cores busy in a sequential run, but delay the first frame after every seek.
        source.stream.thread_type = "SLICE" if seek else "AUTO"
        reformatter = VideoReformatter()
        num_picked, last, pixels, orientation = 0, None, None, None
        for frame in _pick(source, map(source.ticks, times), seek):
            if orientation is None:
                orientation = _orientation(frame)
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


def _pick(source: "_Source", targets: Iterator[int], seek: bool) -> Iterator["av.VideoFrame"]:
    """Yields the frame shown at each of the ascending `targets` (ticks), as far as there are frames."""
    for target in targets:
        frame = source.frame_at(target) if seek else None
        if frame is None:  # from here on in order, which also knows how to deal with a damaged end
            if seek:
                source.reopen("AUTO")
            yield from _pick_in_order(source, target, targets)
            return
        yield frame


def _pick_in_order(source: "_Source", target: int | None, targets: Iterator[int]) -> Iterator["av.VideoFrame"]:
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


def _orientation(frame: "av.VideoFrame") -> tuple[bool, bool, bool]:
    """How the display matrix turns a stored frame: (transpose, then flip left-right, then flip upside down).

    The matrix maps stored (x, y) to displayed (a x + c y, b x + d y), fixed point, y pointing down. Ask once per file:
    PyAV's side data and its frame hold each other, so a frame once asked lives until the next garbage collection.
    """
    try:
        matrix = np.frombuffer(bytes(frame.side_data["DISPLAYMATRIX"]), dtype=np.int32)
    except KeyError:
        return False, False, False
    a, b, _, c, d = (int(value) for value in matrix[:5])
    if abs(b) > abs(a):
        return True, c < 0, b < 0
    return False, a < 0, d < 0


class _Source:
    """An open file and its one video stream. Times are integers, in ticks of the stream's time base (rule 2)."""

    def __init__(self, path: str | os.PathLike):
        if av is None:
            raise ImportError("Reading video files needs PyAV: pip install av")
        self.path = _local_path(path)
        self.name = f"'{self.path}'"
        self.container = self._open()
        try:
            self.stream = self._video_stream()
            self._fresh = True  # nothing read yet: the beginning needs no seek
            self._landing, self._same_landings = None, 0
            self.origin = self.end = self.stream.start_time or 0  # rule 1; `end` grows with what is decoded
            rate = self.stream.average_rate or self.stream.guessed_rate
            self.average_fps = float(rate) if rate else None
            self.frame_ticks = round(1 / (rate * self.stream.time_base)) if rate else 0
        except BaseException:
            self.container.close()
            raise

    def __enter__(self) -> "_Source":
        return self

    def __exit__(self, *exc_info) -> None:
        self.container.close()

    def ticks(self, seconds: Fraction) -> int:
        """The last tick at or before a time."""
        # The thousandth lets a time that was a tick before it became a float be that tick again.
        return self.origin + math.floor(seconds / self.stream.time_base + Fraction(1, 1000))

    def seconds(self, ticks: int) -> float:
        return float((ticks - self.origin) * self.stream.time_base)

    def reopen(self, thread_type: str) -> None:
        """Begins anew, with other threads."""
        self.container.close()
        self.container = self._open()
        self.stream = self._video_stream()
        self.stream.thread_type = thread_type
        self._fresh = True

    def examine(self, stop_at_gap: Fraction | None = None) -> VideoInfo:
        """Decodes the first frame, looks for keyframes for a while, and for the end of the last frame.

        Also sets `duration` (seconds). Once keyframes are further apart than `stop_at_gap`, no more are looked for.
        """
        window = self.ticks(Fraction(_KEYFRAME_WINDOW_S))
        limit = math.inf if stop_at_gap is None else self.ticks(stop_at_gap) - self.origin
        frame, keyframe, gap, end = None, None, None, None
        for packet in self._packets():
            if frame is None:
                frame = next(iter(self._frames_of(packet)), None)
            if packet is None or packet.pts is None:
                continue
            end = max(end or packet.pts, packet.pts + (packet.duration or 0))
            since = 0 if keyframe is None else packet.pts - keyframe
            if gap is not None or (packet.is_keyframe and keyframe is not None):
                gap = max(gap or 0, since)
            if packet.is_keyframe:
                keyframe = packet.pts
            if frame is not None and (packet.pts > window or since > limit):
                end = self._find_end()
                break
        self.duration = self._duration(end)
        if frame is None:
            raise VideoReadError(f"{self.name}: not one frame could be decoded. Check that it plays in a video player.")
        transposed = _orientation(frame)[0]
        return VideoInfo(
            path=self.path,
            duration_s=float(self.duration),
            width=frame.height if transposed else frame.width,
            height=frame.width if transposed else frame.height,
            average_fps=self.average_fps,
            num_frames=self.stream.frames or None,
            keyframe_interval_s=None if gap is None else float(gap * self.stream.time_base),
        )

    def frames_from(self, target: int) -> Iterator["av.VideoFrame"]:
        """Decodes in order, beginning at or before the frame shown at `target` (at the first frame, if need be)."""
        back = 0
        while True:
            at_origin = target - back <= self.origin
            self._seek(max(target - back, self.origin))
            frames = (frame for packet in self._packets() for frame in self._frames_of(packet))
            first = next(frames, None)
            if at_origin or (first is not None and first.pts <= target):
                break
            # Indexes hold decoding times: with B-frames a seek can land on a keyframe shown after its target.
            back = 2 * back or math.ceil(1 / self.stream.time_base)
        if first is not None:
            yield first
            yield from frames

    def frame_at(self, target: int) -> "av.VideoFrame | None":
        """Seeks and decodes no more than needed for the frame shown at `target`; None where that does not pay."""
        for back in (0, self.frame_ticks * 16):  # see frames_from: 16 is the most frames H.264 and H.265 reorder
            self._seek(max(target - back, self.origin))
            shown = self._shown_at(target)
            if shown is not None:
                return shown
        return None

    def _shown_at(self, target: int) -> "av.VideoFrame | None":
        shown, landing = None, None
        for packet in self._packets():
            if landing is None and packet is not None:
                landing = packet.pts
                self._same_landings = self._same_landings + 1 if landing == self._landing else 0
                self._landing = landing
                if self._same_landings > 2:  # keyframes are rarer here than where they were counted
                    return None
            for frame in self._frames_of(packet):
                if frame.pts > target:
                    return shown
                shown = frame
            # Later packets cannot hold an earlier frame: what the decoder still keeps back is all that is needed.
            if packet is not None and (packet.pts == target or (packet.dts is not None and packet.dts > target)):
                kept_back = (frame for frame in self._frames_of(None) if frame.pts <= target)
                return max(kept_back, key=lambda frame: frame.pts, default=shown)
        return None

    def _packets(self) -> Iterator["av.Packet | None"]:
        """The stream's packets in order, then None. A read error counts as the end."""
        self._fresh = False
        try:
            for packet in self.container.demux(self.stream):
                if packet.size:  # PyAV ends with an empty packet
                    yield packet
        except av.FFmpegError:
            pass  # rule 4: a file cut off inside a packet
        yield None

    def _frames_of(self, packet: "av.Packet | None") -> list["av.VideoFrame"]:
        """The whole frames a packet brings out of the decoder; None brings out all it kept back."""
        if packet is not None and packet.is_corrupt:  # rule 4; it would cost whole frames still in the decoder, too
            return []
        try:
            frames = self.stream.codec_context.decode(packet)
        except av.FFmpegError:  # rule 4
            return []
        frames = [frame for frame in frames if frame.pts is not None and not frame.is_corrupt]
        for frame in frames:
            self.end = max(self.end, frame.pts + (frame.duration or self.frame_ticks))
        return frames

    def _seek(self, target: int) -> None:
        if target > self.origin:
            try:
                self.container.seek(target, stream=self.stream)
                return
            except av.FFmpegError:
                pass  # cannot seek in this file: begin again
        if not self._fresh:  # some formats cannot even be trusted to seek to their beginning
            self.reopen(self.stream.thread_type)

    def _open(self) -> "av.container.InputContainer":
        header = b""
        try:
            if "://" not in self.path:
                with open(self.path, "rb") as file:
                    header = file.read(12)
                if not header:
                    raise VideoReadError(f"{self.name}: the file is empty. Copy or download it again.")
            # Titles in unknown encodings are no reason to refuse a video.
            return av.open(self.path, metadata_errors="ignore")
        except FileNotFoundError as error:
            raise VideoReadError(f"{self.name}: there is no such file. Check the path.") from error
        except IsADirectoryError as error:
            raise VideoReadError(f"{self.name}: this is a folder. Name a video file in it.") from error
        except PermissionError as error:
            raise VideoReadError(f"{self.name}: no permission to read this file. Change its access rights.") from error
        except (av.FFmpegError, OSError) as error:
            if header[4:8] == b"ftyp":
                raise VideoReadError(
                    f"{self.name}: an mp4 file without a readable index, most likely cut off while it was recorded or "
                    "downloaded. Copy or download it again."
                ) from error
            raise VideoReadError(
                f"{self.name}: this is not a video that FFmpeg can read ({error.strerror}). "
                "Check that it plays in a video player, or convert it to mp4."
            ) from error

    def _video_stream(self) -> "av.VideoStream":
        for stream in self.container.streams.video:
            # The cover picture of a song counts as a video stream in FFmpeg, not here.
            if not stream.disposition & av.stream.Disposition.attached_pic:
                return stream
        kinds = sorted({stream.type for stream in self.container.streams})
        raise VideoReadError(
            f"{self.name}: there are no pictures in this file, only {', '.join(kinds)}. Name a video file."
        )

    def _find_end(self) -> int | None:
        """The end of the last packet in ticks, without decoding; None if the end of the file cannot be reached."""
        declared = self._declared_duration()
        if declared is not None:
            self._seek(self.ticks(declared))
        timed = (packet for packet in self._packets() if packet is not None and packet.pts is not None)
        return max((packet.pts + (packet.duration or 0) for packet in timed), default=None)

    def _duration(self, end: int | None) -> Fraction:
        """Seconds from the first frame to the end of the last: as declared, or later if the last packets say so.

        An mp4 declares the end in decoding order, which with B-frames and a varying frame rate can be early. A stream
        written live may declare nothing.
        """
        declared = self._declared_duration()
        if end is None and declared is None:
            raise VideoReadError(
                f"{self.name}: the frames carry no times. Put them into a container: ffmpeg -i INPUT -c copy OUTPUT.mp4"
            )
        return max(declared or 0, 0 if end is None else (end - self.origin) * self.stream.time_base)

    def _declared_duration(self) -> Fraction | None:
        if self.stream.duration:
            return self.stream.duration * self.stream.time_base
        try:  # Matroska: 00:01:02.345000000
            hours, minutes, seconds = map(Fraction, self.stream.metadata.get("DURATION", "").split(":"))
            return hours * 3600 + minutes * 60 + seconds
        except ValueError:
            return Fraction(self.container.duration, av.time_base) if self.container.duration else None


def _local_path(path: str | os.PathLike) -> str:
    path = os.fspath(path)
    if path.startswith("file://"):
        return unquote(urlparse(path).path)
    return path
