"""Tiny videos whose frames carry their own number."""

from collections.abc import Collection, Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

_BITS = 8
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
