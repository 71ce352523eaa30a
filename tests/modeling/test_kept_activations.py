"""Without checkpointing a CPU keeps what autograd needs, where it fits, and computes nothing twice."""

import psutil
import pytest
import torch

from video_ma2mba.modeling import mamba2

from ..tiny import tiny_model
from .reference import Made

TOKENS = 700


def step(model, ids):
    model.zero_grad()
    with Made() as made:
        loss = model(input_ids=ids, labels=ids).loss
    held = sum(made.held_bytes())
    loss.backward()
    return held, loss.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_only_where_it_fits(dtype, monkeypatch):
    model = tiny_model(dtype).train()
    ids = torch.randint(2, 40, (1, TOKENS), generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr(mamba2, "free_bytes", lambda: 2**40)
    held, loss, gradients = step(model, ids)
    monkeypatch.setattr(mamba2, "free_bytes", lambda: 0)
    held_less, same_loss, expected = step(model, ids)
    assert torch.equal(loss, same_loss)
    assert gradients.keys() == expected.keys()
    if dtype == torch.bfloat16:  # autograd would sum what the segments give in bfloat16
        assert held == held_less
        return
    assert held > 3 * held_less
    for name, theirs in expected.items():
        assert (gradients[name] - theirs).norm() <= 1e-5 * theirs.norm(), name


def test_what_it_keeps_is_what_is_counted(monkeypatch):
    """The last free byte that is too little, found by halving, against what is held after the forward pass."""
    model = tiny_model(text={"num_hidden_layers": 6}).train()
    ids = torch.randint(2, 40, (1, TOKENS), generator=torch.Generator().manual_seed(0))
    language_model, embeds = model.model.language_model, torch.zeros(1, TOKENS, 32)
    low, high = 0, 2**40
    while high - low > 1:
        free = (low + high) // 2
        monkeypatch.setattr(mamba2, "free_bytes", lambda free=free: free)
        low, high = (low, free) if language_model._may_keep(embeds) else (free, high)
    monkeypatch.setattr(mamba2, "free_bytes", lambda: 2**40)
    held, _, _ = step(model, ids)
    assert high / 2 == pytest.approx(held, rel=0.1)


def test_memory_that_only_remembers_files_is_free():
    assert mamba2.free_bytes() == pytest.approx(psutil.virtual_memory().available, rel=0.1)


@pytest.mark.parametrize("free", [0, 2**40])
def test_modules_are_called_as_often_whatever_the_length(free, monkeypatch):
    """ZeRO-3 follows the calls of each process and gathers by them: another number of calls hangs all of them."""
    monkeypatch.setattr(mamba2, "free_bytes", lambda: free)
    model = tiny_model().train()
    called = []
    for name, module in model.model.language_model.named_modules():
        module.register_forward_pre_hook(lambda *_, name=name: called.append(name))
    seen = []
    for length in (5, 64, 3000):
        ids = torch.randint(2, 40, (1, length), generator=torch.Generator().manual_seed(0))
        step(model, ids)
        seen.append(list(called))
        called.clear()
    assert seen[0] == seen[1] == seen[2]
