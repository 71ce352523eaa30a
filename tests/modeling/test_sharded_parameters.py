"""FSDP2 by hand in a group of one process: which policies are refused. All else of it is in tests/distributed."""

import pytest
import torch
import torch.distributed as dist
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from ..tiny import tiny_model

CHECKPOINTING = {"off": None, "layer_major": {"order": "layer_major", "layer_interval": 1, "sequence_interval": 8}}
NARROW = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)


@pytest.fixture(scope="module")
def mesh():
    dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
    yield dist.init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


@pytest.fixture(params=CHECKPOINTING)
def model(request):
    model = tiny_model().train()
    if CHECKPOINTING[request.param]:
        model.gradient_checkpointing_enable(**CHECKPOINTING[request.param])
    return model


def loss_of(model):
    ids = torch.arange(2, 22)[None]
    return model(input_ids=ids, labels=ids).loss


@pytest.mark.parametrize("per_block", [True, False])
def test_a_policy_that_narrows_the_decays_is_refused(mesh, model, per_block):
    for block in model.model.language_model.layers if per_block else ():
        fully_shard(block, mesh=mesh, mp_policy=NARROW)
    fully_shard(model, mesh=mesh, mp_policy=NARROW)
    with pytest.raises(ValueError, match=r"A_log, D and dt_bias.*leave param_dtype out"):
        loss_of(model)


def test_a_policy_of_what_holds_no_decays_is_taken(mesh, model):
    expected = loss_of(model)
    for block in model.model.language_model.layers:
        fully_shard(block, mesh=mesh)
    fully_shard(model.model.vision_tower, mesh=mesh, mp_policy=NARROW)
    fully_shard(model, mesh=mesh)
    torch.testing.assert_close(loss_of(model), expected, rtol=1e-6, atol=0)
