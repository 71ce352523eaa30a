"""A video as PyAV opens it: only as what it is, and leading nowhere else; where and when its packets are."""

import math
from fractions import Fraction
from typing import Any

from .media_location import URL_TIMEOUT_S, MediaLocation, VideoReadError, silent

try:
    import av
except ImportError:  # `video_source` says what to install
    av = None  # type: ignore[assignment]

# Containers round durations, and sound may end a little after the pictures: less than this is not "missing".
TRUNCATION_TOLERANCE_S = 0.5
_UNREAD_PART = 4  # more than a fourth of such a file behind the last packet is more than indexes and tags
# Formats whose packets stand one after another: bytes between them, more than so many of their headers, where times
# have a gap too, are lost packets. A program stream tells no places, but its frames come at one rate: any gap is loss.
_HEADERS_BYTES = {"matroska,webm": 100, "flv": 100, "mpegts": 188 * 8, "mpeg": 0}
# Formats that name other files or addresses; those of the web may, for what they name is then in the web too.
PLAYLISTS = {"hls", "dash"}
_NOT_VIDEO = {
    "concat", "imf", "sdp", "rtsp", "sap", "rtp", "image2", "webm_dash_manifest", "lavfi", "tty", "ffmetadata",
}  # fmt: skip
# Rule 2. FFmpeg's own bounds: of a clock that may be set anew (MPEG transport and program streams, Ogg) every step back
# and every leap of more than ten seconds is a joint, of others a step back that no reordering of frames explains.
_LEAP_S, _STEP_BACK_S = 10, 1
_WEB_PROTOCOLS = "http,https,httpproxy,tcp,tls,crypto,data"


def open_container(location: MediaLocation) -> "av.container.InputContainer":
    """What PyAV makes of a file, an address or bytes.

    Raises:
        VideoReadError: It is none that FFmpeg reads, or its server is silent.
    """
    target, is_url = location.target, location.is_url
    if hasattr(target, "seek"):
        target.seek(0)
    refused = _NOT_VIDEO if is_url else _NOT_VIDEO | PLAYLISTS
    options = {
        "format_whitelist": ",".join(sorted(av.formats_available - refused)),
        "protocol_whitelist": _WEB_PROTOCOLS if is_url else "file",
    }
    if is_url:
        options["rw_timeout"] = str(round(URL_TIMEOUT_S * 1e6))
    try:
        # Titles in unknown encodings are no reason to refuse a video.
        return av.open(
            target, "r", options=options, metadata_errors="ignore", timeout=URL_TIMEOUT_S if is_url else None
        )
    except (av.error.ExitError, av.error.TimeoutError) as error:
        raise VideoReadError(silent(location)) from error
    except PermissionError as error:
        raise VideoReadError(f"{location.name}: no permission to read this file. Change its access rights.") from error
    except (av.FFmpegError, OSError, ValueError) as error:
        if location.header[4:8] == b"ftyp":
            raise VideoReadError(
                f"{location.name}: an mp4 file without a readable index, most likely cut off while it was recorded or "
                "downloaded. Copy or download it again."
            ) from error
        if location.header.startswith((b"#EXTM3U", b"ffconcat")):
            raise VideoReadError(
                f"{location.name}: a list of other files, which are not opened for it. "
                "Put them into one file: ffmpeg -i LIST -c copy OUTPUT.mp4"
            ) from error
        reason = getattr(error, "strerror", None) or type(error).__name__
        raise VideoReadError(
            f"{location.name}: this is not a video that FFmpeg can read ({reason}). "
            "Check that it plays in a video player, or convert it to mp4."
        ) from error


def video_stream(container: "av.container.InputContainer", name: str) -> "av.VideoStream":
    """The default video stream, or the first.

    Raises:
        VideoReadError: There is none, or of no codec that is known.
    """
    # The cover picture of a song counts as a video stream in FFmpeg, not here.
    kinds = av.stream.Disposition
    streams = [
        stream
        for stream in container.streams.video
        if not stream.disposition & (kinds.attached_pic | kinds.timed_thumbnails)
    ]
    if not streams:
        found = sorted({stream.type for stream in container.streams})
        raise VideoReadError(
            f"{name}: there are no pictures in this file, only {', '.join(found) or 'nothing'}. Name a video file."
        )
    stream = next((stream for stream in streams if stream.disposition & kinds.default), streams[0])
    if stream.codec_context is None:
        raise VideoReadError(
            f"{name}: its pictures are in a format that this FFmpeg cannot decode. Convert it to mp4, "
            "or, if it should be one, copy or download it again."
        )
    return stream


def may_have_joints(container: "av.container.InputContainer", location: MediaLocation) -> bool:
    """Whether only looking at every packet tells; a list of pieces tells its length, and a live stream has none."""
    form = container.format
    if form.name in PLAYLISTS or (location.is_url and container.size <= 0):
        return False
    if form.name.startswith("mov"):
        return _second_file(location) is not None
    return bool(av.format.Flags.ts_discont.value & form.flags) or form.name == "flv"


