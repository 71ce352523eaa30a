"""The recipes are the paper's: asserted from the optimizer that a run builds, and on a fake 3.1B."""

import json
import re

import pytest
import torch

from video_ma2mba import VideoMa2mbaConfig, VideoMa2mbaForConditionalGeneration
from video_ma2mba.cli import main
from video_ma2mba.training.parameters import parameter_groups
from video_ma2mba.training.recipe import MAX_WORKERS, SIZES, read_recipe, recipe_names
from video_ma2mba.training.run import make_trainable, make_trainer, prepare_run

# arXiv 2411.19460, Table 6: language rate, vision rate, global batch
TABLE_6 = {"stage1": (1e-3, None, 512), "stage1.5": (4e-5, 4e-6, 32), "stage2": (4e-5, 4e-6, 32)}
NOT_DECAYED = re.compile(r"norm|bias|A_log|\.D$|dt_bias|class_embedding")


def check_groups(model, optimizer, stage):
    language_rate, vision_rate, _ = TABLE_6[stage]
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    seen = set()
    for group in optimizer.param_groups:
        # `initial_lr`: a schedule has set `lr` to its first step
        rate = group.get("initial_lr", group["lr"])
        assert group["betas"] == (0.9, 0.95)
        for parameter in group["params"]:
            name = names[id(parameter)]
            seen.add(name)
            assert rate == (vision_rate if "vision_tower" in name else language_rate), name
            assert group["weight_decay"] == (0.0 if NOT_DECAYED.search(name) else 0.05), name
    expected = {name for name in names.values() if stage != "stage1" or "multi_modal_projector" in name}
    assert seen == expected
    assert {name for name, parameter in model.named_parameters() if parameter.requires_grad} == expected


@pytest.mark.parametrize("stage", TABLE_6)
def test_a_run_of_a_stage_has_the_numbers_of_table_6(stage, changes):
    numbers = ("max_steps", "learning_rate", "vision_learning_rate", "global_batch_size")
    kept = [change for change in changes() if not change.startswith(numbers)]
    recipe = read_recipe(f"0.7b-{stage}", [*kept, "num_epochs=25", "device_batch_size=4"])
    trainer = make_trainer(prepare_run(recipe))
    optimizer = trainer.create_optimizer()
    check_groups(trainer.model, optimizer, stage)
    assert isinstance(optimizer, torch.optim.AdamW)
    assert trainer.get_total_train_batch_size(trainer.args) == TABLE_6[stage][2]
    assert trainer.args.max_grad_norm == 1.0
    # one twenty-fifth of the rates in the first tenth, then half a cosine
    schedule = trainer.create_scheduler(100)
    rates = []
    for _ in range(100):
        rates.append(optimizer.param_groups[0]["lr"] / optimizer.param_groups[0]["initial_lr"])
        optimizer.step()
        schedule.step()
    assert rates[:10] == pytest.approx([step / 10 for step in range(10)])
    assert rates[10] == pytest.approx(1.0)
    assert rates[55] == pytest.approx(0.5)
    assert rates[99] < 0.001


@pytest.mark.parametrize("stage", TABLE_6)
def test_the_same_of_a_3_1b_on_no_memory(stage):
    recipe = read_recipe(f"3.1b-{stage}")
    with torch.device("meta"):
        model = VideoMa2mbaForConditionalGeneration(VideoMa2mbaConfig.from_preset("3.1b"))
    model = make_trainable(model, recipe)
    groups = parameter_groups(model, recipe.learning_rate, recipe.vision_learning_rate, recipe.weight_decay)
    optimizer = torch.optim.AdamW(groups, betas=(recipe.adam_beta1, recipe.adam_beta2))
    check_groups(model, optimizer, stage)
    assert recipe.global_batch_size == TABLE_6[stage][2]
    assert (recipe.warmup_ratio, recipe.max_grad_norm, recipe.fps, recipe.bf16) == (0.1, 1.0, 1.0, True)
    assert recipe.gradient_checkpointing == {}  # MA-GC, planned


def test_the_stages_of_a_size_follow_each_other():
    for size in SIZES:
        one, then, last = (read_recipe(f"{size}-{stage}") for stage in TABLE_6)
        assert one.model == f"models/video-ma2mba-{size}"
        assert then.model == f"{one.output}/model"
        assert last.model == f"{then.output}/model"
    assert len(recipe_names()) == 3 * len(SIZES) + 3


@pytest.mark.parametrize(("cores", "devices", "workers"), [(2, 1, 2), (2, 8, 1), (64, 1, MAX_WORKERS), (64, 16, 4)])
def test_processes_that_decode_follow_from_the_cores(monkeypatch, cores, devices, workers):
    monkeypatch.setattr("os.cpu_count", lambda: cores)
    given = ["model=m", "data=d", "output=o"]
    assert read_recipe("finetune", given).workers(devices) == workers
    assert read_recipe("finetune", [*given, "num_workers=0"]).workers(devices) == 0


def test_every_line_of_a_stage_says_where_it_is_from():
    from video_ma2mba.training.recipe import RECIPES

    for path in RECIPES.glob("stage*.yaml"):
        lines = [line for line in path.read_text().splitlines() if re.match(r"\w+:", line)]
        numbers = [line for line in lines if re.search(r":\s+\[?[\d{]", line)]
        assert len(numbers) > 8
        for line in numbers:
            assert re.search(r"#.*(Table 6|section|AdamW|ours|text|MA-GC)", line) or "adam_beta2" in line or \
                "num_workers" in line, line  # fmt: skip


