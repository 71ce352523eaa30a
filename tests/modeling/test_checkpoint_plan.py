"""The planner: equal to brute force, true to what is counted, clear about what it refuses."""

import dataclasses
import itertools
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from video_ma2mba import modeling
from video_ma2mba.benchmark.counting import LiveBytes, counting
from video_ma2mba.benchmark.machine import allocated_peak_bytes
from video_ma2mba.benchmark.memory import PAPER_GB, choose_plan, count
from video_ma2mba.modeling import checkpoint_costs
from video_ma2mba.modeling.checkpoint_costs import FLOPS_PER_S, LAUNCH_S, LAUNCHES, Costs
from video_ma2mba.modeling.checkpoint_plan import (
    CheckpointPlan,
    InfeasibleMemoryBudget,
    format_bytes,
    peak_bytes_without,
    plan_checkpoints,
    plan_of,
    smallest_intervals,
    watching_bytes,
)
from video_ma2mba.modeling.configuration_video_ma2mba import PRESETS, VideoMa2mbaConfig
from video_ma2mba.modeling.mamba2 import Mamba2Backbone
from video_ma2mba.modeling.modeling_video_ma2mba import VideoMa2mbaForConditionalGeneration
from video_ma2mba.planning.fitting import Sizes, Training

from ..tiny import tiny_config

MIB, GIB = 2**20, 2**30
KEPT = 512  # supervised tokens, as `count` has them


