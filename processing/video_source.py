"""An open video file: its one video stream on one time line, and the frames of it that are whole.

The rules cited are those of `video_reader.py`, which picks among these frames. `_packets` is the one place that decides
what a picture's time is, `_frames_of` the one that decides which pictures are good.
"""

import heapq
import itertools
import math
from collections.abc import Iterator
from fractions import Fraction
from typing import Any

import numpy as np

from .frame_pixels import Orientation, displayed_size, orientation_of, rgb_of_frame
from .media_location import MediaLocation, VideoReadError, silent
from .video_container import (
    TRUNCATION_TOLERANCE_S,
    PacketPlaces,
    TimeLine,
    as_whole,
    declared_end,
    may_have_joints,
    open_container,
    stands_alone,
    video_stream,
)

try:
    import av
    from av.video.reformatter import VideoReformatter
except ImportError:  # the folder must stay loadable without PyAV: frames may also come as arrays
    av = None  # type: ignore[assignment]  # whoever needs it says what to install

_KEYFRAME_WINDOW_S = 30  # how far from the beginning keyframes are counted
_MOST_REORDERED = 16  # frames, by H.264 and H.265
_MAX_PIXELS = 1 << 27  # of a frame, 16384 x 8192: what is larger is a damaged header
_DOUBTFUL = 3  # packets from one that is marked as corrupt to a joint that explains it, at most
_MAX_READ_ERRORS = 100  # in a row


