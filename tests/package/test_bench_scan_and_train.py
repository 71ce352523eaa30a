"""`bench scan`, `bench train` and the measuring half of `bench memory`, at a tiny size on the CPU."""

import json

import pytest
import torch

from video_ma2mba import VideoMa2mbaConfig
from video_ma2mba.benchmark import resident, scan, train
from video_ma2mba.benchmark.machine import Clocked, allocated_peak_bytes, in_measured_process, resident_peak_bytes
from video_ma2mba.cli import main

from ..forked import run_measured

SCAN = ["scan", "--sizes", "tiny", "--tokens", "70", "--their-chunks", "16", "--repeats", "1"]


def run(capsys, *arguments):
    assert main(["bench", *arguments]) == 0
    return json.loads(capsys.readouterr().out)


def test_scan_gives_what_transformers_gives(capsys):
    report = run(capsys, *SCAN, "--dtypes", "float32", "--threads", "1")
    rows = {(row["row"], row["pass"]): row for row in report["rows"]}
    both = ("forward", "forward_backward")
    assert set(rows) == {*((row, one) for row in ("scan", "block", "model") for one in both), ("decode", "forward")}
    assert set(rows["scan", "forward_backward"]["largest_difference"]) == {
        "y", "final_state", "grad_x", "grad_dt", "grad_A", "grad_B", "grad_C", "grad_D", "grad_state"
    }  # fmt: skip
    assert set(rows["model", "forward_backward"]["largest_difference"]) == {"out", "grad_hidden_states"}
    for (name, _), row in rows.items():
        assert max(row["largest_difference"].values()) < 1e-4, name
        assert row["tokens"] == (1 if name == "decode" else 70)
        for side in ("ours", "transformers"):
            assert len(row[side]["times_s"]) == 1
            assert row[side]["peak_bytes"] > (70 * 16 * 4 if name != "decode" else 16 * 4)  # the stream alone
            assert row[side]["resident_peak_bytes"] >= 0
    assert rows["decode", "forward"]["over_floor"] > 0
    assert "over_floor" not in rows["block", "forward"]


def test_theirs_is_taken_at_its_best_chunk(monkeypatch):
    pair = scan.Pair(lambda: 32, {}, [], [])
    pair.theirs = {chunk: (lambda chunk=chunk: chunk) for chunk in (16, 32, 64)}
    seconds = {16: 3.0, 32: 1.0, 64: 2.0}
    monkeypatch.setattr(scan, "_forward", lambda pair, function: function())
    monkeypatch.setattr(scan, "clock", lambda step, device: Clocked(0.1, seconds.get(step(), 1.0), None))
    monkeypatch.setattr(scan, "_peaks", lambda step, device: {"peak_bytes": 1})
    monkeypatch.setattr(scan, "_differences", lambda *results: {})
    assert scan.measure(pair, "forward", 1, "cpu")["their_chunk"] == 32


def test_two_that_know_nothing_of_each_other_agree_on_a_peak():
    size = 64 * 2**20

    def work():
        torch.ones(size // 4).add_(torch.ones(size // 8).sum())

    assert allocated_peak_bytes(work) == pytest.approx(1.5 * size, rel=0.05)
    assert resident_peak_bytes(work) == pytest.approx(1.5 * size, rel=0.1)


def test_train_compares_methods_with_off(capsys):
    methods = ["--methods", "off", "sequence_major", "--repeats", "1"]
    report = run(capsys, "train", "--lengths", "600", *methods)
    off, ours = report["rows"]
    assert (off["method"], ours["method"]) == ("off", "sequence_major")
    assert off["ratio_to_off"] == 1
    assert ours["ratio_to_off"] == pytest.approx(off["step_s"] / ours["step_s"])
    assert ours["plan"].startswith("sequence_major")
    assert ours["planned_activations_bytes"] < off["planned_activations_bytes"]
    gradients = off["planned_bytes"] - off["planned_activations_bytes"]
    assert ours["planned_bytes"] - ours["planned_activations_bytes"] == gradients > 4 * 10**6  # float32
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
    assert (off["tokens"], off["method"], off["out_of_memory"]) == (64, "off", True)
    assert "tokens_per_s" not in off
    assert ours["tokens_per_s"] > 0
    assert "ratio_to_off" not in ours


def test_memory_that_is_measured_comes_with_the_same_losses(capsys, monkeypatch):
    monkeypatch.setattr(resident, "in_measured_process", run_measured)
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
        (["scan", "--tokens", "0"], "--tokens: must be a whole number from 1"),
        (["scan", "--their-chunks", "64", "0"], "--their-chunks: must be a whole number from 1"),
        (["train", "--repeats", "0"], "--repeats: must be a whole"),
        (["memory", "--lengths", "0"], "--lengths: must be a whole number from 1"),
        (["memory-of-video", "--repeats", "0"], "--repeats: must be a whole"),
        (["study", "fps", "--scale", "2"], "--scale: must be a number from 1e-09 to 1,"),
    ],
)
def test_nonsense_is_refused(capsys, arguments, message):
    assert main(["bench", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_a_function_that_allocates_nothing_is_not_measured():
    with pytest.raises(RuntimeError, match="reports no allocations"):
        allocated_peak_bytes(lambda: None)


def test_a_measured_process_that_fails_says_why():
    with pytest.raises(OSError, match=r"(?s)^json\.tool no\.json failed:\n.*No such file or directory"):
        in_measured_process("json.tool", "no.json")
