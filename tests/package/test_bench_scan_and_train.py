"""`bench scan`, `bench train` and the measuring half of `bench memory`, at a tiny size on the CPU."""

import json

import pytest
import torch

from video_ma2mba import VideoMa2mbaConfig
from video_ma2mba.benchmark import train
from video_ma2mba.benchmark.machine import allocated_peak_bytes
from video_ma2mba.cli import main
from video_ma2mba.memory import in_measured_process

SCAN = ["scan", "--tokens", "70", "--heads", "2", "--head-dim", "8", "--state", "8", "--their-chunk", "16"]


def run(capsys, *arguments):
    assert main(["bench", *arguments]) == 0
    return json.loads(capsys.readouterr().out)


@pytest.mark.parametrize("threads", [[], ["--threads", "1"]])
def test_scan_gives_what_transformers_gives(capsys, threads):
    report = run(capsys, *SCAN, "--repeats", "1", *threads)
    assert set(report["largest_difference"]) == {
        "y", "final_state", "grad_x", "grad_dt", "grad_A", "grad_B", "grad_C", "grad_D", "grad_state"
    }  # fmt: skip
    assert max(report["largest_difference"].values()) < 1e-4
    assert report["shape"]["tokens"] == 70
    for name in ("ours", "transformers"):
        assert report[name]["peak_bytes"] > 70 * 2 * 8 * 4  # x alone, of which the gradient is one
        assert len(report[name]["times_s"]) == 1


def test_train_compares_methods_with_off(capsys):
    methods = ["--methods", "off", "sequence_major", "--repeats", "1"]
    report = run(capsys, "train", "--lengths", "600", *methods)
    off, ours = report["rows"]
    assert (off["method"], ours["method"]) == ("off", "sequence_major")
    assert off["ratio_to_off"] == 1
    assert ours["ratio_to_off"] == pytest.approx(off["step_s"] / ours["step_s"])
    assert ours["plan"].startswith("sequence_major")
    assert "plan" not in off
    assert train.backbone_config("0.7b").to_dict() == VideoMa2mbaConfig.from_preset("0.7b").to_dict()
    once = run(capsys, "train", "--lengths", "64", "--methods", "per layer", "--repeats", "1", "--once")
    assert "ratio_to_off" not in once["rows"][0]


def test_a_method_that_runs_out_of_memory_is_left_out_and_the_others_go_on(capsys, monkeypatch):
    step = train.training_step

    def small(model, *batch):
        if not model.is_checkpointing():
            raise torch.cuda.OutOfMemoryError("tried to allocate too much")
        return step(model, *batch)

    monkeypatch.setattr(train, "training_step", small)
    report = run(capsys, "train", "--lengths", "64", "--methods", "off", "per layer", "--repeats", "1")
    off, ours = report["rows"]
    assert off == {"tokens": 64, "method": "off", "out_of_memory": True}
    assert ours["tokens_per_s"] > 0
    assert "ratio_to_off" not in ours


def test_memory_that_is_measured_comes_with_the_same_losses(capsys):
    report = run(capsys, "memory", "--device", "cpu", "--lengths", "1024")
    off, ours = report["rows"]
    assert (off["method"], ours["method"], ours["tokens"]) == ("off", "MA-GC", 1024)
    assert off["plan"] is None
    assert len(ours["losses"]) == 3
    assert ours["losses"][0] == pytest.approx(off["losses"][0], abs=1e-3)
    assert ours["largest_loss_difference"] < 0.01
    assert ours["predicted_activations_bytes"] < off["predicted_activations_bytes"]
    assert ours["part_of_off"] == ours["measured_bytes"] / off["measured_bytes"] > 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["scan", "--tokens", "0"], "--tokens must be at least 1"),
        (["scan", "--their-chunk", "0"], "--their-chunk must be at least 1"),
        (["train", "--repeats", "0"], "must be at least 1"),
        (["memory", "--lengths", "0"], "--lengths must be at least 1"),
        (["memory-of-video", "--repeats", "0"], "must be at least 1"),
        (["study", "fps", "--scale", "2"], "--scale must lie between 0 and 1"),
    ],
)
def test_nonsense_is_refused(capsys, arguments, message):
    assert main(["bench", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_a_function_that_allocates_nothing_is_not_measured():
    with pytest.raises(RuntimeError, match="reports no allocations"):
        allocated_peak_bytes(lambda: None)


def test_a_measured_process_that_fails_says_why():
    with pytest.raises(OSError, match=r"benchmark\.resident cpu many off failed:\n"):
        in_measured_process("video_ma2mba.benchmark.resident", "cpu", "many", "off")
