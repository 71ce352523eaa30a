"""Most of these tests need DeepSpeed, which has an environment of its own: `make test-distributed`."""

from importlib.util import find_spec

from ..training.conftest import stories

__all__ = ["stories"]
NEED_DEEPSPEED = ["test_exactness.py", "test_training.py", "test_uneven.py"]
collect_ignore = [] if find_spec("deepspeed") else NEED_DEEPSPEED
