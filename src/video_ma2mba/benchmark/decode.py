"""Reading a video at 1 FPS with `read_frames`, against a bare sequential PyAV loop that resizes the same frames.

Renders its own H.264 clips (320x240, 25 fps, moving and grainy): one with a keyframe every 10 seconds, one with a
keyframe every second, the first six times over, and ten seconds of it, which are read ten times. The readers take turns
in the same process, torchcodec and decord among them where they are installed; figures are medians of CPU seconds, of
all threads. Peak memory is that of a fresh process each, which keeps all frames, as a user who wants them all would.
"""

import argparse
import contextlib
import importlib
import math
import statistics
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import av
import numpy as np
from av.video.reformatter import VideoReformatter

from ..loading import natural, positive
from ..processing import video_reader
from .machine import clock, describe, said_by

_WIDTH, _HEIGHT, _FPS = 320, 240, 25
_LONGER = 6  # 10 minutes become 60

# Runs in a fresh process. Only the reader's own files are loaded: torch would hide a few MiB in its hundreds.
_READ_ALL = """
import importlib, json, os, sys, types
import numpy as np
room = sys.modules["room"] = types.ModuleType("room")
room.__path__ = [os.path.dirname(sys.argv[1])]
reader = importlib.import_module("room.video_reader")
side = int(sys.argv[3])
frames = reader.read_frames(sys.argv[2], 1.0, resize=(side, side))
kept = np.empty((frames.num_frames, side, side, 3), np.uint8)
for row, frame in zip(kept, frames):
    row[:] = frame.pixels
with open("/proc/self/status") as status:  # the process's own peak; getrusage would include that of its parent
    peak_kib = next(int(line.split()[1]) for line in status if line.startswith("VmHWM"))
print(json.dumps({"frames": len(kept), "kept_bytes": kept.nbytes, "peak_bytes": peak_kib * 1024}))
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--minutes", type=positive, default=10.0, help="length of the short clip (default: 10)")
    parser.add_argument("--repeats", type=natural, default=5, help="runs of each reader (default: 5)")
    parser.add_argument("--side", type=natural, default=224, help="side of the frames kept, in pixels (default: 224)")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Renders the clips, measures, and returns the figures: seconds, ratios and bytes.

    `sequential.ratio` and `short_clips.ratio` are ours over the bare loop (target: at most 1.1),
    `dense_keyframes.speedup` the bare loop over ours (target: at least 2), `memory.growth_beyond_frames_bytes` what the
    long clip's peak is above the short clip's but for the frames kept. `memory` is None where there is no /proc.
    """
    with tempfile.TemporaryDirectory() as folder:
        sparse = _render(Path(folder, "sparse.mp4"), args.minutes, keyframe_interval=10 * _FPS)
        dense = _render(Path(folder, "dense.mp4"), args.minutes, keyframe_interval=_FPS)
        short = _render(Path(folder, "short.mp4"), 1 / 6, keyframe_interval=10 * _FPS)
        sequential = _compare(sparse, args)
        short_clips = _compare(short, args, times=10)
        dense_keyframes = _compare(dense, args)
        memory = _memory(sparse, args.side) if Path("/proc/self/status").exists() else None
    return {
        "benchmark": "decode",
        "clip": {"minutes": args.minutes, "width": _WIDTH, "height": _HEIGHT, "fps": _FPS, "codec": "h264"},
        "side": args.side,
        "repeats": args.repeats,
        "sequential": {**sequential, "ratio": sequential["ours_s"] / sequential["bare_loop_s"]},
        "dense_keyframes": {**dense_keyframes, "speedup": dense_keyframes["bare_loop_s"] / dense_keyframes["ours_s"]},
        "short_clips": {**short_clips, "ratio": short_clips["ours_s"] / short_clips["bare_loop_s"]},
        "memory": memory,
        "machine": {**describe("cpu"), "av": av.__version__},
    }