class PacketPlaces:
    """Where the packets lie in a file: bytes that belong to none, between them or behind the last."""

    def __init__(self, container: "av.container.InputContainer", stream_index: int, location: MediaLocation):
        self.container, self.stream_index, self.location = container, stream_index, location
        self._read_to: int | None = None
        self._skipped_before = False

    def skips(self, packet: "av.Packet") -> bool:
        """Whether bytes between this packet and the ones before, of any stream, were left out by the demuxer."""
        form = self.container.format.name
        if form == "mpeg":
            return True
        if packet.pos is None or packet.pos < 0:
            return False
        known = form in _HEADERS_BYTES
        skipped = known and self._read_to is not None and packet.pos - self._read_to > _HEADERS_BYTES[form]
        size = packet.size if form != "mpegts" else packet.size * 188 // 184
        self._read_to = max(self._read_to or 0, packet.pos + size)
        if packet.stream_index != self.stream_index:
            self._skipped_before = skipped or self._skipped_before
            return False
        skipped, self._skipped_before = skipped or self._skipped_before, False
        return skipped

    def unread(self) -> int:
        """Bytes of another file behind the last packet: from where it begins, or where so much is there; else 0."""
        size, form = self.container.size, self.container.format.name
        if not self._read_to:
            return 0
        if form.startswith("mov"):
            begin = _second_file(self.location)
            return size - begin if begin is not None and begin >= self._read_to else 0
        behind = size - self._read_to if form in ("matroska,webm", "flv") else 0
        return behind if behind * _UNREAD_PART > size else 0


class TimeLine:
    """The times of a stream's packets on one line that goes on (rule 2 of `video_reader.py`), in ticks.

    Args:
        time_base: Seconds of a tick. frame_ticks: Of a packet that does not say how long it lasts.

    Attributes:
        joints: How often the clock was set anew so far.
    """

    def __init__(self, container: "av.container.InputContainer", time_base: Fraction, frame_ticks: int):
        anew = bool(av.format.Flags.ts_discont.value & container.format.flags)
        self._leap_s: float = _LEAP_S if anew else math.inf
        self._step_back_s = 0 if anew else _STEP_BACK_S
        self.time_base, self.frame_ticks, self.joints = time_base, frame_ticks, 0
        self._clock: int | None = None
        self._shift, self._end = 0, -(1 << 62)

    def place(self, packet: "av.Packet") -> Fraction | None:
        """Moves a packet's times onto the line. Where the clock was set anew, it follows what came before.

        Returns:
            Seconds by which the clock went on; None where it was set anew, or has not told two times yet.
        """
        clock, step = packet.dts, None
        if clock is not None and self._clock is not None:
            step = (clock - self._clock) * self.time_base
            if step < -self._step_back_s or step > self._leap_s:
                self.joints, step = self.joints + 1, None
                self._shift = self._end - (clock if packet.pts is None else packet.pts)
        self._clock = clock if clock is not None else self._clock
        if self._shift:
            packet.pts = None if packet.pts is None else packet.pts + self._shift
            packet.dts = None if packet.dts is None else packet.dts + self._shift
        time = packet.dts if packet.pts is None else packet.pts
        if time is not None:
            self._end = max(self._end, time + (packet.duration or self.frame_ticks))
        return step


def _second_file(location: MediaLocation) -> int | None:
    """Where in an mp4 or mov file another one begins, or None."""
    if location.is_url:
        return None
    if not hasattr(location.target, "seek"):
        with open(location.target, "rb", buffering=0) as file:
            return _second_index(file)
    stood = location.target.tell()
    try:
        return _second_index(location.target)
    finally:
        location.target.seek(stood)


def _second_index(file: Any) -> int | None:
    """mp4 is a row of boxes, each with its length and kind, and whole once it has had its index and its media."""
    place, seen = 0, set[bytes]()
    while True:
        file.seek(place)
        header = file.read(16)
        kind, length = header[4:8], int.from_bytes(header[:4])
        if kind in (b"ftyp", b"moov") and b"moov" in seen and seen & {b"mdat", b"moof"}:
            return place
        seen.add(kind)
        length = int.from_bytes(header[8:]) if length == 1 else length
        if len(header) < 8 or length < 8:  # the end, or a box that goes to it
            return None
        place += length


def declared_end(container: "av.container.InputContainer", stream: "av.VideoStream") -> Fraction | None:
    """The end that the file declares, in seconds of its own clock, of which Matroska's durations are ends."""
    if stream.duration:
        return ((stream.start_time or 0) + stream.duration) * (stream.time_base or Fraction(1, av.time_base))
    try:  # Matroska: 00:01:02.345000000
        hours, minutes, seconds = map(Fraction, stream.metadata.get("DURATION", "").split(":"))
        return hours * 3600 + minutes * 60 + seconds
    except ValueError:
        return Fraction(container.duration, av.time_base) if container.duration else None


def as_whole(packet: "av.Packet") -> "av.Packet":
    """A copy without the marks of corruption and of what is not to be shown."""
    copy = av.Packet(bytes(packet))
    copy.pts, copy.dts, copy.duration = packet.pts, packet.dts, packet.duration
    copy.time_base, copy.is_keyframe, copy.stream = packet.time_base, packet.is_keyframe, packet.stream
    return copy


def stands_alone(frame: "av.VideoFrame") -> bool:
    return bool(frame.key_frame) or frame.pict_type == av.video.frame.PictureType.I
