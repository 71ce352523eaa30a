"""The benchmark runs and says what it measured; how fast it was is for a quiet machine to tell."""

import argparse
import json
from pathlib import Path

import pytest

from video_ma2mba.benchmark import decode


def test_bench_decode():
    parser = argparse.ArgumentParser()
    decode.add_arguments(parser)
    result = decode.run(parser.parse_args(["--minutes", "0.1", "--repeats", "1", "--side", "32"]))
    assert json.loads(json.dumps(result)) == result
    assert result["sequential"]["frames"] == result["dense_keyframes"]["frames"] == 6
    assert result["sequential"]["ratio"] == result["sequential"]["ours_s"] / result["sequential"]["bare_loop_s"]
    assert result["short_clips"]["frames"] == 100
    assert result["short_clips"]["ratio"] == result["short_clips"]["ours_s"] / result["short_clips"]["bare_loop_s"]
    memory = result["memory"]
    if not Path("/proc/self/status").exists():  # where peak memory is read from
        assert memory is None
        return
    assert memory["short_clip"]["frames"] == 6
    assert memory["long_clip"]["frames"] == 36
    assert memory["long_clip"]["kept_bytes"] == 36 * 32 * 32 * 3
    assert memory["short_clip"]["peak_bytes"] > 1 << 20


def test_readers_that_differ_are_no_comparison(monkeypatch):
    monkeypatch.setattr(decode, "_bare_loop", lambda path, side: 5)
    parser = argparse.ArgumentParser()
    decode.add_arguments(parser)
    with pytest.raises(RuntimeError, match="different numbers of frames"):
        decode.run(parser.parse_args(["--minutes", "0.1", "--repeats", "1", "--side", "32"]))
