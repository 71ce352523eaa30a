"""An open video file: its one video stream, what its header says, and its frames from any time on.

The rules cited are those of `video_reader.py`, which picks among these frames.
"""

import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from typing import Any
from urllib.parse import unquote, urlparse

import numpy as np

try:
    import av
except ImportError:  # the folder must stay loadable without PyAV: frames may also come as arrays
    av = None  # type: ignore[assignment]  # whoever needs it says what to install

_KEYFRAME_WINDOW_S = 30  # how far from the beginning keyframes are counted


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


class VideoSource:
    """An open file and its one video stream. Times are integers, in ticks of the stream's time base (rule 2)."""

    def __init__(self, path: str | os.PathLike, num_threads: int | None = None):
        if av is None:
            raise ImportError("Reading video files needs PyAV: pip install av")
        self.path = _local_path(path)
        self.name = f"'{self.path}'"
        self.num_threads = num_threads
        self.container = self._open()
        try:
            self.stream = self._video_stream()
            self.time_base = self.stream.time_base or Fraction(1, av.time_base)
            self._fresh = True  # nothing read yet: the beginning needs no seek
            self._landing: int | None = None
            self._same_landings = 0
            self.origin = self.end = self.stream.start_time or 0  # rule 1; `end` grows with what is decoded
            rate = self.stream.average_rate or self.stream.guessed_rate
            self.average_fps = float(rate) if rate else None
            self.frame_ticks = round(1 / (rate * self.time_base)) if rate else 0
        except BaseException:
            self.container.close()
            raise

    def __enter__(self) -> "VideoSource":
        return self

    def __exit__(self, *exc_info) -> None:
        self.container.close()

    def ticks(self, seconds: Fraction) -> int:
        """The last tick at or before a time."""
        # The thousandth lets a time that was a tick before it became a float be that tick again.
        return self.origin + math.floor(seconds / self.time_base + Fraction(1, 1000))

    def seconds(self, ticks: int) -> float:
        return float((ticks - self.origin) * self.time_base)

    def reopen(self, thread_type: Any) -> None:
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
        frame, gap = None, None
        keyframe: int | None = None
        end: int | None = None
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
        transposed = orientation_of(frame)[0]
        return VideoInfo(
            path=self.path,
            duration_s=float(self.duration),
            width=frame.height if transposed else frame.width,
            height=frame.width if transposed else frame.height,
            average_fps=self.average_fps,
            num_frames=self.stream.frames or None,
            keyframe_interval_s=None if gap is None else float(gap * self.time_base),
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
            back = 2 * back or math.ceil(1 / self.time_base)
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
                if stream.codec_context is None:
                    raise VideoReadError(
                        f"{self.name}: its pictures are in a format that this FFmpeg cannot decode. Convert it to mp4, "
                        "or, if it should be one, copy or download it again."
                    )
                if self.num_threads is not None:
                    stream.codec_context.thread_count = self.num_threads
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
        return max(declared or Fraction(0), Fraction(0) if end is None else (end - self.origin) * self.time_base)

    def _declared_duration(self) -> Fraction | None:
        if self.stream.duration:
            return self.stream.duration * self.time_base
        try:  # Matroska: 00:01:02.345000000
            hours, minutes, seconds = map(Fraction, self.stream.metadata.get("DURATION", "").split(":"))
            return hours * 3600 + minutes * 60 + seconds
        except ValueError:
            return Fraction(self.container.duration, av.time_base) if self.container.duration else None


def orientation_of(frame: "av.VideoFrame") -> tuple[bool, bool, bool]:
    """How the display matrix turns a stored frame: (transpose, then flip left-right, then flip upside down).

    The matrix maps stored (x, y) to displayed (a x + c y, b x + d y), fixed point, y pointing down. Ask once per file:
    PyAV's side data and its frame hold each other, so a frame once asked lives until the next garbage collection.
    """
    try:
        side_data: Any = frame.side_data
        matrix = np.frombuffer(bytes(side_data["DISPLAYMATRIX"]), dtype=np.int32)
    except KeyError:
        return False, False, False
    a, b, _, c, d = (int(value) for value in matrix[:5])
    if abs(b) > abs(a):
        return True, c < 0, b < 0
    return False, a < 0, d < 0


def _local_path(path: str | os.PathLike) -> str:
    path = os.fspath(path)
    if path.startswith("file://"):
        return unquote(urlparse(path).path)
    return path
