"""Tiny videos whose frames carry their own number."""

import io
from collections.abc import Collection, Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

_BITS = 8
_SOUND_BLOCK = 1152  # samples: a frame of MPEG audio
_BLOCK = 8  # pixels: big enough to survive compression and 4:2:0 colour


def numbered_frame(number: int) -> np.ndarray:
    """(32, 64, 3) uint8 whose top half spells the number in black and white blocks; the lower half is a smooth ramp."""
    pixels = np.empty((32, _BITS * _BLOCK, 3), np.uint8)
    for bit in range(_BITS):
        pixels[:16, bit * _BLOCK : (bit + 1) * _BLOCK] = 235 if number >> bit & 1 else 20
    ramp = np.linspace(40, 200, _BITS * _BLOCK)
    pixels[16:] = np.stack([ramp, ramp[::-1], np.full_like(ramp, 90)], axis=-1).astype(np.uint8)
    return pixels


def frame_number(pixels: np.ndarray) -> int:
    """Reads the number off a frame of any size."""
    height, width = pixels.shape[:2]
    row = pixels[height // 4].mean(axis=-1)
    return sum(int(row[int((bit + 0.5) * width / _BITS)] > 128) << bit for bit in range(_BITS))


def write_video(
    path: Path,
    num_frames: int,
    *,
    fps: int | Fraction = 10,
    times: Sequence[Fraction] | None = None,
    gop: int = 250,
    keyframes: Collection[int] = (),
    b_frames: int = 2,
    container_options: dict[str, str] | None = None,
) -> Path:
    """Encodes numbered frames with H.264; `times` (seconds) makes the frame rate variable.

    Keyframes come every `gop` frames, and at the numbers in `keyframes`.
    """
    with av.open(str(path), "w", options=container_options or {}) as container:
        stream = container.add_stream("libx264", rate=fps)
        stream.width, stream.height, stream.pix_fmt = _BITS * _BLOCK, 32, "yuv420p"
        stream.gop_size = gop
        stream.max_b_frames = b_frames
        stream.options = {"preset": "veryfast", "crf": "18", "x264-params": "scenecut=0:b-adapt=0"}
        time_base = Fraction(1, 1000) if times is not None else 1 / Fraction(fps)
        if times is not None:
            stream.time_base = stream.codec_context.time_base = time_base
        for number in range(num_frames):
            frame = av.VideoFrame.from_ndarray(numbered_frame(number), format="rgb24").reformat(format="yuv420p")
            frame.pts = number if times is None else round(times[number] / time_base)
            frame.time_base = time_base
            if number in keyframes:
                frame.pict_type = av.video.frame.PictureType.I
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def write_clip(
    target: Path | io.BytesIO,
    numbers: Sequence[int],
    codec: str,
    *,
    form: str | None = None,
    rate: int | Fraction = 25,
    first: int = 0,
    gop: int = 12,
    b_frames: int = 0,
    sound_s: float = 0,
    sound: str = "aac",
    pixels: str = "yuv420p",
    container_options: dict[str, str] | None = None,
) -> Path | io.BytesIO:
    """Encodes frames with these numbers at a constant rate, the first shown at frame `first` of the clock.

    A container or codec that takes no B-frames is written without them.
    """
    where = str(target) if isinstance(target, Path) else target
    with av.open(where, "w", format=form, options=container_options or {}) as container:
        stream = container.add_stream(codec, rate=rate)
        stream.width, stream.height, stream.pix_fmt = _BITS * _BLOCK, 32, pixels
        stream.gop_size, stream.bit_rate = gop, 2_000_000
        stream.options = {"bf": str(b_frames)} if b_frames else {}
        if codec in ("libx264", "libx265"):
            stream.options |= {
                "preset": "veryfast",
                "x264-params": "scenecut=0:b-adapt=0",
                "x265-params": "log-level=0",
            }
        waiting = []  # packets of sound, muxed in the order of time
        if sound_s:
            audio = container.add_stream(sound, rate=48000, layout="mono")
            for block in range(max(1, round(sound_s * 48000 / _SOUND_BLOCK))):
                frame = av.AudioFrame(format=audio.format.name, layout="mono", samples=_SOUND_BLOCK)
                frame.planes[0].update(bytes(frame.planes[0].buffer_size))
                frame.sample_rate, frame.pts, frame.time_base = 48000, block * _SOUND_BLOCK, Fraction(1, 48000)
                waiting += audio.encode(frame)
            waiting += audio.encode()
        for index, number in enumerate(numbers):
            while waiting and waiting[0].pts * waiting[0].time_base <= (first + index) / Fraction(rate):
                container.mux(waiting.pop(0))
            frame = av.VideoFrame.from_ndarray(numbered_frame(number), format="rgb24").reformat(format=pixels)
            frame.pts, frame.time_base = first + index, 1 / Fraction(rate)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
        for packet in waiting:
            container.mux(packet)
    return target


def clip_bytes(numbers: Sequence[int], form: str, codec: str, **options) -> bytes:
    """What `write_clip` writes, as bytes of a container that needs no seeking."""
    buffer = io.BytesIO()
    write_clip(buffer, numbers, codec, form=form, **options)
    return buffer.getvalue()


def decode_everything(path: Path) -> list[tuple[Fraction, int]]:
    """The plain reference: every frame as (seconds from the first frame, number), in order of presentation."""
    with av.open(str(path)) as container:
        frames = [
            (frame.pts * frame.time_base, frame_number(frame.to_ndarray(format="rgb24")))
            for frame in container.decode(video=0)
        ]
    frames.sort()
    return [(time - frames[0][0], number) for time, number in frames]


def shown_at(frames: list[tuple[Fraction, int]], time: Fraction) -> int:
    """The number of the last frame whose time is at most `time`."""
    return max((each for each in frames if each[0] <= time), key=lambda each: each[0])[1]


def write_audio(path: Path) -> Path:
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=16000)
        frame = av.AudioFrame(format="fltp", layout="mono", samples=1024)
        frame.planes[0].update(bytes(frame.planes[0].buffer_size))
        frame.rate, frame.pts = 16000, 0
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path
