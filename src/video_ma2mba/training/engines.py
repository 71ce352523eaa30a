"""The engines for several devices that a recipe can name: what they are told, and what of it is refused."""

import json
import os
import uuid
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import DistributedType, broadcast_object_list

if TYPE_CHECKING:
    from .recipe import Recipe
    from .trainer import VideoMa2mbaTrainer

DISTRIBUTED = Path(__file__).with_name("distributed")
LAUNCHER = "wants the processes of a launcher: start with `torchrun --nproc-per-node N -m video_ma2mba.cli train ...`"
FLOAT32_STAYS = (
    "casts all weights, also A_log, D and dt_bias, which decide how fast the states decay: leave it out; the recipe's "
    "`bf16: true` computes in bfloat16 by autocast, with weights in float32"
)


def find_distributed(name: str) -> str:
    """A configuration that is shipped, by its name, or a file."""
    file = Path(name) if name.endswith(".json") else DISTRIBUTED / f"{name}.json"
    if not file.is_file():
        shipped = ", ".join(sorted(path.stem for path in DISTRIBUTED.glob("*.json")))
        raise ValueError(f"{name}: no such configuration; shipped are {shipped}, or give a .json file")
    return str(file)


def zero_stage(name: str) -> int:
    """The stage of ZeRO that a configuration of DeepSpeed asks for."""
    return _read(name).get("zero_optimization", {}).get("stage", 0)


def engine_arguments(recipe: "Recipe", num_devices: int, bf16: bool) -> dict[str, Any]:
    """What `TrainingArguments` take for the recipe's engine.

    Args:
        bf16: Compute in bfloat16: of DDP and one device by Accelerate, of DeepSpeed by its `torch_autocast`, of FSDP2
            by `VideoMa2mbaTrainer.autocast_dtype`. The ways of the last two that cast weights are not used.

    Raises:
        ValueError: A configuration that would not train what one process trains.
    """
    if recipe.deepspeed:
        config = _deepspeed_config(recipe.deepspeed, bf16)
        if "RANK" not in os.environ:
            raise ValueError(f"deepspeed: {recipe.deepspeed} {LAUNCHER}, also on one device")
        if find_spec("deepspeed") is None:
            raise ValueError(
                f"deepspeed: {recipe.deepspeed} needs DeepSpeed: pip install deepspeed; or take fsdp_config: fsdp2, "
                "which comes with torch"
            )
        return {"deepspeed": config, "bf16": False}
    if recipe.fsdp_config:
        find_distributed(recipe.fsdp_config)
        if num_devices == 1:
            raise ValueError(f"fsdp_config: {recipe.fsdp_config} {LAUNCHER}, on two devices or more; or leave it out")
        return {"fsdp": True, "bf16": False, **_fsdp_config(recipe.fsdp_config, num_devices)}
    return {"bf16": bf16}


def _deepspeed_config(name: str, bf16: bool) -> dict[str, Any]:
    config = _read(name)
    for key in ("bf16", "fp16"):
        if config.pop(key, {}).get("enabled", False) not in (False, "auto"):
            raise ValueError(f"{name}: {key}.enabled {FLOAT32_STAYS}")
    if bf16:
        # no module's weights travel in bfloat16, so that sums over processes are those of float32
        config["torch_autocast"] = {"enabled": True, "dtype": "bfloat16", "lower_precision_safe_modules": []}
    zero = config.get("zero_optimization", {})
    if zero.get("stage") == 3:
        zero["stage3_gather_16bit_weights_on_model_save"] = True  # whatever the dtype: the saved model is whole
    return config


def _fsdp_config(name: str, num_devices: int) -> dict[str, Any]:
    config = _read(name)
    if int(config.get("fsdp_version", config.get("version", 2))) != 2:
        raise ValueError(f"{name}: the first version of FSDP knows one use of a module per pass: let fsdp_version be 2")
    shards = config.pop("dp_shard_size", None)
    if shards is None:
        return {"fsdp_config": config}
    from accelerate.parallelism_config import ParallelismConfig

    if shards == "node":
        shards = int(os.environ.get("LOCAL_WORLD_SIZE", num_devices))
    if num_devices % shards or num_devices == shards:
        raise ValueError(
            f"{name}: dp_shard_size {shards} must divide the {num_devices} processes into two groups or more; for one "
            "group take fsdp2"
        )
    mesh = ParallelismConfig(dp_replicate_size=num_devices // shards, dp_shard_size=shards)
    return {"fsdp_config": config, "parallelism_config": mesh}


def _read(name: str) -> dict[str, Any]:
    return json.loads(Path(find_distributed(name)).read_text(encoding="utf-8"))


def check_engine(trainer: "VideoMa2mbaTrainer", recipe: "Recipe") -> None:
    """Refuse what did not take effect, also of what `accelerate launch` was configured to, or could not be exact.

    Raises:
        ValueError: Says what, and what to do instead.
    """
    state = trainer.accelerator.state
    if recipe.fsdp_config and state.distributed_type != DistributedType.FSDP:
        raise ValueError(
            f"fsdp_config has no effect on this device ({trainer.args.device.type}), where Accelerate goes on with "
            "DDP: leave it out, or train on GPUs"
        )
    fsdp = getattr(state, "fsdp_plugin", None)
    if fsdp is not None and fsdp.fsdp_version != 2:
        raise ValueError("the first version of FSDP knows one use of a module per pass: let fsdp_version be 2")
    deepspeed = getattr(state, "deepspeed_plugin", None)
    for key in ("bf16", "fp16"):
        if deepspeed is not None and deepspeed.deepspeed_config.get(key, {}).get("enabled", False) is True:
            raise ValueError(f"DeepSpeed's {key}.enabled {FLOAT32_STAYS}")
    mesh = getattr(trainer.accelerator, "parallelism_config", None)
    for name in ("cp_size", "sp_size", "tp_size"):
        if getattr(mesh, name, 1) > 1:
            raise ValueError(
                f"parallelism_config with {name} {getattr(mesh, name)}: a recurrent model would begin each slice "
                "without its past; take the recipe's sequence_parallel, which hands the states on"
            )


def check_shared(trainer: "VideoMa2mbaTrainer", output: Path) -> None:
    """All processes must see one `output`: checkpoints are cleaned up and completed there by the first of them.

    Raises:
        ValueError: On all processes, where some do not.
    """
    accelerator = trainer.accelerator
    if accelerator.num_processes == 1:
        return
    (name,) = broadcast_object_list([f".seen-by-all-{uuid.uuid4().hex}"])
    if accelerator.is_main_process:
        (output / name).touch()
    accelerator.wait_for_everyone()
    sees = torch.tensor([(output / name).is_file()], device=accelerator.device, dtype=torch.int32)
    blind = [rank for rank, seen in enumerate(accelerator.gather(sees).tolist()) if not seen]
    if accelerator.is_main_process:
        (output / name).unlink()
    if blind:
        raise ValueError(
            f"{output} is not the same folder for all processes (rank {', '.join(map(str, blind))} does not see what "
            "rank 0 writes): output, data and model must lie on a disk that all machines share"
        )
