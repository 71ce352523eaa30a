"""Clips drawn over containers, codecs, rates, clocks, B-frames, keyframes and sound: what is picked, against the list
that each was written from. `VIDEO_DRAWS` in the environment asks for more of them, as `make torture` does.
"""

import math
import os
import random
from fractions import Fraction

import pytest

from video_ma2mba.processing import probe_video, read_frames

from .videos import frame_number, write_clip

NUM_DRAWS = int(os.environ.get("VIDEO_DRAWS", "200"))
_NTSC, _FILM = Fraction(30000, 1001), Fraction(24000, 1001)
# container, codec, sound, B-frames possible, the clock may begin late, seconds of a tick by which times are rounded
CONTAINERS = [
    ("mp4", "libx264", "aac", True, True, Fraction(1, 12800)),
    ("mov", "mpeg4", "aac", True, True, Fraction(1, 12800)),
    ("mkv", "libx264", "aac", True, True, Fraction(1, 1000)),
    ("mkv", "ffv1", "flac", False, True, Fraction(1, 1000)),
    ("webm", "libvpx", "libopus", False, True, Fraction(1, 1000)),
    ("ts", "libx264", "aac", True, True, Fraction(1, 90000)),
    ("ts", "mpeg2video", "mp2", True, True, Fraction(1, 90000)),
    ("mpg", "mpeg2video", "mp2", True, True, Fraction(1, 1000)),
    ("flv", "libx264", "aac", True, True, Fraction(1, 1000)),
    ("flv", "flv1", "", False, True, Fraction(1, 1000)),
    ("avi", "mpeg4", "mp2", True, False, Fraction(1, 10**6)),
    ("avi", "libx264", "mp2", True, False, Fraction(1, 10**6)),
    ("asf", "wmv2", "", False, False, Fraction(1, 1000)),
    ("nut", "ffv1", "", False, True, Fraction(1, 10**6)),
]


def draw(rng, folder):
    """A clip, and what is known of it."""
    suffix, codec, sound, reorders, late, tick = rng.choice(CONTAINERS)
    rates = [25, 30, 50, _NTSC, _FILM] if codec == "mpeg2video" else [10, 12, 25, 30, _NTSC, _FILM, 60]
    known = {
        "rate": Fraction(rng.choice(rates)),
        "first": rng.choice([0, 0, 1, 37, 61, 5000, 100_000]) if late else 0,
        # FFmpeg's program streams of keyframes alone have times that are a frame off.
        "gop": rng.choice([5, 12, 250] if suffix == "mpg" else [1, 5, 12, 250]),
        "b_frames": rng.choice([0, 1, 2]) if reorders else 0,
        "sound_s": rng.choice([0, 0, 0.5, 6]) if sound else 0,
    }
    numbers = range(rng.randint(24, 90))
    if known["first"] > 1000:
        known["sound_s"] = 0  # from zero to the late pictures it would last for minutes
    path = write_clip(folder / f"clip.{suffix}", numbers, codec, sound=sound, **known)
    return path, len(numbers), tick, {"suffix": suffix, "codec": codec, "frames": len(numbers), **known}


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("part", range(4))
def test_what_is_picked_is_what_was_written(tmp_path, part):
    for number in range(part, NUM_DRAWS, 4):
        rng = random.Random(f"clip {number}")
        path, num_frames, tick, known = draw(rng, tmp_path)
        rate = known["rate"]

        def picked(fps, path=path, **options):
            frames = list(read_frames(path, fps, **options))
            return [frame_number(frame.pixels) for frame in frames], [frame.timestamp_s for frame in frames]

        numbers, times = picked(float(rate))
        assert numbers == list(range(num_frames)), known
        assert max(abs(time - k / rate) for k, time in enumerate(times)) <= tick, known
        assert picked(float(rate / 2))[0] == list(range(0, num_frames, 2)), known
        assert abs(probe_video(path).duration_s - num_frames / rate) < Fraction(1, 500), known

        fps, start = (
            Fraction(rng.choice(["1", "0.7", "3.3", "2"])),
            rng.choice([Fraction(0), Fraction(rng.randint(1, 350), 1000)]),
        )
        numbers, _ = picked(float(fps), start_s=float(start))
        targets = [start + k / fps for k in range(len(numbers))]
        for target, got in zip(targets, numbers, strict=True):
            assert got in {math.floor(target * rate), math.floor((target + 2 * tick) * rate)}, (known, fps, start)
        left = num_frames / rate - targets[-1]
        assert -tick < left <= 1 / fps + tick, (known, fps, start)
        numbers, _ = picked(60, max_frames=5)
        spread = [Fraction(k * num_frames, 5) for k in range(5)]
        for target, got in zip(spread, numbers, strict=True):
            assert got in {math.floor(max(target + up * tick * rate, 0)) for up in (-2, 0, 2)}, known
