"""Half an hour of video through one whole step of training, in a process of its own whose memory is looked at."""

import json

from video_ma2mba.data.prepare import prepare
from video_ma2mba.data.synthetic import make_story
from video_ma2mba.loading import TINY_MODEL

from ..forked import run_well


def test_half_an_hour_of_video_trains_within_four_gib(tmp_path):
    make_story(seed=0, duration_s=1800, source_fps=1).render(tmp_path / "long.mp4")
    content = [{"type": "video", "path": "long.mp4"}, {"type": "text", "text": "What colour was the circle?"}]
    messages = [{"role": "user", "content": content}, {"role": "assistant", "content": "red"}]
    (tmp_path / "a.jsonl").write_text(json.dumps({"id": "long", "messages": messages}))
    prepare(tmp_path / "a.jsonl", tmp_path, tmp_path / "prepared")
    peaks = {}
    for name, checkpointing in (("MA-GC", "{}"), ("off", "null")):
        changes = {
            "model": TINY_MODEL, "data": tmp_path / "prepared", "output": tmp_path / name, "max_steps": 1,
            "global_batch_size": 1, "logging_steps": 1, "gradient_checkpointing": checkpointing,
        }  # fmt: skip
        options = [word for key, value in changes.items() for word in ("--set", f"{key}={value}")]
        run_well(["train", "finetune", *options])
        report = json.loads((tmp_path / name / "train_report.json").read_text())
        assert report["tokens"] > 1800
        peaks[name] = report["peak_bytes"]
    print({name: f"{peak / 2**20:.0f} MiB" for name, peak in peaks.items()})
    assert peaks["MA-GC"] < 4 * 2**30
    assert peaks["MA-GC"] < peaks["off"]
