"""These tests run the Triton kernels: on a GPU, or with TRITON_INTERPRET=1 on a CPU (`make test-kernels`).

Elsewhere, and so in `make test`, they are not collected: importing the kernels beside transformers' own Mamba-2 would
change what that one does in the rest of the process.
"""

import os

import pytest
import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

if INTERPRETED:
    from .interpreter import install

    install()
elif not torch.cuda.is_available():
    collect_ignore_glob = ["test_*.py"]


@pytest.fixture
def device():
    return torch.device("cpu" if INTERPRETED else "cuda")
