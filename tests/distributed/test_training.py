"""`video-ma2mba train` on every engine: the losses and the model of one process, saved alike, resumed, in bfloat16."""

import os
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from video_ma2mba.data.prepare import prepare

from .commands import BEST, KEEPS_BEST, RUNS, Command

FLOAT32 = [["A_log", "torch.float32"], ["D", "torch.float32"], ["dt_bias", "torch.float32"]]
SLICE = ("fsdp2", "sequence")


def of(name):
    return pytest.param(name, marks=[pytest.mark.slice] * (name in SLICE))


@pytest.fixture(scope="module")
def command(model_folder, stories, tmp_path_factory):
    """What one process does is there already."""
    command = Command(model_folder, stories, tmp_path_factory.mktemp("runs"))
    command.values["evaluation_data"] = str(stories)
    command.start(1, command.wanted("one", {}), command.wanted("one bf16", {}, bf16=True), command.wanted("best", BEST))
    return command


@pytest.mark.parametrize("name", [of(name) for name in RUNS])
def test_a_recipe_on_an_engine_is_the_run_of_one_process(command, name):
    found = command.once(name)
    losses, alone = command.losses(name), command.losses("one")
    assert losses == pytest.approx(alone, rel=1e-5)
    mine, expected = command.report(name), command.report("one")
    for key in ("samples", "tokens", "supervised_tokens", "global_batch_size", "steps"):
        assert mine[key] == expected[key], key
    assert_held_out_alike(mine, expected)
    assert_saved_alike(command.root / name / "model", command.root / "one" / "model")
    # Only products are computed in bfloat16; the losses are those of one process that does so, within its rounding.
    assert set(map(tuple, FLOAT32)) == {tuple(pair) for pair in found[f"{name} bf16"]["seen"] if pair[0] != "projected"}
    assert ["projected", "torch.bfloat16"] in found[f"{name} bf16"]["seen"]
    narrow = command.losses("one bf16")
    rounding = max(abs(a - b) for a, b in zip(narrow, alone, strict=True))
    assert max(abs(a - b) for a, b in zip(command.losses(f"{name} bf16"), narrow, strict=True)) <= 2 * rounding


def assert_held_out_alike(mine, expected):
    """The same losses, and the same answers in full: all processes generate them together."""
    assert [entry["step"] for entry in mine["held_out"]] == [entry["step"] for entry in expected["held_out"]]
    for entry, other in zip(mine["held_out"], expected["held_out"], strict=True):
        # of the same weights, then of those that Adam makes of gradients that are rounding alone
        assert entry["loss"] == pytest.approx(other["loss"], rel=1e-4 if entry["step"] else 1e-6)
        assert (entry["exact"], entry["answers"]) == (other["exact"], other["answers"])
        assert entry["samples"] == other["samples"] != []


def assert_saved_alike(folder, other):
    """The same files, its own code among them, and the same tensors but for what the optimizer makes of rounding."""
    assert {path.name for path in folder.iterdir()} == {path.name for path in other.iterdir()}
    for path in folder.iterdir():
        assert path.suffix == ".safetensors" or path.read_bytes() == (other / path.name).read_bytes(), path.name
    mine, theirs = (load_file(one / "model.safetensors") for one in (folder, other))
    assert mine.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert mine[name].dtype == tensor.dtype, name
        # where a gradient is rounding alone, Adam's steps are of the rate's size in any direction
        assert (mine[name] - tensor).abs().max() <= 4 * 1e-3 * 2, name
    everything = torch.cat([(mine[name] - tensor).flatten() for name, tensor in theirs.items()])
    assert everything.norm() <= 1e-3 * torch.cat([tensor.flatten() for tensor in theirs.values()]).norm()


@pytest.mark.parametrize("name", [of(name) for name in KEEPS_BEST])
def test_the_recipe_as_it_is_holds_out_answers_and_keeps_the_best_on_an_engine(command, name):
    command.once(name)
    mine, expected = command.report(f"{name} best"), command.report("best")
    assert mine["kept_step"] == expected["kept_step"] == 1
    *before, last = mine["held_out"]
    assert_held_out_alike({"held_out": before}, {"held_out": expected["held_out"][:-1]})
    assert last["step"] == BEST["max_steps"]
    assert last["loss"] > 1.2 * before[-1]["loss"]
    assert_saved_alike(command.root / f"{name} best" / "model", command.root / "best" / "model")


def test_accelerate_launch_does_what_torchrun_does(command):
    """By its launcher for several GPUs, since that for CPUs wants MPI; without GPUs it trains on the CPU."""
    launcher = ["accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1"]
    wanted = command.wanted("launched", {})["arguments"]
    done = subprocess.run(
        [sys.executable, "-P", "-m", *launcher, "--mixed_precision", "no", "--dynamo_backend", "no", "-m",
         "video_ma2mba.cli", *wanted],
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""}, capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert command.report("launched")["devices"] == 2
    assert command.losses("launched") == pytest.approx(command.losses("one"), rel=1e-5)


def test_what_one_process_and_so_every_engine_saves_loads_where_the_package_is_not_installed(command):
    code = (
        "import sys; sys.modules['video_ma2mba'] = None\n"
        "from transformers import AutoModelForImageTextToText as Auto, AutoProcessor\n"
        f"folder = {str(command.root / 'one' / 'model')!r}\n"
        "model = Auto.from_pretrained(folder, trust_remote_code=True)\n"
        "processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)\n"
        "print(type(processor).__name__, type(model).__module__, type(model).__name__)"
    )
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    processor, module, model = done.stdout.split()[-3:]
    assert (processor, model) == ("VideoMa2mbaProcessor", "VideoMa2mbaForConditionalGeneration")
    assert module.startswith("transformers_modules.")


@pytest.mark.parametrize("name", [of(name) for name in RUNS])
def test_a_killed_rank_ends_the_run_which_is_gone_on_with(command, name):
    """The others end with it, within a minute; nothing half-written counts; the resumed run is the whole one."""
    command.once(name)
    values, processes = RUNS[name]
    cut = f"{name} cut"
    assert command.ended_s[name] < 60
    assert not (command.root / cut / "model").exists()
    command.start(processes, command.wanted(cut, values, flags=["--resume"]))
    assert command.losses(cut) == pytest.approx(command.losses(name), rel=1e-6)
    assert command.report(cut)["held_out_loss"] == pytest.approx(command.report(name)["held_out_loss"], rel=1e-5)
    assert_saved_alike(command.root / cut / "model", command.root / name / "model")


def test_a_stream_is_shared_by_processes_and_gone_on_with(command, stories):
    """Files for each process, and one file for both: losses of what follows a checkpoint are those of the whole run."""
    prepare(stories.parent / "source.jsonl", stories.parent, command.root / "shards", parquet=True, rows_per_file=3)
    whole, cut = [], []
    for name, data in (("files", command.root / "shards"), ("file", stories)):
        values = {"data": str(data), "streaming": True, "evaluation_data": [], "global_batch_size": 2, "max_steps": 6}
        whole.append(command.wanted(name, values))
        cut.append(command.wanted(f"{name} cut", values, flags=["--resume"]))
    command.start(2, *whole)
    for name in ("files", "file"):
        shutil.copytree(command.root / name / "checkpoints", command.root / f"{name} cut" / "checkpoints")
        shutil.rmtree(command.root / f"{name} cut" / "checkpoints" / "checkpoint-6")
    command.start(2, *cut)
    for name in ("files", "file"):
        assert command.losses(f"{name} cut") == command.losses(name)
        assert command.report(name)["samples"] == 12
