"""Triton's interpreter in place of a GPU: kernels run on CPU tensors, line by line, in float32.

Must be the first to import triton. It reads TRITON_INTERPRET=1, which whoever starts the process sets.
"""

import contextlib
import sys
import types

import torch
import triton.runtime.autotuner

from . import causal_conv1d_cuda


def install():
    """Make what the wrappers ask of a GPU succeed on a machine that has none."""
    torch.cuda.device = lambda index: contextlib.nullcontext()
    torch.cuda.get_device_properties = lambda device: types.SimpleNamespace(multi_processor_count=4)
    triton.runtime.autotuner.Autotuner.run = run_first_config
    sys.modules["causal_conv1d_cuda"] = causal_conv1d_cuda


def run_first_config(self, *args, **kwargs):
    """Nothing is tuned: the first configuration runs, less what only a compiler understands."""
    self.best_config = self.configs[0]
    named = {**dict(zip(self.arg_names, args, strict=False)), **kwargs, **self.best_config.kwargs}
    if self.best_config.pre_hook is not None:
        self.best_config.pre_hook(named)
    return self.fn.run(*args, **kwargs, **self.best_config.kwargs)
