"""A command prints what it has to say: what other libraries say of themselves is not for its reader."""

import logging
import os
import warnings

# Of packages that transformers imports wherever they are installed, and of what the Hub's client tries again.
CHATTY = ("torchao", "torch.utils._pytree", "huggingface_hub", "httpx")


def silence_other_libraries() -> None:
    """Leave out progress bars, advice and notes of the libraries underneath; what goes wrong still raises."""
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # what one of them will rename one day, another of them will follow
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"(transformers|peft|accelerate|torch)\.")
    import torch  # noqa: F401 - it sets up its loggers, which must be there to be told

    for name in CHATTY:
        logging.getLogger(name).setLevel(logging.ERROR)
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
