"""`video-ma2mba plan`: truthful about what fits, plain about what it was asked wrongly."""

import argparse
import json

import pytest

from video_ma2mba import VideoMa2mbaConfig
from video_ma2mba.cli import EXIT_UNREAD, main
from video_ma2mba.cli import plan as plan_command
from video_ma2mba.cli.parser import parse_bytes
from video_ma2mba.modeling.checkpoint_plan import format_bytes, plan_checkpoints
from video_ma2mba.planning.fitting import FRAGMENTATION, RESERVED_BYTES, largest

from ..forked import WELL, run

ASK = ["plan", "--model", "0.7b", "--hours", "0.1", "--gpu-memory", "80GiB"]


def answer(capsys, *arguments):
    """The report; the exit code says whether any of its rows fits."""
    code = main([*arguments, "--json"])
    report = json.loads(capsys.readouterr().out)
    assert code == (0 if any(row["fits"] for row in report["rows"]) else 1)
    return report


@pytest.mark.parametrize(
    ("text", "num_bytes"),
    [
        ("80GiB", 80 * 2**30),
        ("80GB", 80 * 10**9),
        ("512 MiB", 2**29),
        ("1.5g", 15 * 10**8),
        ("85899345920", 80 * 2**30),
    ],
)
def test_sizes(text, num_bytes):
    assert parse_bytes(text) == num_bytes


@pytest.mark.parametrize("text", ["", "many", "-3GiB", "0", "3 bananas", "0.0000000001KB", f"{'9' * 400}GiB"])
def test_what_is_not_a_size(text):
    with pytest.raises(argparse.ArgumentTypeError, match=r"no size that a memory has|80GiB"):
        parse_bytes(text)


@pytest.mark.parametrize("text", ["24", "1024", "0.5"])
def test_a_size_without_a_unit_is_asked_back(capsys, text):
    assert main(["plan", "--model", "0.7b", "--hours", "1", "--gpu-memory", text]) == 2
    assert f"'{text}' has no unit: for gigabytes write {text}GiB" in capsys.readouterr().err


