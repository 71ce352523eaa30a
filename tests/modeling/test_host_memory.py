"""Host memory is asked for once, as much as the plan says, and serves every step that follows."""

import pytest
import torch

from video_ma2mba.modeling import host_memory
from video_ma2mba.modeling.host_memory import Borrowed, HostMemory

from ..tiny import tiny_model

TOKENS = 1024


@pytest.fixture
def allocated(monkeypatch):
    """The sizes that were asked of the system, which stands in for one that pins them."""
    sizes, allocate = [], host_memory.allocate

    def counted(num_bytes):
        sizes.append(num_bytes)
        return allocate(num_bytes)

    monkeypatch.setattr(host_memory, "HOST_MEMORY", HostMemory())
    monkeypatch.setattr(host_memory, "allocate", counted)
    return sizes


@pytest.mark.parametrize("order", ["layer_major", "sequence_major"])
def test_a_training_step_takes_what_the_plan_says_and_the_next_one_nothing(allocated, order):
    model = tiny_model(text={"num_hidden_layers": 3}).train()
    model.gradient_checkpointing_enable(offload=True, order=order, layer_interval=1, sequence_interval=64)
    ids = torch.randint(2, 40, (1, TOKENS))
    model(input_ids=ids, labels=ids).loss.backward()
    first = sum(allocated)
    for _ in range(2):
        model(input_ids=ids, labels=ids).loss.backward()
    planned = model.checkpoint_plan(1, TOKENS).predicted_host_bytes
    assert first == pytest.approx(planned, rel=0.05)
    assert sum(allocated) == first
    assert host_memory.HOST_MEMORY.num_bytes == pytest.approx(planned, rel=0.05)


def test_what_is_in_use_is_not_lent_again(allocated):
    memory = HostMemory()
    one, other = memory.lend(100), memory.lend(100)
    one.fill_(1)
    other.fill_(2)
    assert one.sum() == 100
    part = one[10:20]
    del one
    third = memory.lend(50)  # a view of the first is alive
    third.fill_(3)
    assert part.sum() == 10
    assert len(allocated) == 3
    del part
    memory.lend(80)
    assert len(allocated) == 3


def test_what_has_become_too_small_goes(allocated):
    memory = HostMemory()
    for num_bytes in (100, 200, 300):
        memory.lend(num_bytes)
    assert memory.num_bytes == 300


def test_more_than_planned_is_borrowed_besides(allocated):
    borrowed = Borrowed(256)
    tensors = [borrowed.empty((3, 5), dtype) for dtype in (torch.float32, torch.bfloat16, torch.float64, torch.int64)]
    for value, tensor in enumerate(tensors):
        tensor.fill_(value)
    for value, tensor in enumerate(tensors):
        assert (tensor == value).all()
    assert borrowed.empty((0, 4), torch.float32).shape == (0, 4)
    assert len(allocated) == 2
