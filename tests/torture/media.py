"""Feed the reader mutated pictures and videos, of every container that the tests write, in this process.

    python -m tests.torture.media COUNT SEED

Each file is either read or refused with one line; a hang or a crash ends the process. What Python allocates stays below
ten times the frames kept, and all that FFmpeg and PIL allocate below a bound of the process.
"""

import faulthandler
import io
import json
import random
import resource
import sys
import tempfile
import traceback
import tracemalloc
import warnings
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from tests.processing.test_every_container import CONTAINERS
from tests.processing.videos import write_clip
from tests.torture.mutations import mutate
from video_ma2mba.processing import VideoMa2mbaVideoProcessor, VideoReadError

TIMEOUT_S = 60
SIDE = 64
KEPT_AT_LEAST = 512  # frames: so many count where fewer are kept
EXTRA_BYTES = 3 << 30  # of address space, most of which threads reserve and never touch
PICTURES = ["JPEG", "PNG", "GIF", "WEBP", "AVIF", "TIFF", "BMP", "PPM"]


def originals(folder: Path) -> dict[str, bytes]:
    """Whole files by name."""
    files = {}
    for suffix, codec, sound, reorders, late, _ in CONTAINERS:
        options = {"b_frames": 2 if reorders else 0, "first": 37 if late else 0, "sound_s": 3 if sound else 0}
        path = write_clip(folder / f"{codec}.{suffix}", range(75), codec, sound=sound, **options)
        files[path.name] = path.read_bytes()
    for form in PICTURES:
        frames = [Image.fromarray(np.full((48, 64, 3), 40 * number, np.uint8)) for number in range(4)]
        for moving in (False, True):
            buffer = io.BytesIO()
            several = {"save_all": True, "append_images": frames[1:], "duration": 300}
            if moving and form not in ("GIF", "PNG", "WEBP", "AVIF"):
                continue
            frames[0].save(buffer, form, **(several if moving else {}))
            files[f"{'moving' if moving else 'still'}.{form.lower()}"] = buffer.getvalue()
    return files


def try_one(processor: VideoMa2mbaVideoProcessor, path: Path, as_image: bool) -> str | None:
    """What is wrong with how it was taken; None if nothing is."""
    faulthandler.dump_traceback_later(TIMEOUT_S, exit=True)
    tracemalloc.start()
    kept = 0
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            kept = len(processor.load_image(path) if as_image else processor.load(path, max_frames=2000).frames)
    except VideoReadError as error:
        if "\n" in str(error) or len(str(error)) > 1000:
            return f"more than a line: {str(error)[:1500]}"
    except BaseException:
        return traceback.format_exc()
    finally:
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        faulthandler.cancel_dump_traceback_later()
    allowed = 10 * max(kept, KEPT_AT_LEAST) * 3 * SIDE * SIDE
    return f"{peak:,} bytes for {kept} frames" if peak > allowed else None


def run(count: int, seed: int) -> int:
    torch.set_num_threads(1)
    processor, failures = VideoMa2mbaVideoProcessor(size=SIDE), 0
    with tempfile.TemporaryDirectory() as folder:
        files = originals(Path(folder))
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + EXTRA_BYTES, resource.RLIM_INFINITY))
        for number in range(count):
            rng = random.Random(f"media {seed} {number}")
            name = rng.choice(sorted(files))
            data = mutate(files[name], rng)
            if rng.random() < 0.3:
                data = mutate(data, rng)
            path = Path(folder) / f"mutated{Path(name).suffix}"
            path.write_bytes(data)
            if problem := try_one(processor, path, as_image=rng.random() < 0.3):
                failures += 1
                print(json.dumps({"number": number, "file": name, "problem": problem[-1500:]}), flush=True)
    return failures


if __name__ == "__main__":
    sys.exit(1 if run(int(sys.argv[1]), int(sys.argv[2])) else 0)