def _render(path: Path, minutes: float, keyframe_interval: int) -> Path:
    """A window that wanders over soft blotches, with the grain of a camera: every frame has something to decode."""
    rng = np.random.default_rng(0)
    height, width = _HEIGHT + 64, _WIDTH + 64
    blotches = np.kron(rng.integers(16, 232, (height // 16, width // 16)), np.ones((16, 16)))
    for axis in (0, 1, 0, 1):
        blotches = np.mean([np.roll(blotches, shift, axis) for shift in range(-4, 5)], axis=0)
    grain = rng.normal(0, 3, (16, _HEIGHT, _WIDTH))
    grey = np.full((_HEIGHT // 2, _WIDTH), 128, np.uint8)  # both colour planes
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=_FPS)
        stream.width, stream.height, stream.pix_fmt = _WIDTH, _HEIGHT, "yuv420p"
        stream.gop_size = keyframe_interval
        stream.options = {"preset": "veryfast", "x264-params": "scenecut=0"}
        for number in range(round(minutes * 60 * _FPS)):
            top, left = number // 3 % 64, number // 2 % 64
            picture = blotches[top : top + _HEIGHT, left : left + _WIDTH] + grain[number % len(grain)]
            planes = np.concatenate([picture.astype(np.uint8), grey])
            frame = av.VideoFrame.from_ndarray(planes, format="yuv420p")
            frame.pts = number
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def _repeat(source: Path, path: Path, times: int) -> Path:
    """The same pictures several times over, without encoding them again."""
    with av.open(str(path), "w") as output:
        stream = None
        for turn in range(times):
            with av.open(str(source)) as clip:
                if stream is None:
                    stream = output.add_stream_from_template(clip.streams.video[0])
                length = clip.streams.video[0].duration
                for packet in clip.demux(video=0):
                    if packet.size:
                        packet.pts += turn * length
                        packet.dts += turn * length
                        packet.stream = stream
                        output.mux(packet)
    return path


def _bare_loop(path: Path, side: int) -> int:
    """What one would write without a library: decode everything in order, resize what is due."""
    reformatter, due = VideoReformatter(), 0
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        stream.thread_type = "AUTO"
        for frame in container.decode(stream):
            if frame.time >= due:
                reformatter.reformat(frame, side, side, "rgb24", interpolation="BICUBIC").to_ndarray()
                due += 1
    return due


def _ours(path: Path, side: int) -> int:
    return sum(1 for _ in video_reader.read_frames(path, 1.0, resize=(side, side)))


def _torchcodec(path: Path, side: int) -> int:
    from torch.nn.functional import interpolate
    from torchcodec.decoders import VideoDecoder

    decoder, num_frames = VideoDecoder(str(path)), 0
    for due in range(math.ceil(decoder.metadata.duration_seconds)):
        frame = decoder.get_frame_played_at(due).data[None]
        interpolate(frame.float(), (side, side), mode="bicubic", antialias=True)
        num_frames += 1
    return num_frames


def _decord(path: Path, side: int) -> int:
    import decord

    reader = decord.VideoReader(str(path), width=side, height=side)
    return len(reader.get_batch(range(0, len(reader), _FPS)).asnumpy())


_OTHERS = {"torchcodec": _torchcodec, "decord": _decord}


def _compare(path: Path, args: argparse.Namespace, times: int = 1) -> dict[str, Any]:
    """CPU seconds of each reader, and the number of frames, on which ours and the bare loop must agree."""
    readers = {"ours_s": _ours, "bare_loop_s": _bare_loop}
    for name, read in _OTHERS.items():
        with contextlib.suppress(ImportError, OSError, RuntimeError):  # not here, or without FFmpeg's libraries
            importlib.import_module(name)
            readers[f"{name}_s"] = read

    def read_all(read: Callable[[Path, int], int]) -> int:
        return sum(read(path, args.side) for _ in range(times))

    seconds: dict[str, list[float]] = {name: [] for name in readers}
    counts = {}
    for turn in range(args.repeats + 1):
        for name, read in readers.items():
            took = clock(partial(read_all, read), "cpu")
            counts[name] = took.result
            if turn > 0:  # the first is a warm-up
                seconds[name].append(took.cpu_seconds)
    if counts["ours_s"] != counts["bare_loop_s"]:
        raise RuntimeError(f"the two readers found different numbers of frames: {counts}")
    return {"frames": counts["ours_s"], **{name: statistics.median(one) for name, one in seconds.items()}}


def _memory(short: Path, side: int) -> dict[str, Any]:
    short_clip, long_clip = (
        said_by("-c", _READ_ALL, video_reader.__file__, path, side)
        for path in (short, _repeat(short, short.with_name("long.mp4"), _LONGER))
    )
    kept = long_clip["kept_bytes"] - short_clip["kept_bytes"]
    growth = long_clip["peak_bytes"] - short_clip["peak_bytes"] - kept
    return {"short_clip": short_clip, "long_clip": long_clip, "growth_beyond_frames_bytes": growth}
