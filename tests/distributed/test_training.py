"""`video-ma2mba train` on every engine: the losses and the model of one process, saved alike, resumed, in bfloat16."""

import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from .commands import RUNS, Command

FLOAT32 = [["A_log", "torch.float32"], ["D", "torch.float32"], ["dt_bias", "torch.float32"]]
SLICE = ("fsdp2", "sequence")


@pytest.fixture(scope="module")
def command(model_folder, stories, tmp_path_factory):
    """What one process does is there already, in float32 and in bfloat16."""
    command = Command(model_folder, stories, tmp_path_factory.mktemp("runs"))
    command.values["evaluation_data"] = str(stories)
    command.start(1, command.wanted("one", {}), command.wanted("one bf16", {}, bf16=True))
    return command


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slice] if n in SLICE else []) for n in RUNS])
def test_a_recipe_on_an_engine_is_the_run_of_one_process(command, name):
    values, processes = RUNS[name]
    found = command.start(processes, command.wanted(name, values), command.wanted(f"{name} bf16", values, bf16=True))
    losses, alone = command.losses(name), command.losses("one")
    assert losses == pytest.approx(alone, rel=1e-5)
    mine, expected = command.report(name), command.report("one")
    for key in ("samples", "tokens", "supervised_tokens", "global_batch_size", "steps"):
        assert mine[key] == expected[key], key
    assert mine["held_out_loss"] == pytest.approx(expected["held_out_loss"], rel=1e-4)
    assert_saved_alike(command.root / name / "model", command.root / "one" / "model")
    # Only products are computed in bfloat16; the losses are those of one process that does so, within its rounding.
    assert set(map(tuple, FLOAT32)) == {tuple(pair) for pair in found[f"{name} bf16"]["seen"] if pair[0] != "projected"}
    assert ["projected", "torch.bfloat16"] in found[f"{name} bf16"]["seen"]
    narrow = command.losses("one bf16")
    rounding = max(abs(a - b) for a, b in zip(narrow, alone, strict=True))
    assert max(abs(a - b) for a, b in zip(command.losses(f"{name} bf16"), narrow, strict=True)) <= 2 * rounding


def assert_saved_alike(folder, other):
    """The same files, and the same tensors but for what the optimizer makes of rounding."""
    assert {path.name for path in folder.iterdir()} == {path.name for path in other.iterdir()}
    assert json.loads((folder / "config.json").read_text()) == json.loads((other / "config.json").read_text())
    mine, theirs = (load_file(one / "model.safetensors") for one in (folder, other))
    assert mine.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert mine[name].dtype == tensor.dtype, name
        # where a gradient is rounding alone, Adam's steps are of the rate's size in any direction
        assert (mine[name] - tensor).abs().max() <= 4 * 1e-3 * 2, name
    everything = torch.cat([(mine[name] - tensor).flatten() for name, tensor in theirs.items()])
    assert everything.norm() <= 1e-3 * torch.cat([tensor.flatten() for tensor in theirs.values()]).norm()


def test_what_was_saved_under_fsdp2_loads_where_the_package_is_not_installed(command):
    command.start(2, command.wanted("elsewhere", {"fsdp_config": "fsdp2", "max_steps": 1}))
    code = (
        "import sys; sys.modules['video_ma2mba'] = None\n"
        "from transformers import AutoModelForImageTextToText as Auto\n"
        f"model = Auto.from_pretrained({str(command.root / 'elsewhere' / 'model')!r}, trust_remote_code=True)\n"
        "print(type(model).__module__, type(model).__name__)"
    )
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "transformers_modules" in done.stdout
    assert done.stdout.split()[-1] == "VideoMa2mbaForConditionalGeneration"


@pytest.mark.parametrize("name", ["fsdp2", "zero1", "zero3", "sequence"])
def test_a_killed_rank_ends_the_run_which_is_gone_on_with(command, name):
    """The others end with it, within a minute; nothing half-written counts; the resumed run is the whole one."""
    values, processes = RUNS[name]
    cut = f"{name} cut"
    command.start(processes, command.wanted(cut, values), fails=True, KILL="1:3")
    assert not (command.root / cut / "model").exists()
    command.start(processes, command.wanted(cut, values, flags=["--resume"]), command.wanted(f"{name} whole", values))
    assert command.losses(cut) == pytest.approx(command.losses(f"{name} whole"), rel=1e-6)
    assert command.report(cut)["held_out_loss"] == pytest.approx(
        command.report(f"{name} whole")["held_out_loss"], rel=1e-5
    )
