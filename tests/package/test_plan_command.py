"""`video-ma2mba plan`: truthful about what fits, plain about what it was asked wrongly."""

import argparse
import json
import subprocess
import sys

import pytest

from video_ma2mba import VideoMa2mbaConfig
from video_ma2mba.cli import main
from video_ma2mba.cli.plan import parse_bytes
from video_ma2mba.fitting import RESERVED_BYTES, largest
from video_ma2mba.modeling.checkpoint_plan import plan_checkpoints

ASK = ["plan", "--model", "0.7b", "--hours", "0.1", "--gpu-memory", "80GiB"]


def answer(capsys, *arguments):
    assert main([*arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


@pytest.mark.parametrize(
    ("text", "num_bytes"),
    [("80GiB", 80 * 2**30), ("80GB", 80 * 10**9), ("512 MiB", 2**29), ("1.5g", 15 * 10**8), ("1024", 1024)],
)
def test_sizes(text, num_bytes):
    assert parse_bytes(text) == num_bytes


@pytest.mark.parametrize("text", ["", "many", "-3GiB", "0", "3 bananas"])
def test_what_is_not_a_size(text):
    with pytest.raises(argparse.ArgumentTypeError, match="80GiB"):
        parse_bytes(text)


@pytest.mark.parametrize("threshold", [0, 1, 2, 3, 100, 1000])
def test_largest_is_found_to_half_a_percent(threshold):
    found = largest(lambda n: n <= threshold, 1000)
    assert found <= threshold
    assert threshold - found <= max(0, threshold // 100)


def test_parts_add_up_and_follow_from_the_parameters(capsys):
    report = answer(capsys, *ASK)
    (row,) = report["rows"]
    assert (report["frames"], report["tokens"]) == (360, 360 * 144)
    parts = ("weights", "gradients", "optimizer", "pixels", "activations")
    assert row["total_bytes"] == sum(row[f"{part}_bytes"] for part in parts) + RESERVED_BYTES
    parameters = row["weights_bytes"] / 2
    assert parameters == pytest.approx(0.66e9, rel=0.01)
    assert row["optimizer_bytes"] == 4 * parameters
    assert 2 * parameters < row["gradients_bytes"] < 4 * parameters  # the layers' are summed in float32
    assert row["pixels_bytes"] == 360 * 3 * 336 * 336
    assert row["fits"]


def test_a_gradient_horizon_makes_the_length_cheap(capsys):
    (whole,) = answer(capsys, *ASK)["rows"]
    (row,) = answer(capsys, *ASK, "--gradient-horizon", "8192")["rows"]
    assert row["activations_bytes"] < whole["activations_bytes"]
    tokens = 360 * 144
    assert row["recompute_factor"] == pytest.approx((tokens - 8192 + 4 * 8192) / tokens / 3)
    assert f"the first {tokens - 8192} tokens" in row["plan"]
    assert main([*ASK, "--gradient-horizon", "0"]) != 0


def test_activations_are_those_of_the_planner(capsys):
    (row,) = answer(capsys, *ASK, "--optimizer", "none", "--offload")["rows"]
    config = VideoMa2mbaConfig.from_preset("0.7b")
    fixed = row["weights_bytes"] + row["gradients_bytes"] + row["pixels_bytes"]
    plan = plan_checkpoints(
        config, 1, 51840, num_frames=360, offload=True, memory_budget_bytes=80 * 2**30 - RESERVED_BYTES - fixed
    )
    assert (row["activations_bytes"], row["host_bytes"]) == (plan.predicted_peak_bytes, plan.predicted_host_bytes)


def test_says_no_where_it_does_not_fit_and_how_long_would(capsys):
    report = answer(capsys, "plan", "--model", "0.7b", "--hours", "2", "--gpu-memory", "16GiB", "--compare")
    rows = {row["method"]: row for row in report["rows"]}
    assert not rows["off"]["fits"]
    longest = [rows[name]["longest_frames"] for name in ("off", "per layer", "sqrt", "sequence_major + offload")]
    assert longest == sorted(longest)
    assert longest[0] < 7200 < longest[-1]
    for row in rows.values():
        assert row["fits"] == (row["total_bytes"] <= report["gpu_bytes"])
    again = answer(
        capsys, "plan", "--model", "0.7b", "--frames", str(longest[-1]), "--gpu-memory", "16GiB", "--offload"
    )
    assert again["rows"][0]["fits"]


def test_kernels_keep_more(capsys):
    (torch,), (kernels,) = (answer(capsys, *ASK, "--scan-backend", name)["rows"] for name in ("torch", "mamba_ssm"))
    assert torch["total_bytes"] - torch["activations_bytes"] == kernels["total_bytes"] - kernels["activations_bytes"]
    assert kernels["longest_frames"] < torch["longest_frames"]


def test_lora_trains_little(capsys):
    (row,) = answer(capsys, *ASK, "--optimizer", "lora")["rows"]
    assert row["gradients_bytes"] + row["optimizer_bytes"] < 0.1 * row["weights_bytes"]


def test_table(capsys):
    assert main(ASK) == 0
    out = capsys.readouterr().out
    assert "activations" in out
    assert "yes" in out
    assert "of activations" in out.splitlines()[-1]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--hours", "-1"], "--hours"),
        (["--hours", "nan"], "--hours"),
        (["--fps", "0"], "--fps"),
        (["--batch", "0"], "--batch"),
        (["--model", "no/such/folder"], "no/such/folder"),
        (["--hours", "1e6"], "tokens are more than"),
    ],
)
def test_bad_input(capsys, change, message):
    assert main([*ASK, *change]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ")
    assert message in captured.err


def test_tokens_of_a_model_in_a_folder(capsys, model_folder):
    report = answer(capsys, "plan", "--model", model_folder, "--tokens", "1001", "--gpu-memory", "80GiB")
    assert (report["tokens"], report["frames"]) == (1001, 1001)  # one token a frame


def test_a_reader_that_has_seen_enough_is_no_error():
    command = [sys.executable, "-m", "video_ma2mba.cli", *ASK, "--json"]
    asked = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    asked.stdout.close()
    assert "Traceback" not in asked.stderr.read()
    assert asked.wait() == 0
