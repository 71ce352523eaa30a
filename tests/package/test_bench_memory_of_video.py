"""The figures of `bench memory-of-video`, at a tiny size."""

import argparse

from video_ma2mba.benchmark import memory_of_video

from ..forked import run_measured


def test_bytes_are_those_of_the_formula(tmp_path, monkeypatch):
    monkeypatch.setattr(memory_of_video, "OVERLAP_MINUTES", 1)
    monkeypatch.setattr(memory_of_video, "in_measured_process", run_measured)
    parser = argparse.ArgumentParser()
    memory_of_video.add_arguments(parser)
    plot = tmp_path / "plot.png"
    result = memory_of_video.run(
        parser.parse_args(["--minutes", "1", "2", "--repeats", "1", "--size", "64", "--plot", str(plot)])
    )
    first, second = result["rows"]
    assert (first["minutes"], second["minutes"]) == (1, 2)
    assert first["memory_bytes"] == second["memory_bytes"] > 0
    # one token a frame; keys and values of every layer in float32
    assert second["attention_bytes"] == 2 * first["attention_bytes"]
    assert first["attention_bytes"] % (60 * 2 * 4) == 0
    for row in result["rows"]:
        assert row["question_s"] > 0
        assert row["attention_question_s"] > 0
        assert row["watch_peak_bytes"] > 0
    assert result["question_ratio"] == second["question_s"] / first["question_s"]
    assert result["overlap"]["watch_s"] > 0
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_no_picture_is_drawn_unless_asked_for(monkeypatch):
    row = {"minutes": 1, "question_s": 1.0, "attention_question_s": 1.0}
    for name, found in (("_ask", [row]), ("_video", "1.mp4"), ("in_measured_process", 1), ("_overlap", {})):
        monkeypatch.setattr(memory_of_video, name, lambda *arguments, found=found: found)
    monkeypatch.setattr(memory_of_video, "_plot", None)
    parser = argparse.ArgumentParser()
    memory_of_video.add_arguments(parser)
    assert memory_of_video.run(parser.parse_args(["--minutes", "1"]))["rows"] == [row]
