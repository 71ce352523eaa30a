"""These tests take long, and some need DeepSpeed, which has an environment of its own: `make test-distributed`."""

from importlib.util import find_spec

from ..training.conftest import stories

__all__ = ["stories"]
collect_ignore_glob = [] if find_spec("deepspeed") else ["test_*.py"]
