"""Video-Ma2mba: a Mamba-2 video language model for Hugging Face Transformers that watches every frame.

Importing the package registers its classes with transformers' Auto classes (see `registration`), so that
`AutoModelForImageTextToText.from_pretrained` and `AutoProcessor.from_pretrained` know them. That takes the seconds
that torch and transformers take. The `video-ma2mba` command alone puts it off until the first public name is used,
so that `--help` is instant.
"""

import sys
from importlib.metadata import version
from pathlib import PurePath
from typing import Any

__all__ = [
    "CheckpointPlan",
    "InfeasibleMemoryBudget",
    "VideoMa2mbaConfig",
    "VideoMa2mbaForConditionalGeneration",
    "VideoMa2mbaModel",
    "VideoMa2mbaProcessor",
    "VideoMa2mbaVideoProcessor",
    "VideoMemory",
    "plan_checkpoints",
]
__version__ = version("video-ma2mba")


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from . import registration

    return getattr(registration, name)


if PurePath(sys.argv[0] if sys.argv else "").stem != "video-ma2mba":
    from .registration import (
        CheckpointPlan,
        InfeasibleMemoryBudget,
        VideoMa2mbaConfig,
        VideoMa2mbaForConditionalGeneration,
        VideoMa2mbaModel,
        VideoMa2mbaProcessor,
        VideoMa2mbaVideoProcessor,
        VideoMemory,
        plan_checkpoints,
    )
