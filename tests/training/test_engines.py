"""What configurations for several devices are refused, and that all processes must see one output."""

import json
from types import SimpleNamespace

import pytest
import torch
from accelerate.utils import DistributedType

from video_ma2mba.cli import main
from video_ma2mba.training import engines
from video_ma2mba.training.engines import check_engine, engine_arguments
from video_ma2mba.training.recipe import Recipe

from ..forked import run

CHECK_SHARED = """
import sys
from pathlib import Path
from types import SimpleNamespace
from accelerate import Accelerator
from video_ma2mba.cli import main
from video_ma2mba.training import engines
from video_ma2mba.training.engines import check_shared
accelerator = Accelerator(cpu=True)
trainer = SimpleNamespace(accelerator=accelerator)
root = Path(sys.argv[1])
check_shared(trainer, root)
own = root / str(accelerator.process_index)
own.mkdir()
try:
    check_shared(trainer, own)
except ValueError as error:
    (own / "said").write_text(str(error))
"""


def recipe(**values):
    return Recipe(model="m", data=("d",), output="o", **values)


def file_with(path, values):
    path.write_text(json.dumps(values))
    return str(path)


@pytest.mark.parametrize("key", ["bf16", "fp16"])
def test_deepspeed_casts_no_weights(tmp_path, key):
    config = {"zero_optimization": {"stage": 2}, key: {"enabled": True}}
    with pytest.raises(ValueError, match=rf"mine.json: {key}.enabled casts all weights, also A_log.*`bf16: true`"):
        engine_arguments(recipe(deepspeed=file_with(tmp_path / "mine.json", config)), 2, False)
    config[key]["enabled"] = "auto"  # as the Trainer's examples have it: what the recipe says is done another way
    found = engines._deepspeed_config(file_with(tmp_path / "mine.json", config), bf16=True)
    assert key not in found
    assert found["torch_autocast"]["dtype"] == "bfloat16"


def test_the_first_version_of_fsdp_is_refused(tmp_path):
    config = file_with(tmp_path / "mine.json", {"fsdp_version": 1})
    with pytest.raises(ValueError, match=r"mine.json: the first version of FSDP .* let fsdp_version be 2"):
        engine_arguments(recipe(fsdp_config=config), 2, False)


@pytest.mark.parametrize(("shards", "processes"), [(3, 4), (4, 4), (8, 4)])
def test_groups_of_groups_must_divide_the_processes(tmp_path, shards, processes):
    config = file_with(tmp_path / "mine.json", {"fsdp_version": 2, "dp_shard_size": shards})
    with pytest.raises(ValueError, match=rf"dp_shard_size {shards} must divide the {processes} processes.*take fsdp2"):
        engine_arguments(recipe(fsdp_config=config), processes, False)


@pytest.mark.parametrize("engine", [{"fsdp_config": "fsdp2"}, {"deepspeed": "zero2"}])
def test_without_a_launcher_engines_are_refused(changes, monkeypatch, capsys, engine):
    monkeypatch.delenv("RANK", raising=False)
    assert main(["train", "finetune", *(word for change in changes(**engine) for word in ("--set", change))]) == 2
    (name, value), *_ = engine.items()
    assert f"{name}: {value} wants the processes of a launcher: start with `torchrun" in capsys.readouterr().err


def test_deepspeed_that_is_not_installed_is_named_with_what_comes_with_torch(monkeypatch):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setattr(engines, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"zero2 needs DeepSpeed: pip install deepspeed; or take fsdp_config: fsdp2"):
        engine_arguments(recipe(deepspeed="zero2"), 2, False)


def trainer_of(distributed_type=DistributedType.NO, plugins=(), mesh=None):
    """As far as `check_engine` looks: what `accelerate launch` may have been configured to, behind a recipe's back."""
    state = SimpleNamespace(distributed_type=distributed_type, **dict(plugins))
    accelerator = SimpleNamespace(state=state, parallelism_config=mesh)
    return SimpleNamespace(accelerator=accelerator, args=SimpleNamespace(device=torch.device("cpu")))


@pytest.mark.parametrize("name", ["cp_size", "sp_size", "tp_size"])
def test_other_kinds_of_parallel_training_are_refused_with_what_to_take(name):
    from accelerate.parallelism_config import ParallelismConfig

    assert getattr(ParallelismConfig(), name) == 1  # Accelerate calls it so
    with pytest.raises(ValueError, match=rf"parallelism_config with {name} 2: .* take the recipe's sequence_parallel"):
        check_engine(trainer_of(mesh=SimpleNamespace(**{name: 2})), recipe())
    check_engine(trainer_of(mesh=ParallelismConfig()), recipe())


def test_fsdp_config_without_effect_is_an_error():
    with pytest.raises(ValueError, match=r"fsdp_config has no effect on this device \(cpu\)"):
        check_engine(trainer_of(DistributedType.MULTI_CPU), recipe(fsdp_config="fsdp2"))


def test_what_accelerate_was_configured_to_is_looked_at_too():
    with pytest.raises(ValueError, match="let fsdp_version be 2"):
        check_engine(trainer_of(plugins={"fsdp_plugin": SimpleNamespace(fsdp_version=1)}), recipe())
    deepspeed = SimpleNamespace(deepspeed_config={"bf16": {"enabled": True}})
    with pytest.raises(ValueError, match=r"DeepSpeed's bf16.enabled casts all weights"):
        check_engine(trainer_of(plugins={"deepspeed_plugin": deepspeed}), recipe())
    deepspeed.deepspeed_config["bf16"]["enabled"] = "auto"
    check_engine(trainer_of(plugins={"deepspeed_plugin": deepspeed}), recipe())


def test_processes_that_do_not_see_one_output_all_end_and_name_who_is_blind(tmp_path):
    codes, _, err = run(CHECK_SHARED, [tmp_path], 2, timeout_s=300)
    assert codes == [0, 0], err[-3000:]
    for rank in range(2):
        told = (tmp_path / str(rank) / "said").read_text()
        assert "is not the same folder for all processes (rank 1 does not see what rank 0 writes)" in told
    assert sorted(path.name for path in tmp_path.glob("**/*")) == ["0", "1", "said", "said"]  # nothing is left behind
