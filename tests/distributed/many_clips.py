"""Times `data prepare --cache-frames` of 200 clips with one worker and with two: `many_clips.py FOLDER [TURNS]`.

Each worker decodes by one thread; the manifests must be equal to the byte.
"""

import shutil
import statistics
import sys
import time
from pathlib import Path

from video_ma2mba import VideoMa2mbaVideoProcessor
from video_ma2mba.data import prepare as preparing
from video_ma2mba.data.synthetic import make_story

NUM_CLIPS, LENGTH_S = 200, 20
TURNS = int(sys.argv[2]) if len(sys.argv) > 2 else 5

folder = Path(sys.argv[1])
folder.mkdir(parents=True, exist_ok=True)
lines = []
for number in range(NUM_CLIPS):
    if not (folder / f"{number}.mp4").exists():
        make_story(seed=number, duration_s=LENGTH_S).render(folder / f"{number}.mp4")
    lines.append(f'{{"video": "{number}.mp4", "question": "What is it?", "answer": "A clip."}}\n')
(folder / "questions.jsonl").write_text("".join(lines))
cache = {"processor": VideoMa2mbaVideoProcessor(), "fps": 1.0, "encoding": "jpeg"}
write_frames, took_s = preparing.write_frames, {1: [], 2: []}
preparing.write_frames = lambda *args, num_threads, **kwargs: write_frames(*args, num_threads=1, **kwargs)
for turn in range(TURNS):
    for num_workers in took_s:
        out = folder / f"out{num_workers}"
        shutil.rmtree(out, ignore_errors=True)
        start = time.perf_counter()
        preparing.prepare(folder / "questions.jsonl", folder, out, cache=cache, num_workers=num_workers)
        took_s[num_workers].append(time.perf_counter() - start)
        print(f"turn {turn}, {num_workers} worker(s): {took_s[num_workers][-1]:.1f} s", flush=True)
    one, two = ((folder / f"out{num_workers}" / "manifest.jsonl").read_bytes() for num_workers in took_s)
    assert one == two
one_s, two_s = map(statistics.median, took_s.values())
print(f"median {one_s:.1f} s with one worker, {two_s:.1f} s with two: {one_s / two_s:.2f} times as fast")
