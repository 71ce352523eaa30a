"""Prepares made-up conversations, so many and then so many more, and prints the peak of memory after each, in MiB.

`many_records.py FOLDER NUM...`: FOLDER holds a video `good.mp4` of six seconds; each conversation is about a clip of
it, so each becomes a sample.
"""

import json
import resource
import sys
from pathlib import Path

from video_ma2mba.data.prepare import prepare

folder, peaks = Path(sys.argv[1]), []
for num in map(int, sys.argv[2:]):
    source = folder / f"{num}.jsonl"
    with source.open("w", encoding="utf-8") as file:
        for number in range(num):
            clip = {"type": "video", "path": "good.mp4", "start_s": number * 1e-6, "end_s": 6}
            content = [clip, {"type": "text", "text": f"What is number {number}? {'word ' * 100}"}]
            messages = [{"role": "user", "content": content}, {"role": "assistant", "content": "word " * 100}]
            file.write(json.dumps({"id": f"{number}", "messages": messages}) + "\n")
    report = prepare(source, folder, folder / f"out{num}")
    assert report["samples"] == num, report["records"]
    peaks.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)
print(json.dumps(peaks))