def config_of(layers=6, hidden=256, chunk_size=64, **text):
    sizes = {"hidden_size": hidden, "head_dim": 64, "num_heads": 2 * hidden // 64, "state_size": 64, "vocab_size": 512}
    return tiny_config(text={**sizes, "num_hidden_layers": layers, "chunk_size": chunk_size, **text})


SMALL, LARGE = config_of(), VideoMa2mbaConfig.from_preset("3.1b")


def predict_plan(config, batch_size, num_tokens, order, layer_interval, sequence_interval, offload=False, **batch):
    """The plan that is asked for, with its costs."""
    costs = Costs(config, batch_size, num_tokens, **batch)
    return plan_of(costs, order, layer_interval, min(sequence_interval, num_tokens), offload)


# --- against brute force ---


def brute_force(config, batch_size, num_tokens, offload=False, orders=("layer_major", "sequence_major"), **budgets):
    """The rank of the best of all plans."""
    costs = Costs(config, batch_size, num_tokens)
    chunks = {min(s, num_tokens) for s in range(config.text_config.chunk_size, num_tokens + 64, 64)} | {num_tokens}
    ranks = []
    for order, layers, tokens in itertools.product(orders, range(1, costs.num_layers + 1), chunks):
        plan, num_chunks = plan_of(costs, order, layers, tokens, offload), -(-num_tokens // tokens)
        if plan.predicted_host_bytes > budgets.get("host_memory_budget_bytes", float("inf")):
            continue
        if (budget := budgets.get("memory_budget_bytes")) is None:
            host = 0 if "host_memory_budget_bytes" in budgets else plan.predicted_host_bytes / 8
            ranks.append((max(4, costs.units(order, layers)), plan.predicted_peak_bytes + host, num_chunks))
        elif plan.predicted_peak_bytes <= budget:
            host = plan.predicted_host_bytes
            ranks.append((costs.units(order, layers), host, num_chunks, plan.predicted_peak_bytes))
    return min(ranks, default=None)


@pytest.mark.parametrize("num_tokens", [1, 63, 64, 65, 1000, 4096, 7919])
@pytest.mark.parametrize("offload", [False, True])
def test_equals_brute_force(num_tokens, offload):
    config = config_of(layers=7)
    cases = [{}, {"orders": ("sequence_major",)}]
    peaks = sorted(
        Costs(config, 2, num_tokens).peak_bytes(order, layers, min(tokens, num_tokens), offload)
        for order in ("layer_major", "sequence_major")
        for layers in (1, 3, 7)
        for tokens in (64, 512, num_tokens)
    )
    hosts = [None] if not offload else [None, 3 * 2 * num_tokens * 256 * 2 + 10 * MIB]
    for peak, host in itertools.product((peaks[0], peaks[len(peaks) // 2], peaks[-1]), hosts):
        cases.append({"memory_budget_bytes": peak} | ({"host_memory_budget_bytes": host} if host else {}))
    for case in cases:
        expected = brute_force(config, 2, num_tokens, offload, **case)
        options = dict(case)
        if orders := options.pop("orders", None):
            options["order"] = orders[0]
        if expected is None:
            with pytest.raises(InfeasibleMemoryBudget):
                plan_checkpoints(config, 2, num_tokens, offload=offload, **options)
            continue
        plan = plan_checkpoints(config, 2, num_tokens, offload=offload, **options)
        units, num_chunks = 3 * plan.recompute_factor, -(-num_tokens // plan.sequence_interval)
        peak, host = plan.predicted_peak_bytes, plan.predicted_host_bytes
        if "memory_budget_bytes" in case:
            assert (units, host, num_chunks, peak) == pytest.approx(expected)
        else:
            assert (max(4, units), peak + host / 8, num_chunks) == pytest.approx(expected)


@pytest.mark.parametrize(("length", "step"), [(1, 1), (64, 1), (64, 64), (65, 64), (1000, 64), (7919, 256), (10, 256)])
def test_smallest_intervals(length, step):
    by_pieces = {}
    for interval in [*range(step, length, step), length]:
        by_pieces.setdefault(-(-length // interval), interval)
    assert smallest_intervals(length, step) == sorted(by_pieces.values())


def test_few_of_all_plans_are_costed_at_four_million_tokens(monkeypatch):
    """Of 64 x 2^14 cells in two orders: the square roots of both, as only one interval per number of pieces counts."""
    costed, peak_bytes = [], Costs.peak_bytes
    monkeypatch.setattr(Costs, "peak_bytes", lambda costs, *cut: costed.append(cut) or peak_bytes(costs, *cut))
    plan_checkpoints(LARGE, 1, 2**22, memory_budget_bytes=40 * GIB, offload=True)
    assert 0 < len(costed) <= 2 * (2 * 64**0.5) * (2 * (2**14) ** 0.5)


# --- against the count ---

PLANS = [
    ("layer_major", 1, 10**9, False), ("layer_major", 2, 10**9, False), ("layer_major", 3, 640, False),
    ("layer_major", 6, 512, False), ("sequence_major", 6, 576, False), ("sequence_major", 2, 1024, False),
    ("sequence_major", 6, 1024, True), ("sequence_major", 1, 2048, True), ("layer_major", 2, 704, True),
    ("sequence_major", 4, 64, False),
]  # fmt: skip


@pytest.mark.parametrize("cut", PLANS, ids=str)
def test_prediction_is_within_ten_percent_of_the_count(cut):
    for num_tokens in (1000, 6000):
        plan = predict_plan(SMALL, 1, num_tokens, *cut, num_supervised_tokens=KEPT)
        counter = count(SMALL, plan, num_tokens)
        assert plan.predicted_peak_bytes == pytest.approx(counter.peak["device"], rel=0.1)
        assert plan.predicted_host_bytes == pytest.approx(counter.peak["host"], rel=0.1)


@pytest.mark.parametrize(
    ("text", "batch_size", "dtype"),
    [
        ({}, 3, "bfloat16"),
        ({}, 1, "float32"),
        ({"n_groups": 2, "state_size": 128}, 1, "bfloat16"),
        ({"head_dim": 32, "num_heads": 16}, 2, "bfloat16"),
    ],
)
def test_prediction_for_other_shapes_and_dtypes(text, batch_size, dtype):
    config, num_tokens, dtype = config_of(**text), 3000, getattr(torch, dtype)
    batch = {"dtype_bytes": dtype.itemsize, "num_supervised_tokens": batch_size * KEPT}
    found = {}
    for cut in (("layer_major", 2, 512, False), ("sequence_major", 6, 1024, True)):
        plan = predict_plan(config, batch_size, num_tokens, *cut, **batch)
        found[cut] = plan.predicted_peak_bytes, count(config, plan, num_tokens, batch_size, dtype).peak["device"]
    predicted = peak_bytes_without(config, batch_size, num_tokens, **batch)
    found["off"] = predicted, count(config, None, num_tokens, batch_size, dtype).peak["device"]
    for predicted, counted in found.values():
        assert predicted == pytest.approx(counted, rel=0.1)


@pytest.mark.parametrize("cut", PLANS[2:], ids=str)
def test_prediction_with_a_horizon_is_within_ten_percent_of_the_count(cut):
    """Whatever the length: what is watched takes the memory of a chunk."""
    costs = Costs(SMALL, 1, 40_000, num_supervised_tokens=KEPT, num_gradient_tokens=3000)
    plan = plan_of(costs, cut[0], cut[1], min(cut[2], 3000), cut[3])
    counter = count(SMALL, plan, 40_000)
    assert plan.predicted_peak_bytes == pytest.approx(counter.peak["device"], rel=0.1)
    assert plan.predicted_host_bytes == pytest.approx(counter.peak["host"], rel=0.1)


@pytest.mark.parametrize("num_tokens", [900, 20_000])
def test_prediction_of_watching_is_within_ten_percent_of_the_count(num_tokens):
    config = config_of()
    config.prefill_chunk_size = 2048
    counter = LiveBytes()
    with torch.device("meta"):
        backbone = Mamba2Backbone(config.text_config, config.prefill_chunk_size).to(torch.bfloat16)
    for parameter in backbone.parameters():
        counter.count(parameter, "weights")
    with counting(counter), torch.no_grad():
        cache = backbone.new_cache(1)
        for start in range(0, num_tokens, config.prefill_chunk_size):
            length = min(config.prefill_chunk_size, num_tokens - start)
            embeds = torch.empty(1, length, config.text_config.hidden_size, dtype=torch.bfloat16, device="meta")
            backbone(embeds, cache, None, torch.arange(length).sub(length - 1).clamp(-1)[None])
            del embeds
    assert watching_bytes(config, 1, num_tokens) == pytest.approx(counter.peak["device"], rel=0.1)


@pytest.mark.parametrize("checkpoints", [True, False])
@pytest.mark.parametrize("num_batches", [1, 2, 3])
def test_gradients_while_they_accumulate_are_those_counted(checkpoints, num_batches):
    """Of so many layers that the one gradient that is just being added does not weigh."""
    config = config_of(layers=24)
    plan = predict_plan(config, 1, 600, "sequence_major", 24, 512) if checkpoints else None
    counter = count(config, plan, 600, num_batches=num_batches)
    backbone = Mamba2Backbone(config.text_config, 1)
    for name, parameter in backbone.named_parameters():
        if not name.endswith(("A_log", "mixer.D", "dt_bias")):
            parameter.data = parameter.data.bfloat16()
    whole, layers = (
        (sum(p.numel() for p in part.parameters()), sum(p.nbytes for p in part.parameters()))
        for part in (backbone, backbone.layers)
    )
    sizes = Sizes(0, 0, *whole, *layers)
    fixed = Training(accumulation=num_batches).fixed(sizes, checkpoints, 0, 0)
    assert fixed.gradients_bytes == pytest.approx(counter.peak["gradients"], rel=0.04)
    assert fixed.float32_sums_bytes == (4 * layers[0] - layers[1] if checkpoints else 0)


@pytest.mark.parametrize("model", PRESETS)
def test_predictions_are_not_far_from_what_the_paper_measured(model):
    """Table 3: below it, as less is kept, and at most two fifths; of figures that are not mostly rounding."""
    config = VideoMa2mbaConfig.from_preset(model)
    for method, published in PAPER_GB[model].items():
        for n, gigabytes in enumerate(published, start=10):
            if gigabytes < 4:
                continue
            name = "layer_major" if method == "MA-GC" else method
            plan = choose_plan(config, name, 2**n, 0)
            batch = {"num_supervised_tokens": KEPT}
            peak = plan.predicted_peak_bytes if plan else peak_bytes_without(config, 1, 2**n, **batch)
            assert 0.6 < peak / 1e9 / gigabytes < 1, (method, n)


def test_two_million_tokens_with_a_horizon():
    """A quarter of the compute of all MA-GC, by counted products of 2 of its layers, and the memory of the horizon."""
    from .test_checkpointing import Flops

    config = VideoMa2mbaConfig.from_preset("3.1b")
    config.text_config.num_hidden_layers = 2
    found = {}
    for horizon in (2**14, None):
        plan = plan_checkpoints(config, 1, 2**21, sequence_interval=8192, offload=True, gradient_horizon=horizon)
        with Flops() as flops:
            counter = count(config, plan, 2**21)
        found[horizon] = flops.of[torch.ops.aten.mm], plan.recompute_factor, counter.peak["host"]
    (products, units, host), (all_products, all_units, all_host) = found.values()
    assert products <= 0.27 * all_products
    assert units / all_units == pytest.approx(products / all_products, rel=0.01)
    assert host <= all_host / 50
    short = plan_checkpoints(LARGE, 1, 2**15, gradient_horizon=2**14)
    long = plan_checkpoints(LARGE, 1, 2**21, gradient_horizon=2**14)
    assert long.predicted_peak_bytes == short.predicted_peak_bytes
    assert long.num_watched_tokens == 2**21 - 2**14


# --- what is asked for ---


def test_without_a_budget_one_recompute_and_the_least_memory():
    plan = plan_checkpoints(LARGE, 1, 2**17)
    assert plan.recompute_factor == pytest.approx(4 / 3)
    for order, layers in (("layer_major", 1), ("layer_major", 8), ("sequence_major", 64)):
        other = plan_checkpoints(LARGE, 1, 2**17, order=order, layer_interval=layers)
        assert plan.predicted_peak_bytes <= other.predicted_peak_bytes


def test_a_larger_budget_never_costs_compute():
    factors, chunks = [], []
    for gib in (8, 10, 12, 16, 24, 48, 400):
        plan = plan_checkpoints(LARGE, 1, 2**17, memory_budget_bytes=gib * GIB)
        assert plan.predicted_peak_bytes <= gib * GIB
        factors.append(plan.recompute_factor)
        chunks.append(-(-(2**17) // plan.sequence_interval))
    assert factors == sorted(factors, reverse=True)
    assert chunks[-1] == 1


@pytest.mark.parametrize("model", PRESETS)
def test_on_kernels_no_cell_is_so_small_that_launches_take_longer(model, monkeypatch):
    config = VideoMa2mbaConfig.from_preset(model)
    floor = Costs(config, 1, 1000, scan_backend="mamba_ssm").busy_tokens
    layer = {"0.7b": 6.6e6, "1.8b": 2.6e7, "3.1b": 4e7}[model]  # parameters: two operations for each, forward
    # at most the time of the products alone, and no less than a quarter of that, as the rest is traffic
    products = LAUNCHES * LAUNCH_S / (4 * 2 * layer / FLOPS_PER_S)
    assert products / 4 < floor < products

    def average_cell(num_tokens):
        plan = plan_checkpoints(config, 1, num_tokens, scan_backend="mamba_ssm", offload=True)
        return num_tokens / -(-num_tokens // plan.sequence_interval)

    for num_tokens in (300, 2**12, 2**14, 2**17):
        assert average_cell(num_tokens) >= min(floor, num_tokens)
    # a batch has more work for the same launches
    assert Costs(config, 4, 1000, scan_backend="mamba_ssm").busy_tokens == pytest.approx(floor / 4)
    monkeypatch.setattr(checkpoint_costs, "LAUNCHES", 8 * LAUNCHES)
    assert average_cell(2**14) >= min(8 * floor, 2**14)


def test_on_kernels_a_budget_may_still_ask_for_small_cells():
    least = plan_checkpoints(LARGE, 1, 2**14, scan_backend="mamba_ssm", sequence_interval=256)
    budget = least.predicted_peak_bytes * 1.001
    plan = plan_checkpoints(LARGE, 1, 2**14, scan_backend="mamba_ssm", memory_budget_bytes=budget)
    assert plan.predicted_peak_bytes <= budget


@pytest.mark.parametrize("autocast", [False, True])
def test_float32_weights_under_autocast_take_what_the_allocator_says(autocast):
    """Activations, gradients and the copies of weights that autocast keeps: a step on the CPU, all told."""
    config = config_of(layers=12)
    model = VideoMa2mbaForConditionalGeneration(config).train()
    model.model.vision_tower.requires_grad_(False)
    cut = {"order": "sequence_major", "layer_interval": 12, "sequence_interval": 512}
    model.gradient_checkpointing_enable(**cut)
    ids = torch.randint(2, 400, (1, 1500))
    labels = torch.where(torch.arange(1500) < 1436, -100, ids)

    def step():
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = model(input_ids=ids, labels=labels).loss
        loss.backward()

    sizes = Sizes.of(model, autocast=autocast)
    fixed = Training().fixed(sizes, checkpoints=True, optimizer_bytes=0, pixels_bytes=0)
    batch = {"dtype_bytes": 4, "compute_bytes": 2 if autocast else 4, "num_supervised_tokens": 64}
    activations = predict_plan(config, 1, 1500, *cut.values(), **batch).predicted_peak_bytes
    over_weights = fixed.total - sizes.weights_bytes + activations
    assert (sizes.casts_bytes > 0) == autocast
    assert over_weights == pytest.approx(allocated_peak_bytes(step), rel=0.03)


def test_the_host_budget_is_kept_and_may_cost_compute():
    budgets = {"memory_budget_bytes": 10 * GIB, "host_memory_budget_bytes": 128 * GIB}
    wide = plan_checkpoints(LARGE, 1, 2**21, offload=True, **budgets)
    tight = plan_checkpoints(LARGE, 1, 2**22, offload=True, **budgets)
    assert wide.recompute_factor == pytest.approx(4 / 3)
    assert 4 / 3 < tight.recompute_factor <= 5 / 3
    assert max(wide.predicted_host_bytes, tight.predicted_host_bytes) <= 128 * GIB


def test_what_does_not_fit_says_what_would():
    with pytest.raises(InfeasibleMemoryBudget) as raised:
        plan_checkpoints(LARGE, 1, 2**19, memory_budget_bytes=6 * GIB)
    message = str(raised.value)
    assert "6.0 GiB" in message
    assert "524288 tokens" in message
    assert "without offload is sequence_major" in message
    assert "with offload is layer_major + offload" in message


def test_too_much_for_the_host():
    with pytest.raises(InfeasibleMemoryBudget, match=r"with offload at least 10\.\d GiB of host memory"):
        plan_checkpoints(LARGE, 1, 2**20, offload=True, host_memory_budget_bytes=GIB)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"axes": ("layer",)}, ("layer_major", 1, 5000, False)),
        ({"axes": ["layer"], "layer_interval": 3}, ("layer_major", 3, 5000, False)),
        ({"axes": ("sequence",), "sequence_interval": 999}, ("sequence_major", 6, 999, False)),
        ({"axes": ("layer",), "offload": True}, ("layer_major", 1, 5000, True)),
        ({"layer_interval": 6, "sequence_interval": 77}, ("sequence_major", 6, 77, False)),
        ({"order": "layer_major", "layer_interval": 2, "sequence_interval": 5000}, ("layer_major", 2, 5000, False)),
    ],
)
def test_what_is_given_is_kept(options, expected):
    plan = plan_checkpoints(SMALL, 1, 5000, **options)
    assert (plan.order, plan.layer_interval, plan.sequence_interval, plan.offload) == expected


def test_intervals_are_multiples_of_the_scan_chunk():
    for num_tokens in (1000, 50_000, 2**20):
        plan = plan_checkpoints(LARGE, 1, num_tokens)
        assert plan.sequence_interval % 256 == 0 or plan.sequence_interval == num_tokens


def test_compute_units():
    units = {
        ("layer_major", 1): 4,
        ("sequence_major", 64): 4,
        ("sequence_major", 32): 4.5,
        ("sequence_major", 1): 5 - 1 / 64,
    }
    for cut, expected in units.items():
        assert 3 * predict_plan(LARGE, 1, 10_000, *cut, 1024).recompute_factor == pytest.approx(expected)


def test_frames_take_memory_when_the_tower_trains():
    peaks = [
        plan_checkpoints(LARGE, 1, 2**12, num_frames=frames, trains_vision=trains).predicted_peak_bytes
        for frames, trains in ((0, True), (28, False), (28, True))
    ]
    assert peaks[0] <= peaks[1] < peaks[2]
    assert 2 * GIB < peaks[2] - peaks[1] + GIB < 6 * GIB  # 23 layers of CLIP-L on a micro-batch of 8 frames


# --- nonsense ---


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"axes": ()}, "axes"),
        ({"axes": "layer"}, "axes"),
        ({"axes": ("time",)}, "time"),
        ({"layer_interval": 0}, "layer_interval=0"),
        ({"layer_interval": 2.0}, "layer_interval=2.0"),
        ({"layer_interval": True}, "layer_interval=True"),
        ({"layer_interval": 7}, "more than the model's 6 layers"),
        ({"sequence_interval": -256}, "sequence_interval=-256"),
        ({"sequence_interval": "256"}, "sequence_interval='256'"),
        ({"sequence_interval": 5001}, "s > S"),
        ({"order": "diagonal"}, "diagonal"),
        ({"offload": 1}, "offload=1"),
        ({"gradient_horizon": 0}, "gradient_horizon=0"),
        ({"gradient_horizon": 2.5}, "gradient_horizon=2.5"),
        ({"memory_budget_bytes": 0}, "memory_budget_bytes=0"),
        ({"memory_budget_bytes": float("nan")}, "memory_budget_bytes=nan"),
        ({"host_memory_budget_bytes": -5}, "host_memory_budget_bytes=-5"),
        ({"axes": ("layer",), "sequence_interval": 256}, "contradicts"),
        ({"axes": ("sequence",), "layer_interval": 2}, "contradicts"),
    ],
)
def test_nonsense_is_refused(options, message):
    with pytest.raises(ValueError, match=message) as raised:
        plan_checkpoints(SMALL, 1, 5000, **options)
    assert not isinstance(raised.value, InfeasibleMemoryBudget)


@pytest.mark.parametrize(("batch_size", "num_tokens"), [(0, 5), (1, 0), (1, -3), (1, 2.5)])
def test_shapes_must_be_positive(batch_size, num_tokens):
    with pytest.raises(ValueError, match="positive integer"):
        plan_checkpoints(SMALL, batch_size, num_tokens)


def test_unknown_options_are_refused():
    with pytest.raises(TypeError, match="intervall"):
        plan_checkpoints(SMALL, 1, 5000, intervall=3)


# --- the plan itself ---


def test_a_plan_is_frozen_and_reads_well():
    plan = CheckpointPlan("sequence_major", 64, 4608, True, 10 * GIB, 93 * GIB)
    with pytest.raises(dataclasses.FrozenInstanceError):
        plan.order = "layer_major"
    assert str(plan) == (
        "sequence_major + offload, cells of 64 layers x 4608 tokens: 10.0 GiB of activations and 93.0 GiB of host "
        "memory, 1.33 x the compute of no checkpointing"
    )


def test_bytes_as_people_read_them():
    assert [format_bytes(n) for n in (12, 2048, 3 * MIB, 2.5 * GIB, 2**41)] == [
        "12 bytes", "2.0 KiB", "3.0 MiB", "2.5 GiB", "2.0 TiB",
    ]  # fmt: skip


WITHOUT_TORCH = """
import importlib, sys, types
package = types.ModuleType("stand_in")  # the folder's own __init__ imports the model, and so torch
package.__path__ = [sys.argv[1]]
sys.modules["stand_in"] = package
assert importlib.import_module("stand_in.checkpoint_plan").plan_checkpoints
assert not {"torch", "transformers"} & set(sys.modules)
"""


def test_the_planner_needs_no_torch():
    folder = str(Path(modeling.__file__).parent)
    done = subprocess.run([sys.executable, "-c", WITHOUT_TORCH, folder], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_kernels_keep_the_scans_output_too():
    """Per token and layer of a cell it costs `inner` more numbers; the rest of a long sequence is the same."""
    config, tokens = VideoMa2mbaConfig.from_preset("3.1b"), 2**17
    cut = ("sequence_major", 64, 8192, True)
    torch_plan = predict_plan(config, 1, tokens, *cut)
    kernel_plan = predict_plan(config, 1, tokens, *cut, scan_backend="mamba_ssm")
    more = kernel_plan.predicted_peak_bytes - torch_plan.predicted_peak_bytes
    kept = 64 * 8192 * 5120 * 2
    assert kept < more < 1.2 * kept
    assert kernel_plan.predicted_host_bytes == torch_plan.predicted_host_bytes