@pytest.mark.parametrize(
    ("changes_", "message"),
    [
        (["learning_rat=1"], r"unknown key 'learning_rat'; did you mean 'learning_rate'"),
        (["learning_rate=fast"], r"learning_rate must be float, got 'fast'"),
        (["global_batch_size=0.5"], r"global_batch_size must be int"),
        (["trains=[head]"], r"trains: unknown head; known are vision_tower"),
        (["data=[]"], r"needs data"),
        (["max_steps=0", "num_epochs=0"], r"say how long"),
        (["streaming=true", "max_steps=0"], r"max_steps must be given"),
        (["save_total_limit=1"], r"at least 2"),
        (["lora.rank=0"], r"lora.rank must be at least 1"),
        (["deepspeed=a", "fsdp_config=b"], r"either deepspeed or fsdp_config"),
        (["dtype=int8"], r"dtype must be float32 or bfloat16, got 'int8'"),
        (["warmup_ratio=1"], r"warmup_ratio must lie in \[0, 1\)"),
        (["learning_rate=0"], r"learning_rate must be positive"),
        (["learning_rate.first=1"], r"learning_rate holds no further keys"),
        (["fps"], r"write key=value"),
        (["seed=[1"], r"not YAML"),
    ],
)
def test_a_recipe_with_nonsense_is_refused(changes_, message):
    with pytest.raises(ValueError, match=message):
        read_recipe("finetune", ["model=m", "data=d", "output=o", *changes_])


def test_an_unknown_recipe_and_a_missing_line_are_refused():
    with pytest.raises(ValueError, match=r"no such recipe. Shipped are .*0.7b-stage1"):
        read_recipe("stage3")
    with pytest.raises(ValueError, match=r"model, data, output must be given"):
        read_recipe("finetune")


def test_a_recipe_of_ones_own_is_a_file(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("model: m\ndata: d\noutput: o\nlora:\n  rank: 4\n")
    assert read_recipe(str(file), ["lora.rank=8"]).lora.rank == 8
    file.write_text("- model\n")
    with pytest.raises(ValueError, match=r"mine\.yaml: a recipe is a list of"):
        read_recipe(str(file))


def test_the_global_batch_stays_what_it_is():
    recipe = read_recipe("3.1b-stage2")
    assert [recipe.accumulation_steps(devices) for devices in (1, 8, 32)] == [32, 4, 1]
    with pytest.raises(ValueError, match=r"no multiple of device_batch_size 1 x 5 device"):
        recipe.accumulation_steps(5)


def test_dry_run_of_a_size_without_its_weights(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["train", "3.1b-stage2", "--dry-run", "--set", "max_tokens=1036800", "--gpu-memory", "80GiB"]) == 0
    printed = capsys.readouterr().out
    assert "vision, decay" in printed
    assert "4e-06" in printed
    assert "global batch 32 = 1 at a time x 1 device(s) x 32 batch(es) accumulated" in printed
    assert re.search(r"1 x 1,036,800 tokens: \w+_major, cells of", printed)
    assert "fits into 80.0 GiB: no" in printed  # weights in float32, and two states of AdamW
    assert main(["train", "3.1b-stage2", "--dry-run"]) == 0
    assert "the data are not there yet" in capsys.readouterr().out


def test_dry_run_with_data_says_steps_and_plan(changes, capsys):
    options = [word for change in changes(max_steps=0) for word in ("--set", change)]
    assert main(["train", "finetune", *options, "--dry-run", "--gpu-memory", "4GiB"]) == 0
    printed = capsys.readouterr().out
    assert "8 samples, 6 steps" in printed
    assert "fits into 4.0 GiB: yes" in printed


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"gradient_checkpointing": None}, ["no gradient checkpointing", "no GPU here: say with --gpu-memory"]),
        ({"streaming": True, "max_tokens": None}, ["streamed; 4 steps", "neither steps nor memory can be told"]),
        ({"data": "no/such/folder", "max_tokens": None}, ["the data are not there yet"]),
    ],
)
def test_dry_run_of_other_recipes(changes, capsys, change, says):
    options = [word for one in changes(**change) for word in ("--set", one)]
    assert main(["train", "finetune", *options, "--dry-run"]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert all(text in printed for text in says), printed


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"model": "nothing"}, "its name holds none of 0.7b, 1.8b, 3.1b"),
        ({"gradient_checkpointing": {"memory_budget_bytes": 1}}, "the recipe's memory_budget_bytes: no plan"),
    ],
)
def test_dry_run_refuses_what_cannot_be(changes, capsys, change, says):
    options = [word for one in changes(**change) for word in ("--set", one)]
    assert main(["train", "finetune", *options, "--dry-run"]) == 2
    assert says in capsys.readouterr().err


def test_long_joins_videos_and_stops_gradients_at_a_horizon(changes, tmp_path):
    """The recipe itself at a small size; its numbers stay what they are."""
    recipe = read_recipe("long", ["model=m", "data=d", "output=o"])
    assert recipe.gradient_checkpointing == {"gradient_horizon": 16384}
    assert (recipe.joining.shortest_s, recipe.joining.longest_s) == (60, 14400)
    small = {"joining": {"shortest_s": 15, "longest_s": 30}, "gradient_checkpointing": {"gradient_horizon": 40}}
    small |= {"max_tokens": 20_000, "max_steps": 2, "global_batch_size": 2}
    options = [word for one in changes(**small) for word in ("--set", one)]
    assert main(["train", "long", *options]) == 0
    report = json.loads((tmp_path / "run" / "train_report.json").read_text())
    assert report["samples"] == 4
    alone = prepare_run(read_recipe("finetune", changes())).train_data
    assert report["tokens"] / 4 > 1.3 * sum(alone["num_tokens"]) / len(alone)
    assert report["skipped_samples"] == 0
