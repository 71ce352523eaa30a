"""How many kernels a layer launches on a GPU, counted without one.

A launch is one operator that is no view and does more than allocate, seen by a dispatch mode on the meta device; the
calls of mamba_ssm and causal_conv1d are stand-ins that count as `LAUNCHES` says. Bytes are those of all tensors that a
launch reads or writes, weights left out.
"""

from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from video_ma2mba import VideoMa2mbaConfig
from video_ma2mba.modeling import checkpoint_costs, mamba2, scan_backends, ssd_kernels
from video_ma2mba.modeling.mamba2_cache import LayerState, OwnLayerState

from .kernel_stand_ins import LAUNCHES, stand_ins

NO_LAUNCH = {
    "aten::empty", "aten::empty_like", "aten::new_empty", "aten::empty_strided", "aten::new_empty_strided",
    "aten::_unsafe_view",
}  # fmt: skip


class Launches(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names, self.num_bytes, self.weights = Counter(), 0, set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        name, returns = func._schema.name, func._schema.returns
        tensors = [leaf for leaf in tree_leaves(out) if isinstance(leaf, torch.Tensor)]
        is_view = any(one.alias_info is not None and not one.alias_info.is_write for one in returns)
        if not is_view and tensors and name not in NO_LAUNCH:
            self.names[name] += 1
            in_place = any(one.alias_info is not None for one in returns)
            self.add_bytes(*tree_leaves((args, kwargs)), *(() if in_place else tensors))
        return out

    def launch(self, name, *tensors):
        if name is not None:
            self.names[name] += LAUNCHES[name]
        self.add_bytes(*tensors)

    def add_bytes(self, *tensors):
        for tensor in tensors:
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage()._cdata not in self.weights:
                self.num_bytes += tensor.nbytes

    @property
    def total(self):
        return sum(self.names.values())


@pytest.fixture
def launches(monkeypatch):
    launches = Launches()
    kernels, conv = stand_ins(launches.launch)
    for cached in (scan_backends._choose, scan_backends._norm_fits):
        cached.cache_clear()
    monkeypatch.setattr(scan_backends, "_why_not_device", lambda *args: None)
    for module in (scan_backends, ssd_kernels):
        monkeypatch.setattr(module, "scan_kernels", lambda: kernels)
    monkeypatch.setattr(scan_backends, "conv_kernel", lambda: conv)
    yield launches
    for cached in (scan_backends._choose, scan_backends._norm_fits):
        cached.cache_clear()


def layer(launches, tokens, requires_grad):
    """A layer of the 2.7B backbone in bfloat16, hidden states and a state."""
    with torch.device("meta"):
        block = mamba2.Mamba2Block(VideoMa2mbaConfig.from_preset("3.1b").text_config).bfloat16()
        hidden_states = torch.empty(1, tokens, 2560, requires_grad=requires_grad)
        state = LayerState(*(t.requires_grad_(requires_grad) for t in block.mixer.new_state(1)))
    launches.weights = {p.untyped_storage()._cdata for p in block.parameters()}
    return block, hidden_states, state


@pytest.mark.parametrize("tokens", [2048, 24576])
def test_they_do_not_grow_with_the_tokens(launches, tokens):
    block, hidden_states, state = layer(launches, tokens, requires_grad=True)
    with launches:
        out, new_state = block(hidden_states, state)
        forward, num_bytes = launches.total, launches.num_bytes
        outputs = out, *new_state
        torch.autograd.backward(outputs, [torch.empty_like(t) for t in outputs])
    assert hidden_states.grad is not None
    print(f"\n{tokens} tokens: {forward} forward, {launches.total} in all, {num_bytes / tokens / 1e3:.0f} kB a token")
    assert launches.total <= 60
    assert forward + launches.total == checkpoint_costs.LAUNCHES
    assert num_bytes / tokens <= 230e3


def test_a_decode_step(launches):
    """Ten, and none of them allocates a state."""
    block, hidden_states, state = layer(launches, 1, requires_grad=False)
    state = OwnLayerState(*state)
    with torch.no_grad(), launches:
        _, new_state = block(hidden_states, state)
    assert new_state is state
    print(f"\na token: {launches.total}")
    assert launches.total <= 10
    assert not launches.names["aten::clone"]
