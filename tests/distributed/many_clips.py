"""Times `data prepare --cache-frames` of 200 clips with one worker and with two, in turns: `many_clips.py FOLDER`.

Each worker decodes by one thread; the manifests must be equal to the byte. `--side` is in pixels: clips of 64 take less
time to decode than Python takes for them, and Python runs in one thread at a time.
"""

import argparse
import shutil
import statistics
import time
from pathlib import Path

from video_ma2mba import VideoMa2mbaVideoProcessor
from video_ma2mba.data import prepare as preparing
from video_ma2mba.data.synthetic import make_story

NUM_CLIPS, DIFFERENT, LENGTH_S, FPS = 200, 10, 5, 25

parser = argparse.ArgumentParser()
parser.add_argument("folder", type=Path)
parser.add_argument("--side", type=int, default=360)
parser.add_argument("--turns", type=int, default=5)
args = parser.parse_args()
clips = args.folder / f"{args.side}"
if not (clips / "questions.jsonl").exists():
    clips.mkdir(parents=True, exist_ok=True)
    for number in range(NUM_CLIPS):
        path = clips / f"{number}.mp4"
        if number < DIFFERENT:
            make_story(seed=number, duration_s=LENGTH_S, size=args.side, source_fps=FPS).render(path)
        else:
            shutil.copy(clips / f"{number % DIFFERENT}.mp4", path)
    lines = [f'{{"video": "{n}.mp4", "question": "What is it?", "answer": "A clip."}}\n' for n in range(NUM_CLIPS)]
    (clips / "questions.jsonl").write_text("".join(lines))
cache = {"processor": VideoMa2mbaVideoProcessor(), "fps": 1.0, "encoding": "jpeg"}
write_frames, took_s = preparing.write_frames, {1: [], 2: []}
preparing.write_frames = lambda *args, num_threads, **kwargs: write_frames(*args, num_threads=1, **kwargs)
for turn in range(args.turns):
    for num_workers in took_s:
        out = clips / f"out{num_workers}"
        shutil.rmtree(out, ignore_errors=True)
        start = time.perf_counter()
        preparing.prepare(clips / "questions.jsonl", clips, out, cache=cache, num_workers=num_workers)
        took_s[num_workers].append(time.perf_counter() - start)
        print(f"turn {turn}, {num_workers} worker(s): {took_s[num_workers][-1]:.1f} s", flush=True)
    one, two = ((clips / f"out{num_workers}" / "manifest.jsonl").read_bytes() for num_workers in took_s)
    assert one == two
one_s, two_s = map(statistics.median, took_s.values())
print(f"median {one_s:.1f} s with one worker, {two_s:.1f} s with two: {one_s / two_s:.2f} times as fast")
