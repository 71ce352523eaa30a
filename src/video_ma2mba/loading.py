"""Finding and loading a model for someone who typed its name: errors say what to do."""

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

TINY_MODEL = Path(__file__).resolve().parents[2] / "model_cards" / "video-ma2mba-tiny"


def find_model(name: str | None) -> str:
    """The model to load: a folder that has what it takes, or a Hub id.

    Raises:
        ValueError: `name` is no such folder, or None where the tiny model is not at hand; the message says what to do.
    """
    if name is None:
        if not (TINY_MODEL / "config.json").is_file():
            raise ValueError("the tiny model is only at hand in a clone of the repository: name one with --model")
        name = str(TINY_MODEL)
    folder = Path(name).expanduser()
    if folder.is_dir():
        for file, part in (("config.json", "model"), ("processor_config.json", "processor")):
            if not (folder / file).is_file():
                raise ValueError(f"{name}: this folder has no {file}; write it with {part}.save_pretrained({name!r})")
        return str(folder)
    if not re.fullmatch(r"\w[\w.-]*/[\w.-]+", name):
        raise ValueError(f"{name}: there is no such folder, and a Hub id looks like owner/name")
    return name


def load(cls: Any, name: str, **kwargs: Any) -> Any:
    """`cls.from_pretrained` of a configuration, a processor or a model, for someone who is to read the error.

    Raises:
        ValueError: There is nothing of that name, it is another kind of model, or a file of it is damaged.
    """
    from huggingface_hub.errors import HfHubHTTPError
    from transformers import PreTrainedConfig

    try:
        model_type = PreTrainedConfig.get_config_dict(name)[0].get("model_type")
        if model_type != "video_ma2mba":
            raise ValueError(f"{name}: this is a model of type {model_type!r}; this needs one of type 'video_ma2mba'")
        loaded = cls.from_pretrained(name, **kwargs)
        if hasattr(loaded, "apply_chat_template"):
            loaded.apply_chat_template([{"role": "user", "content": "?"}])  # a template is read when it is first used
        return loaded
    except (HfHubHTTPError, OSError) as error:
        if Path(name).is_dir():
            raise
        raise ValueError(f"{name}: there is no such folder, and the Hub does not give it; check the name") from error
    except ValueError:
        raise
    except Exception as error:  # each library has errors of its own for a file that is damaged
        what = " ".join(str(error).split())
        raise ValueError(f"{name}: {cls.__name__} cannot be loaded, a file is damaged: {what}") from error


def load_model(name: str, dtype: str, adapter: str | None) -> Any:
    """The model in eval mode; LoRA adapters are merged into its weights.

    Raises:
        ValueError: There are no such adapters, or they belong to another model.
    """
    import torch

    from . import VideoMa2mbaForConditionalGeneration

    model = load(VideoMa2mbaForConditionalGeneration, name, dtype=getattr(torch, dtype)).eval()
    if adapter is None:
        return model
    if not (Path(adapter) / "adapter_config.json").is_file():
        raise ValueError(f"--adapter {adapter}: there is no adapter_config.json; `train finetune-lora` writes one")
    from peft import PeftModel

    try:
        return PeftModel.from_pretrained(model, adapter).merge_and_unload()
    except RuntimeError as error:  # sizes that do not match
        raise ValueError(f"--adapter {adapter}: these adapters do not fit {name}") from error


def choose_device(name: str) -> "torch.device":
    import torch

    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: torch finds no CUDA device here; use --device cpu")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")
