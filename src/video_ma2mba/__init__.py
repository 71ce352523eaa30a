"""Video-Ma2mba: a Mamba-2 video language model for Hugging Face Transformers that watches every frame.

Importing the package registers its classes with transformers' Auto classes (see `registration`), so that
`AutoModelForImageTextToText.from_pretrained` and `AutoProcessor.from_pretrained` know them. That takes the seconds
that torch and transformers take. The `video-ma2mba` command alone puts it off until a command runs, so that `--help`
is instant and what other libraries say of themselves is left out.
"""

import sys
from importlib import import_module
from importlib.metadata import version
from pathlib import PurePath
from typing import TYPE_CHECKING, Any

__version__ = version("video-ma2mba")

# of `python -m video_ma2mba.cli`, as torchrun starts it, sys.argv has the -m alone while the module is looked for
_called = sys.orig_argv if sys.argv[:1] == ["-m"] else [PurePath(*sys.argv[:1]).stem]
if TYPE_CHECKING or not {"video-ma2mba", "video_ma2mba.cli"} & set(_called):
    from .registration import *  # noqa: F403 - the public names, which `registration` lists
    from .registration import __all__ as __all__
else:

    def __getattr__(name: str) -> Any:
        registration = import_module(".registration", __name__)  # `from . import` would ask for the name here
        if name not in registration.__all__:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return getattr(registration, name)
