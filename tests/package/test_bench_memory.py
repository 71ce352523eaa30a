"""`bench memory`: the count is exact, the stand-in is true to what it stands for, and the kept results hold."""

import argparse
import json
from pathlib import Path

import pytest
import torch

from video_ma2mba.benchmark import memory
from video_ma2mba.benchmark.counting import LiveBytes
from video_ma2mba.modeling.checkpoint_plan import CheckpointPlan, peak_bytes_without
from video_ma2mba.modeling.configuration_video_ma2mba import PRESETS, VideoMa2mbaConfig

from ..tiny import tiny_config

COUNTED = Path(__file__).resolve().parents[2] / "examples" / "memory" / "counted.json"
GIB = 2**30


def small_config():
    return tiny_config(text={"hidden_size": 128, "head_dim": 64, "state_size": 32, "vocab_size": 64})


# --- counting ---


def test_counts_storages_and_not_views():
    with LiveBytes() as counter:
        one = torch.empty(1000, dtype=torch.float32, device="meta")
        view = one[10:].view(-1, 2)
        two = one * 2
        torch.empty(10, device="cpu")
        assert counter.live["device"] == 8000
        del one, two
        assert counter.live["device"] == 4000  # the view holds it
        del view
        norm = torch.empty(2, 5, device="meta"), [5], torch.empty(2, 1, device="meta"), torch.empty(5, device="meta")
        x, shape, statistic, weight = norm
        # of an operation with several results, those that there are
        results = torch.ops.aten.native_layer_norm_backward(
            x, x, shape, statistic, statistic, weight, weight, [True, False, False]
        )
        assert counter.live["device"] == 4 * (2 * 5 + 2 + 5 + 2 * 5)
        del norm, x, statistic, weight, results
    assert counter.live["device"] == 0
    assert counter.peak["device"] == 8000


def test_counts_host_and_gradients_apart():
    with LiveBytes() as counter:
        with counter.placing("host"):
            kept = torch.empty(100, device="meta")
        grad = torch.empty(50, device="meta")
        counter.count_as(grad, "gradients")
        cast = grad.to(torch.bfloat16)
        assert counter.live == {"device": 0, "host": 400, "gradients": 300, "weights": 0}
        del kept, grad, cast
    assert set(counter.live.values()) == {0}


PLANS = [
    CheckpointPlan("sequence_major", 2, 700, True), CheckpointPlan("layer_major", 1, 1024, False),
    CheckpointPlan("sequence_major", 1, 512, False), CheckpointPlan("layer_major", 2, 300, True), None,
]  # fmt: skip


@pytest.mark.parametrize(
    "plan", PLANS, ids=lambda plan: plan and f"{plan.order}-{plan.layer_interval}-{plan.sequence_interval}"
)
def test_the_stand_in_counts_what_the_real_thing_counts(plan):
    real, standing = (memory.count(small_config(), plan, 1500, stand_in=stand_in) for stand_in in (False, True))
    for kind, peak in real.peak.items():
        assert standing.peak[kind] == pytest.approx(peak, rel=0.02), kind


def test_gradients_are_summed_in_float32():
    counter = memory.count(small_config(), PLANS[0], 2000)
    assert counter.peak["gradients"] == pytest.approx(2 * counter.peak["weights"], rel=0.2)


# --- the command ---


@pytest.fixture
def parse(monkeypatch):
    monkeypatch.setattr(VideoMa2mbaConfig, "from_preset", lambda name: small_config())
    monkeypatch.setattr(memory, "HOST_BUDGET_BYTES", GIB)
    parser = argparse.ArgumentParser()
    memory.add_arguments(parser)
    parser.add_argument("-o", dest="output", type=Path)
    return parser.parse_args


def test_bench_writes_rows_as_they_come_and_goes_on(parse, tmp_path, monkeypatch):
    path, plot = tmp_path / "counted.json", tmp_path / "counted.png"
    methods = ["--models", "0.7b", "--methods", "off", "sequence_major + offload"]
    memory.run(parse([*methods, "--lengths", "1024", "-o", str(path)]))
    first = json.loads(path.read_text())["rows"]
    assert [(row["method"], row["tokens"]) for row in first] == [("off", 1024), ("sequence_major + offload", 1024)]

    counted = []
    count_row = memory.count_row
    monkeypatch.setattr(memory, "count_row", lambda *cell: counted.append(cell) or count_row(*cell))
    arguments = [*methods, "--lengths", "1024", "2048", "-o", str(path), "--resume", "--plot", str(plot)]
    result = memory.run(parse(arguments))
    assert [cell[2] for cell in counted] == [2048, 2048]
    assert len(result["rows"]) == 4
    assert result["rows"][0] == first[0]
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_bench_without_a_file(parse):
    (row,) = memory.run(parse(["--models", "0.7b", "--methods", "off", "--lengths", "1024"]))["rows"]
    assert row["device_bytes"] > 0


def test_bench_refuses(parse):
    with pytest.raises(ValueError, match="--resume"):
        memory.run(parse(["--resume"]))


# --- the results that are kept ---


@pytest.fixture(scope="module")
def rows():
    return {(row["model"], row["method"], row["tokens"]): row for row in json.loads(COUNTED.read_text())["rows"]}


def of_the_largest(rows, method, first, last):
    """Device bytes by log2 of the length; every length must be there."""
    return {n: rows["3.1b", method, 2**n] for n in range(first, last + 1)}


def test_kept_predictions_are_within_ten_percent(rows):
    for row in rows.values():
        assert row["predicted_device_bytes"] == pytest.approx(row["device_bytes"], rel=0.1)
        assert row["predicted_host_bytes"] == pytest.approx(row["host_bytes"], rel=0.1)


@pytest.mark.parametrize("model", PRESETS)
def test_kept_counts_are_those_of_todays_planner(rows, model):
    config = VideoMa2mbaConfig.from_preset(model)
    budget_bytes = memory.PAPER_GB[model]["MA-GC"][6] * 1e9
    for (name, method, num_tokens), row in rows.items():
        if name != model:
            continue
        plan = memory.choose_plan(config, method, num_tokens, budget_bytes)
        batch = {"num_supervised_tokens": min(num_tokens, memory.NUM_SUPERVISED)}
        peak = plan.predicted_peak_bytes if plan else peak_bytes_without(config, 1, num_tokens, **batch)
        assert peak == pytest.approx(row["device_bytes"], rel=0.1)


def test_with_offload_memory_does_not_grow(rows):
    kept = of_the_largest(rows, "sequence_major + offload", 14, 21)
    for row in kept.values():
        assert row["compute_units"] == pytest.approx(4)
        assert row["device_bytes"] <= 10 * GIB
        assert row["host_bytes"] <= 128 * GIB
    assert kept[21]["device_bytes"] < 1.05 * kept[17]["device_bytes"]


def test_without_offload_never_above_the_paper(rows):
    published = dict(enumerate(memory.PAPER_GB["3.1b"]["MA-GC"], start=10))
    for n, row in of_the_largest(rows, "layer_major", 15, 19).items():
        assert row["compute_units"] == pytest.approx(4)
        assert row["device_bytes"] <= published[n] * 1e9
    for n, row in of_the_largest(rows, "sequence_major, two recomputes", 15, 19).items():
        assert row["compute_units"] <= 5
        assert row["device_bytes"] <= published[n] * 1e9 / 2
