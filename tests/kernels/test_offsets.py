"""No operand of any kernel has an element that 32 bits cannot address, at any length of any published model.

The mixer's core runs forward and backward on the meta device; every launch of a kernel is caught and its tensors are
measured, the ones that the kernels' wrappers allocate among them.
"""

import pytest
import torch
import triton.runtime.autotuner

from video_ma2mba.modeling import ssd_kernels, step_kernels
from video_ma2mba.modeling.configuration_video_ma2mba import PRESETS, VideoMa2mbaConfig
from video_ma2mba.modeling.mamba2 import Mamba2Mixer

LIMIT = 2**31 - 1


@pytest.fixture
def offsets(monkeypatch):
    """The largest element offset of every tensor that is given to a kernel."""
    found = []

    def catch(self, *args, **kwargs):
        if isinstance(self, triton.runtime.autotuner.Autotuner):
            self.best_config = self.configs[0]
        for value in (*args, *kwargs.values()):
            if isinstance(value, torch.Tensor) and value.numel():
                steps = zip(value.shape, value.stride(), strict=True)
                found.append(sum((size - 1) * stride for size, stride in steps))

    ours = type(step_kernels._forward_kernel)
    for launcher in (triton.runtime.autotuner.Autotuner, triton.runtime.autotuner.Heuristics, ours):
        monkeypatch.setattr(launcher, "run", catch)
    # the bound alone, not the length of a segment, keeps the calls short
    monkeypatch.setattr(ssd_kernels, "KERNEL_SEGMENT", 2**40)
    return found


def forward_and_backward(preset, batch, tokens):
    config = VideoMa2mbaConfig.from_preset(preset).text_config
    with torch.device("meta"):
        mixer = Mamba2Mixer(config).bfloat16()
        projected = torch.empty(batch, tokens, mixer.shape.projection, dtype=torch.bfloat16, requires_grad=True)
        params = (mixer.conv1d.weight, mixer.conv1d.bias, mixer.dt_bias, mixer.A_log, mixer.D, mixer.norm.weight)
        y, states, again = ssd_kernels.kernel_core(mixer.shape, None, projected, None, mixer.new_state(batch), params)
        again()
        torch.autograd.backward((y, *states), [torch.empty_like(t) for t in (y, *states)])
    assert projected.grad is not None


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("tokens", [2**17, 2**20, 2**23 - 5])
@pytest.mark.parametrize("preset", PRESETS)
def test_no_call_passes_the_limit(preset, tokens, batch, offsets):
    forward_and_backward(preset, batch, tokens)
    assert len(offsets) > 100
    assert max(offsets) <= LIMIT
    assert max(offsets) > LIMIT // 50  # and the calls are not cut into crumbs


def test_without_the_bound_it_does(offsets, monkeypatch):
    """What upstream reports near 203,000 tokens at 2.7B: so the measure above can fail."""
    monkeypatch.setattr(ssd_kernels, "MAX_OFFSET", 2**60)
    forward_and_backward("3.1b", 1, 202_000)
    below = max(offsets)
    offsets.clear()
    forward_and_backward("3.1b", 1, 204_000)
    assert below <= LIMIT < max(offsets)
