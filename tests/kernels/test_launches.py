"""A layer on mamba_ssm's own wrappers launches what the stand-ins of `tests/modeling/test_launches.py` say.

Triton's launches are caught on the meta device, with the fills that its configurations ask for.
"""

from unittest import mock

import pytest
import torch
import triton.runtime.autotuner

from video_ma2mba.modeling import scan_backends, step_kernels

from ..modeling.kernel_stand_ins import stand_ins
from ..modeling.test_launches import Launches, layer


def count(launches, step):
    """Of a layer's pass over some tokens."""
    tokens = 1 if step else 1024
    block, hidden_states, state = layer(launches, tokens, requires_grad=not step)
    with torch.set_grad_enabled(not step), launches:
        out, new_state = block(hidden_states, state)
        if not step:
            torch.autograd.backward((out, *new_state), [torch.empty_like(t) for t in (out, *new_state)])
    return launches.total


@pytest.mark.parametrize("step", [True, False])
def test_as_many_as_the_table_says(step, monkeypatch):
    for cached in (scan_backends._choose, scan_backends._norm_fits):
        cached.cache_clear()
    monkeypatch.setenv("MAMBA_DETERMINISTIC", "0")  # which takes other sums
    real = Launches()

    def caught(self, *args, **kwargs):
        if isinstance(self, triton.runtime.autotuner.Autotuner):
            self.best_config = self.configs[0]
            if self.best_config.pre_hook is not None:
                self.best_config.pre_hook({**dict(zip(self.arg_names, args, strict=False)), **kwargs})
        real.names["triton"] += 1

    _, conv = stand_ins(real.launch)
    monkeypatch.setattr(scan_backends, "_why_not_device", lambda *args: None)
    monkeypatch.setattr(scan_backends, "conv_kernel", lambda: conv)
    ours = type(step_kernels._forward_kernel)
    for launcher in (triton.runtime.autotuner.Autotuner, triton.runtime.autotuner.Heuristics, ours):
        monkeypatch.setattr(launcher, "run", caught)
    found = count(real, step)

    expected = Launches()
    kernels, conv = stand_ins(expected.launch)
    with (
        mock.patch("video_ma2mba.modeling.ssd_kernels.scan_kernels", return_value=kernels),
        mock.patch.object(scan_backends, "conv_kernel", return_value=conv),
    ):
        scan_backends._choose.cache_clear()
        planned = count(expected, step)
    for cached in (scan_backends._choose, scan_backends._norm_fits):
        cached.cache_clear()
    assert abs(found - planned) <= 1, (real.names, expected.names)