@pytest.mark.parametrize("threshold", [0, 1, 2, 3, 100, 1000])
def test_largest_is_found_to_half_a_percent(threshold):
    found = largest(lambda n: n <= threshold, 1000)
    assert found <= threshold
    assert threshold - found <= max(0, threshold // 100)


def test_parts_add_up_and_follow_from_the_parameters(capsys):
    report = answer(capsys, *ASK)
    (row,) = report["rows"]
    assert (report["frames"], report["tokens"]) == (360, 360 * 144)
    parts = ("weights", "gradients", "optimizer", "buffers", "pixels", "activations", "fragmentation")
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
    budget = (80 * 2**30 - RESERVED_BYTES - fixed) / (1 + FRAGMENTATION)
    plan = plan_checkpoints(config, 1, 51840, num_frames=360, offload=True, memory_budget_bytes=budget)
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
    rest = [row["total_bytes"] - row["activations_bytes"] - row["fragmentation_bytes"] for row in (torch, kernels)]
    assert rest[0] == rest[1]
    assert kernels["longest_frames"] < torch["longest_frames"]


def test_lora_trains_little(capsys):
    (row,) = answer(capsys, *ASK, "--optimizer", "lora")["rows"]
    assert row["gradients_bytes"] + row["optimizer_bytes"] < 0.1 * row["weights_bytes"]


def test_summing_in_float32_is_told(capsys):
    (row,) = answer(capsys, *ASK)["rows"]
    (off,) = (row for row in answer(capsys, *ASK, "--compare")["rows"] if row["method"] == "off")
    assert row["float32_sums_bytes"] == row["gradients_bytes"] - off["gradients_bytes"] > 0
    assert off["float32_sums_bytes"] == 0
    (wide,) = answer(capsys, *ASK, "--dtype", "float32")["rows"]
    assert wide["float32_sums_bytes"] == 0  # they are what is handed on
    assert main(ASK) == 0
    said = f"of the gradients, {format_bytes(row['float32_sums_bytes'])} are for summing them in float32"
    assert said in capsys.readouterr().out


def test_accumulated_gradients_stand_beside_the_new_ones(capsys):
    (once,), (often,), (more,) = (answer(capsys, *ASK, "--accumulation", n)["rows"] for n in ("1", "2", "64"))
    weights = once["weights_bytes"]
    assert once["gradients_bytes"] == pytest.approx(weights + once["float32_sums_bytes"], rel=1e-4)
    # of the rest, what stands is added to as it comes
    assert often["gradients_bytes"] == pytest.approx(weights + 2 * once["float32_sums_bytes"], rel=1e-4)
    assert more == often


@pytest.mark.parametrize(
    ("engine", "weights", "optimizer", "buffers"),
    [
        ("ddp", 1, 2, 1),
        ("zero1", 1, 3 / 4, 1),
        ("zero2", 1, 3 / 4, 1),
        ("zero3", 1.25, 3 / 4, 0),
        ("fsdp2", 1.25, 2 / 4, 0),
    ],
)
def test_engines_share_what_they_share(capsys, engine, weights, optimizer, buffers):
    """Of float32 weights, over four devices; docs/planning.md has what was counted under each."""
    ask = [*ASK, "--dtype", "float32"]
    (alone,) = answer(capsys, *ask)["rows"]
    (row,) = answer(capsys, *ask, "--engine", engine, "--devices", "4")["rows"]
    size = alone["gradients_bytes"]
    casts = alone["weights_bytes"] - size
    assert row["weights_bytes"] - casts == pytest.approx(weights * size)
    assert row["gradients_bytes"] == size
    assert row["optimizer_bytes"] == pytest.approx(optimizer * size)
    assert row["buffers_bytes"] == pytest.approx(buffers * size, abs=0.01 * size)


def test_four_bits(capsys):
    lora, qlora = (answer(capsys, *ASK, "--optimizer", name)["rows"][0] for name in ("lora", "qlora"))
    assert 0.28 < qlora["weights_bytes"] / lora["weights_bytes"] < 0.45  # the embeddings stay as they are
    assert qlora["gradients_bytes"] == lora["gradients_bytes"]
    assert qlora["longest_frames"] > lora["longest_frames"]


def test_watching_takes_the_same_for_any_length(capsys):
    short, long = (answer(capsys, *ASK, "--hours", hours, "--inference")["rows"][0] for hours in ("0.1", "100"))
    assert short["activations_bytes"] == long["activations_bytes"]
    assert long["fits"]
    assert long["longest_is_bound"]
    assert short["optimizer_bytes"] == short["gradients_bytes"] == short["pixels_bytes"] == 0
    (small,) = answer(capsys, *ASK, "--inference", "--dtype", "nf4")["rows"]
    assert small["total_bytes"] < long["total_bytes"]
    assert main([*ASK, "--inference"]) == 0
    assert "any length" in capsys.readouterr().out


def test_what_does_not_fit_comes_with_what_would(capsys):
    ask = ["plan", "--model", "0.7b", "--hours", "2", "--gpu-memory", "12GiB"]
    report = answer(capsys, *ask)
    (row,) = report["rows"]
    assert not row["fits"]
    assert row["plan"] is None
    remedies = {one["method"]: one for one in report["remedies"]}
    assert any("--offload" in name for name in remedies)
    for word in ("lora", "--sequence-parallel", "--fps", "--hours"):
        assert any(word in name for name in remedies), word
    for one in remedies.values():
        assert one["fits"]
        assert one["total_bytes"] <= report["gpu_bytes"]
        assert one["longest_frames"] > 0
    slower, shorter = (next(one.split() for one in remedies if word in one) for word in ("--fps", "--hours"))
    assert answer(capsys, *ask, *slower)["rows"][0]["fits"]
    assert answer(capsys, *ask[:3], *shorter, *ask[-2:])["rows"][0]["fits"]
    assert main(ask) == 1
    out = capsys.readouterr().out
    assert "no plan fits" in out
    assert "cells of" not in out
    assert all(name in out for name in remedies)


def test_where_nothing_helps(capsys):
    ask = ["plan", "--model", "0.7b", "--hours", "2", "--gpu-memory", "2GiB"]
    assert main(ask) == 1
    assert "nothing fits, whatever the options" in capsys.readouterr().out


def test_the_gpu_at_hand_is_the_default(capsys, monkeypatch):
    ask = ASK[:-2]
    monkeypatch.setattr(plan_command, "gpu_at_hand_bytes", lambda: 80 * 2**30)
    assert answer(capsys, *ask) == answer(capsys, *ASK)
    monkeypatch.setattr(plan_command, "gpu_at_hand_bytes", lambda: None)
    assert main(ask) == 2
    assert "no GPU here: say with --gpu-memory" in capsys.readouterr().err


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
        (["--accumulation", "0"], "--accumulation"),
        (["--engine", "zero1"], "--devices"),
        (["--devices", "3", "--sequence-parallel", "2"], "does not divide"),
        (["--inference", "--optimizer", "lora"], "--optimizer is of training"),
        (["--inference", "--sequence-parallel", "2"], "--sequence-parallel is of training"),
        (["--dtype", "nf4"], "--optimizer qlora"),
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


@pytest.mark.parametrize("more", [["--json"], []], ids=["json", "table"])
def test_a_reader_that_has_seen_enough_is_told_from_no_fit(more):
    gone = "import os; end, begin = os.pipe(); os.close(end); os.dup2(begin, 1)"
    codes, _, err = run(f"{gone}\n{WELL}", [*ASK, *more])
    assert codes == [EXIT_UNREAD]
    assert "Traceback" not in err
