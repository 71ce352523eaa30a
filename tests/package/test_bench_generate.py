"""`bench backends` and `bench generate`: what they print is what is there."""

import json

import numpy as np
import pytest

from video_ma2mba.benchmark import generate
from video_ma2mba.benchmark.machine import timing
from video_ma2mba.cli import main


def run(capsys, *arguments):
    assert main(["bench", *arguments]) == 0
    return json.loads(capsys.readouterr().out)


def test_backends_says_what_runs_here_and_why_not(capsys):
    report = run(capsys, "backends", "--device", "cpu", "--model", "0.7b")
    assert report["usable"]["scan"] == {
        "torch": "yes", "mamba_ssm": "the tensors are on the device 'cpu', not on a CUDA device"
    }  # fmt: skip
    assert report["usable"]["convolution"]["torch"] == "yes"
    assert report["chosen"].startswith("scan on torch, convolution on torch (mamba_ssm not used: ")
    assert report["tokens_per_call"] == 32768


def test_generate_measures_every_context(capsys):
    report = run(capsys, "generate", "--contexts", "20", "70", "--new-tokens", "2", "--frames", "1")
    assert [row["context_tokens"] for row in report["rows"]] == [20, 70]
    for row in report["rows"]:
        assert row["prefill_tokens_per_s"] == pytest.approx(row["context_tokens"] / row["prefill_s"])
        assert row["s_per_new_token"] > 0
    # the whole memory of the model, whatever the length
    assert report["rows"][0]["cache_bytes"] == report["rows"][1]["cache_bytes"] > 0
    assert report["frames_per_s"] > 0


@pytest.mark.parametrize("count", [1, 2, 5, 24])
def test_how_far_repeated_runs_are_apart(count):
    seconds = np.random.default_rng(count).uniform(size=count).tolist()
    nearest = np.quantile(seconds, [0.2, 0.8], method="nearest")
    found = timing("step_s", seconds)
    assert (found["step_s_p20"], found["step_s_p80"]) == tuple(nearest)
    assert found["step_s"] == np.median(seconds)


def test_generate_refuses_nonsense(capsys):
    assert main(["bench", "generate", "--contexts", "0"]) != 0
    assert "--contexts: must be a whole number from 1" in capsys.readouterr().err
    if not generate.torch.cuda.is_available():
        assert main(["bench", "generate", "--device", "cuda"]) != 0
        assert "use --device cpu" in capsys.readouterr().err