class VideoSource:
    """An open file and its one video stream. Times are integers, in ticks of the stream's time base (rule 4).

    Args:
        location: See `locate`.
        num_threads: Of the decoder; None leaves it to FFmpeg.

    Attributes:
        origin: The time of the first frame (rule 1), once `begin` has found it.
        end: When the last good frame that was decoded ends.
        duration: Seconds from the first frame to the end of the last.
        unread_bytes: Behind the last packet, where so much is there that it must be another file.
        holes: (from, to) in ticks of what was lost between good frames so far (rule 5).
    """

    def __init__(self, location: MediaLocation, num_threads: int | None = None):
        if av is None or int(av.__version__.partition(".")[0]) < 17:
            found = "is not installed" if av is None else f"is {av.__version__} here, which gets colours wrong"
            raise ImportError(f"Reading video files needs PyAV 17 or newer, and it {found}: pip install av --upgrade")
        self.num_threads = num_threads
        self.location, self.path, self.name = location, location.path, location.name
        self.holes: list[tuple[int, int]] = []
        self.origin: Any = 0
        self.end: Any = 0
        self.container = open_container(self.location)
        try:
            self._take_stream()
            self.time_base = self.stream.time_base or Fraction(1, av.time_base)
            rate = self.stream.average_rate or self.stream.guessed_rate
            self.average_fps = float(rate) if rate else None
            exact_ticks = 1 / (rate * self.time_base) if rate else Fraction(0)
            self.frame_ticks = round(exact_ticks)
            # Rule 3: where frames do not last whole ticks their times are rounded, so each may be a tick off.
            whole = exact_ticks.denominator == 1
            self.slack_ticks = (
                Fraction(1, 1000) if whole else Fraction(999, 1000) if exact_ticks > 4 else Fraction(1, 2)
            )
            aspect = float(self.stream.sample_aspect_ratio or 1)
            self._pixel_aspect = aspect if 1 / 8 <= aspect <= 8 else 1.0
            self._must_decode_from_key = True
            self._reformatter = VideoReformatter()
            self._reset()
        except BaseException:
            self.container.close()
            raise

    def close(self) -> None:
        self.container.close()

    # --- opening ---

    def _reset(self) -> None:
        """The demuxer stands somewhere else."""
        self._line = TimeLine(self.container, self.time_base, self.frame_ticks)
        self._places = PacketPlaces(self.container, self.stream.index, self.location)
        self._lost, self._waits_for_key = False, self._must_decode_from_key
        self._dropped = self._lost_before = False
        self._last: int | None = None
        self._shown_until: int | None = None
        self._numbers: list[int] = []

    def _take_stream(self) -> None:
        """The default video stream of the container just opened, or its first."""
        self.stream = video_stream(self.container, self.name)
        codec, container = self.stream.codec_context, self.container
        codec.options = {"max_pixels": str(_MAX_PIXELS)}
        if self.num_threads is not None:
            codec.thread_count = self.num_threads
        if av.format.Flags.no_timestamps.value & container.format.flags:
            raise VideoReadError(
                f"{self.name}: the frames carry no times. Put them into a container: "
                "ffmpeg -framerate RATE -i INPUT -c copy OUTPUT.mp4"
            )
        self._listed: dict[int | None, int] = {}
        # AVI has no times but counts its packets, in the order of decoding: frames get these numbers as they come out.
        self._counted = container.format.name == "avi"
        if self._counted:
            self._listed = {entry.pos + 8: entry.timestamp for entry in self.stream.index_entries}  # behind its header
        self._fresh = True  # nothing read yet: the beginning needs no seek
        self._landing: int | None = None
        self._same_landings = 0
        self._reached_s = 0.0

    # --- times ---

    @property
    def slack(self) -> Fraction:
        """Seconds that a frame's time may be off by rounding."""
        return self.slack_ticks * self.time_base

    def ticks(self, seconds: Fraction) -> int:
        """The last tick that a frame shown at this time may bear."""
        return self.origin + math.floor(seconds / self.time_base + self.slack_ticks)

    def seconds(self, ticks: int) -> float:
        return float((ticks - self.origin) * self.time_base)

    @property
    def num_frames(self) -> int | None:
        """As the container counts them."""
        return self.stream.frames or None

    # --- the file as a whole ---

    def examine(self, stop_at_gap: Fraction | None = None, all_of_it: bool = False) -> None:
        """Looks for keyframes for a while, and for the end of the last packet; decodes nothing.

        Sets `keyframe_interval` (seconds, or None) and the end. Once keyframes are further apart than `stop_at_gap`, no
        more are looked for. A file that may have joints is looked through whole.
        """
        window = Fraction(_KEYFRAME_WINDOW_S) / self.time_base
        limit = math.inf if stop_at_gap is None else stop_at_gap / self.time_base
        self._first_packet: tuple[int | None, int | None] | None = None
        first, keyframe, gap, end, looking, whole = None, None, None, None, True, False
        all_of_it = all_of_it or may_have_joints(self.container, self.location)
        for packet in self._packets():
            if packet is None:
                whole = True
                break
            if self._first_packet is None:
                self._first_packet = packet.pos, packet.dts
                self._begins_with_key = packet.is_keyframe
            time = packet.dts if packet.pts is None else packet.pts
            if time is None:
                continue
            first = time if first is None else first
            end = max(end or time, time + (packet.duration or self.frame_ticks))
            if looking:
                since = 0 if keyframe is None else time - keyframe
                if gap is not None or (packet.is_keyframe and keyframe is not None):
                    gap = max(gap or 0, since)
                if packet.is_keyframe:
                    keyframe = time
                looking = time - first <= window and since <= limit
            elif not all_of_it:
                break
        if end is None or first is None:
            raise VideoReadError(
                f"{self.name}: not one frame is in this file. Check that it plays in a video player, or copy it again."
            )
        if not whole:
            end = max(self._tail_end() or 0, end)
            if self._line.joints or self._places.unread():  # a surprise
                self._reopen(self.stream.thread_type)
                self.examine(stop_at_gap, all_of_it=True)
                return
        self.unread_bytes = self._places.unread()
        # After a seek into an MPEG program stream FFmpeg gives frames the times of others, and AVI's count needs all.
        lost = self.container.format.name == "mpeg" or (self._counted and self.stream.codec_context.codec.reorder)
        self._has_joints = self._line.joints > 0
        self.must_run = self._has_joints or lost
        self.keyframe_interval = None if gap is None or self.must_run else gap * self.time_base
        declared = None if self._line.joints else declared_end(self.container, self.stream)
        reached = max(float(end * self.time_base), self._reached_s)
        # Rule 1: the pictures say where the end is, unless the file breaks off before what it declares.
        self.end_is_declared = declared is not None and declared - reached > TRUNCATION_TOLERANCE_S
        if self.end_is_declared and declared is not None:
            end = math.floor(declared / self.time_base)
        self._first_time, self._end = first, end
        self.duration = (end - first) * self.time_base  # until `begin` knows better

    def begin(self, thread_type: Any) -> None:
        """Decodes the first frame that can be shown, with which time begins (rule 1), and says how large it is.

        Args:
            thread_type: PyAV's. Frame threads keep the cores busy in a sequential run, but delay the first frame after
                every seek.
        """
        for needs_key in (True, False):
            self.stream.thread_type = thread_type
            self._must_decode_from_key = needs_key
            running = self._decoded(self._from_first_packet())
            frame = next(running, None)
            if frame is not None:
                break
            if not self._dropped:
                break
            self._reopen(thread_type)  # not one keyframe in all of it: then what there is is shown
        if frame is None:
            raise VideoReadError(f"{self.name}: not one frame could be decoded. Check that it plays in a video player.")
        self._started: Iterator[av.VideoFrame] | None = itertools.chain([frame], running)
        self._first_frame: av.VideoFrame | None = frame
        self.origin = frame.pts
        self.orientation: Orientation = orientation_of(frame)
        self.size = displayed_size(frame, self.orientation, self._pixel_aspect)
        if self._lost_before and self._begins_with_key:
            self.holes.append((self._first_time, self.origin))
        self.duration = max(
            (self._end - self.origin) * self.time_base, self.frame_ticks * self.time_base, self.slack * 2
        )

    # --- frames ---

    def frames_from(self, target: int) -> Iterator["av.VideoFrame"]:
        """Decodes in order, beginning at or before the frame shown at `target` (at the first frame, if need be)."""
        started, self._started, self._first_frame = self._started, None, None
        if started is not None and (target <= self.origin or self.must_run):
            yield from started
            return
        if self.must_run:
            self._reopen("AUTO")
            yield from self._decoded(self._packets())
            return
        back = 0
        while True:
            at_origin = target - back <= self.origin
            self._seek(max(target - back, self.origin))
            frames = self._decoded(self._packets())
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
        first, self._first_frame = self._first_frame, None
        if first is not None and target == self.origin:
            return first
        num_holes = len(self.holes)
        for back in (0, self.frame_ticks * _MOST_REORDERED):  # see frames_from
            self._seek(max(target - back, self.origin))
            shown = self._shown_at(target)
            if shown is not None:
                return shown
        del self.holes[num_holes:]  # the sequential run will say what is lost
        return None

    def restart(self) -> None:
        """Begins anew with threads for a sequential run."""
        self._started = None
        self._reopen("AUTO")

    def pixels(self, frame: "av.VideoFrame", resize: Any) -> np.ndarray:
        """(height, width, 3) uint8 of the size asked for; see `read_frames`."""
        size = displayed_size(frame, self.orientation, self._pixel_aspect)
        if resize is not None:
            size = resize(*size) if callable(resize) else resize
        return rgb_of_frame(frame, self.orientation, size, self._reformatter)

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
            if self._lost:
                return None
            # Later packets cannot hold an earlier frame: what the decoder still keeps back is all that is needed.
            if packet is not None and (packet.pts == target or (packet.dts is not None and packet.dts > target)):
                kept_back = (frame for frame in self._frames_of(None) if frame.pts <= target)
                return max(kept_back, key=lambda frame: frame.pts, default=shown)
        return None

    def _decoded(self, packets: Iterator["av.Packet | None"]) -> Iterator["av.VideoFrame"]:
        for packet in packets:
            yield from self._frames_of(packet)

    def _frames_of(self, packet: "av.Packet | None") -> list["av.VideoFrame"]:
        """The good frames a packet brings out of the decoder; None brings out all it kept back.

        After a loss nothing is good before the next keyframe: what lies between was predicted from what is not there.
        """
        if self._counted and packet is not None and packet.dts is not None:
            heapq.heappush(self._numbers, packet.dts)
        try:
            frames = self.stream.codec_context.decode(packet)
        except av.FFmpegError:  # rule 5
            self._lose()
            return []
        good = []
        for frame in frames:
            if self._counted:
                self._number(frame)
            if frame.pts is None:
                continue
            if frame.is_corrupt:
                self._lose()
            if self._waits_for_key and (frame.is_corrupt or not stands_alone(frame)):
                self._dropped = True
                continue
            if self._lost:
                if self._shown_until is None:
                    self._lost_before = True
                elif frame.pts > self._shown_until:
                    self.holes.append((self._shown_until, frame.pts))
            self._lost = self._waits_for_key = False
            if self._last is not None and frame.pts < self._last:  # in order come the pictures: one time is wrong
                self.holes.append((frame.pts, self._last))
            self._last = frame.pts
            self._shown_until = frame.pts + (frame.duration or self.frame_ticks)
            self.end = max(self.end, self._shown_until)
            good.append(frame)
        return good

    def _number(self, frame: "av.VideoFrame") -> None:
        """Gives a frame the next of the numbers its packets had; its own is right where it is a keyframe."""
        own = frame.pts if self._lost and frame.key_frame and frame.pts is not None else -1
        while self._numbers and self._numbers[0] < own:
            heapq.heappop(self._numbers)
        if self._numbers:
            frame.pts = heapq.heappop(self._numbers)

    def _lose(self) -> None:
        """Something was lost here."""
        self._lost = True
        self._waits_for_key = self._must_decode_from_key

    # --- packets, and the time line ---

    def _packets(self) -> Iterator["av.Packet | None"]:
        """The stream's packets in order, with times on one line that goes on (rule 2), then None."""
        self._fresh = False
        errors, packets, doubtful = 0, self.container.demux(), []  # type: int, Any, list[av.Packet]
        while errors <= _MAX_READ_ERRORS:
            try:
                packet = next(packets, None)
            except (av.error.ExitError, av.error.TimeoutError) as error:
                raise VideoReadError(silent(self.location)) from error
            except av.error.InvalidDataError:  # rule 5: what comes after may be whole
                errors, packets = errors + 1, self.container.demux()
                self._lose()
                continue
            except av.FFmpegError:
                break  # rule 5: a file cut off inside a packet
            except IndexError:  # PyAV knows no streams but those of the beginning; of one that came later is no picture
                packets = self.container.demux()
                continue
            if packet is None:
                break
            if not packet.size:  # PyAV ends with empty packets
                continue
            errors = 0
            skipped = self._places.skips(packet)
            time = packet.dts if packet.pts is None else packet.pts
            if time is not None and packet.time_base is not None:
                duration = packet.duration or 0
                self._reached_s = max(self._reached_s, float((time + duration) * packet.time_base))
            if packet.stream_index != self.stream.index:
                continue
            joints = self._line.joints
            self._place(packet, skipped)
            if self._line.joints and packet.is_discard:  # as if it came before the beginning: a clock of mp4 went back
                packet = as_whole(packet)
            if self._line.joints > joints:  # what was cut off there to begin anew counts as corrupt, and is whole
                yield from map(as_whole, doubtful)
                doubtful = []
            elif len(doubtful) == _DOUBTFUL:
                self._lose()
                yield from doubtful[1:]
                doubtful = []
            if doubtful or packet.is_corrupt:
                doubtful.append(packet)
            else:
                yield packet
        if doubtful:
            self._lose()
            yield from doubtful[1:]
        yield None

    def _place(self, packet: "av.Packet", skipped: bool) -> None:
        """Moves a packet's times onto the line. Where the clock was set anew, it follows what came before."""
        if self._counted:
            listed = self._listed.get(packet.pos)
            if listed is not None and packet.dts is not None and listed != packet.dts:
                packet.dts, skipped = listed, True  # those after a loss come too early
            packet.pts = packet.dts
        step = self._line.place(packet)
        if skipped and step is not None and step * 2 > 3 * self.frame_ticks * self.time_base:
            self._lose()

    def _from_first_packet(self) -> Iterator["av.Packet | None"]:
        """The packets from the beginning, without opening the file again where it can go back."""
        if not self._fresh and not self._has_joints:
            try:
                first = self._first_packet[1] if self._first_packet else None
                self.container.seek(first or 0, stream=self.stream)
                self._reset()
                packets = self._packets()
                head = next(packets)
                if head is not None and (head.pos, head.dts) == self._first_packet:
                    return itertools.chain([head], packets)
            except av.FFmpegError:
                pass
        if not self._fresh:
            self._reopen(self.stream.thread_type)
        return self._packets()

    def _seek(self, target: int) -> None:
        if target > self.origin:
            try:
                self.container.seek(target, stream=self.stream)
                self._reset()
                return
            except av.FFmpegError:
                pass  # cannot seek in this file: begin again
        if not self._fresh:  # some formats cannot even be trusted to seek to their beginning
            self._reopen(self.stream.thread_type)

    def _reopen(self, thread_type: Any) -> None:
        """Begins anew, with other threads."""
        self.container.close()
        self.container = open_container(self.location)
        self._take_stream()
        self._reset()
        self.stream.thread_type = thread_type

    # --- the end ---

    def _tail_end(self) -> int | None:
        """The end of the last packet in ticks, without decoding; None if the end of the file cannot be reached."""
        declared = declared_end(self.container, self.stream)
        if declared is None:
            if self.location.is_url and self.container.size <= 0:
                raise VideoReadError(
                    f"{self.name}: a live stream, which has no end. Record a part of it to a file first."
                )
        else:
            self._seek(math.floor(declared / self.time_base))
        end = self._last_packet_end()
        if end is None:  # behind the last keyframe there is nothing: then all of it
            self._reopen(self.stream.thread_type)
            end = self._last_packet_end()
        return end

    def _last_packet_end(self) -> int | None:
        end: int | None = None
        for packet in self._packets():
            time = None if packet is None else packet.dts if packet.pts is None else packet.pts
            if packet is not None and time is not None:
                end = max(end or time, time + (packet.duration or self.frame_ticks))
        return end
