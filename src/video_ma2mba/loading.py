"""What someone typed: options are checked, a model is found and loaded by its name; errors say what to do."""

import argparse
import functools
import json
import re
import ssl
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

# Part of an installed package; an editable install has it where the repository keeps it.
_HERE = Path(__file__).resolve().parent
TINY_MODEL = next(
    folder
    for folder in (_HERE / "tiny_model", _HERE.parents[1] / "model_cards" / "video-ma2mba-tiny")
    if folder.is_dir()
)
TINY = "tiny"  # its name, where a command needs one
HUB_TIMEOUT_S = 5


def named(names: Iterable[str]) -> str:
    """Options as one types them: "--max-frames, --fps"."""
    return ", ".join(f"--{name.replace('_', '-')}" for name in names)


def refuse(args: argparse.Namespace, defaults: Mapping[str, Any], why: str) -> None:
    """Raises a ValueError where options that nothing here would follow have another value than their default."""
    if given := [name for name, default in defaults.items() if getattr(args, name, default) != default]:
        raise ValueError(f"{named(given)}: {why}")


def whole(least: int, most: int) -> Callable[[str], int]:
    """A whole number from `least` to `most`, for argparse."""

    def read(text: str) -> int:
        if re.fullmatch(r"[0-9]{1,12}", text) and least <= int(text) <= most:
            return int(text)
        raise argparse.ArgumentTypeError(f"must be a whole number from {least:,} to {most:,}, got {text[:40]}")

    return read


def number(least: float, most: float) -> Callable[[str], float]:
    """A number from `least` to `most`, for argparse."""

    def read(text: str) -> float:
        with suppress(ValueError):
            if text.isascii() and "_" not in text and least <= float(text) <= most:
                return float(text)
        raise argparse.ArgumentTypeError(f"must be a number from {least:g} to {most:g}, got {text[:40]}")

    return read


natural, port_number, seed_number = whole(1, 10**12 - 1), whole(0, 2**16 - 1), whole(0, 2**32 - 1)
positive, seconds, frame_rate = number(1e-9, 1e9), number(0, 1e9), number(1e-9, 1000)  # so that a video's reading ends


def output_folder(text: str) -> Path:
    """A folder that is there or can be made, for argparse."""
    if Path(text).exists() and not Path(text).is_dir():
        raise argparse.ArgumentTypeError(f"{text} is a file; name a folder")
    return Path(text)


def output(text: str) -> Path:
    """A file or folder to write into a folder that is there, for argparse."""
    if not Path(text).resolve().parent.is_dir():
        raise argparse.ArgumentTypeError(f"cannot write {text}: create the folder {Path(text).parent} first")
    return Path(text)


def output_file(text: str) -> Path:
    """As `output`, but a file."""
    if Path(text).is_dir():
        raise argparse.ArgumentTypeError(f"cannot write {text}: it is a folder; name a file")
    return output(text)


def named_model(name: str) -> str:
    """The folder of the tiny model for "tiny", unless there is a folder of that name here; any other name as it is."""
    return str(TINY_MODEL) if name == TINY and not Path(name).exists() else name


def find_model(name: str | None) -> str:
    """The model to load: a folder that has what it takes, or a Hub id; the tiny model for None and for "tiny".

    Raises:
        ValueError: `name` is no such folder; the message says what to do.
    """
    name = named_model(TINY if name is None else name)
    folder = Path(name).expanduser()
    if name and folder.is_dir():  # Path("") is the folder one is in
        if (folder / "adapter_config.json").is_file() and not (folder / "config.json").is_file():
            raise ValueError(
                f"{name}: these are LoRA adapters and no model; name the model they were trained on, and give them "
                "with --adapter, or make one model of both with `video-ma2mba merge`"
            )
        for file, part in (("config.json", "model"), ("processor_config.json", "processor")):
            if not (folder / file).is_file():
                raise ValueError(f"{name}: this folder has no {file}; write it with {part}.save_pretrained({name!r})")
        return str(folder)
    if not is_hub_id(name):
        raise ValueError(f"{name}: there is no such folder, and a Hub id looks like owner/name")
    return name


def is_hub_id(name: str) -> bool:
    """Whether this can only be the id of a repository on the Hub: owner/name, and no such folder here."""
    return re.fullmatch(r"\w[\w.-]*/[\w.-]+", name) is not None and not Path(name).exists()


@functools.cache
def hub_answers() -> bool:
    """Whether the Hub can be reached, by one short request.

    If it cannot, its client is told so: it then takes what it keeps here at once, and tries nothing again for a minute.
    """
    from huggingface_hub import constants

    if not constants.HF_HUB_OFFLINE:
        try:
            urllib.request.urlopen(urllib.request.Request(constants.ENDPOINT, method="HEAD"), timeout=HUB_TIMEOUT_S)
        except urllib.error.HTTPError:
            pass  # an answer, if not a kind one
        except OSError as error:  # a certificate that only we do not know is the client's affair
            constants.HF_HUB_OFFLINE = not isinstance(getattr(error, "reason", error), ssl.SSLError)
    return not constants.HF_HUB_OFFLINE


def not_from_the_hub(name: str) -> str:
    """What to tell someone whose `name` is no folder and was not had from the Hub."""
    if not is_hub_id(name):
        return f"{name}: there is no such folder; check the name. A repository on the Hub is written owner/name"
    if hub_answers():
        return (
            f"{name}: there is no such folder, and the Hub does not give it; check the name, or `hf auth login` first"
        )
    return f"{name}: there is no such folder, the Hub cannot be reached, and no copy of it is kept on this machine"


@contextmanager
def reading(name: str | Path, what: str) -> Iterator[None]:
    """Files of `name` are read in here by libraries, each of which has errors of its own for one that is damaged.

    Raises:
        ValueError: In place of what is neither a ValueError nor an OSError already, or does not say which file it is.
    """
    try:
        yield
    except Exception as error:
        said = " ".join(str(error).split())
        is_nameless = isinstance(error, json.JSONDecodeError | UnicodeDecodeError)
        if isinstance(error, ValueError | OSError) and not is_nameless:
            if isinstance(error, OSError) or "\n" not in str(error).strip():
                raise
            raise ValueError(f"{name}: {what} cannot be loaded: {said}") from error
        raise ValueError(f"{name}: {what} cannot be loaded, a file is damaged: {said}") from error


def load(cls: Any, name: str, **kwargs: Any) -> Any:
    """`cls.from_pretrained` of a configuration, a processor or a model, for someone who is to read the error.

    Raises:
        ValueError: There is nothing of that name, it is another kind of model, or a file of it is damaged.
    """
    import numpy as np
    from huggingface_hub.errors import HfHubHTTPError
    from transformers import PreTrainedConfig, PreTrainedModel

    if is_hub_id(name):
        hub_answers()
    elif issubclass(cls, PreTrainedModel):
        check_weights(name)
    try:
        with reading(name, cls.__name__):
            model_type = PreTrainedConfig.get_config_dict(name)[0].get("model_type")
            if model_type != "video_ma2mba":
                raise ValueError(
                    f"{name}: this is a model of type {model_type!r}; this needs one of type 'video_ma2mba'"
                )
            if issubclass(cls, PreTrainedModel):
                (loaded, report), wrong = cls.from_pretrained(name, output_loading_info=True, **kwargs), []
                # transformers would make up what is missing, and leave out what it does not expect
                for kind, said in (("missing_keys", "the weights lack"), ("unexpected_keys", "it has no place for")):
                    if report[kind]:
                        wrong.append(f"{said} {', '.join(sorted(report[kind]))}")
                if wrong:
                    raise ValueError(f"{name}: a file is damaged, {'; '.join(wrong)}")
                known = range(loaded.config.text_config.vocab_size)
                for field in ("bos_token_id", "eos_token_id", "pad_token_id"):  # which only `generate` looks at
                    ids = getattr(loaded.generation_config, field)
                    if ids is not None and not all(one in known for one in (ids if isinstance(ids, list) else [ids])):
                        raise ValueError(f"{name}: generation_config.json is damaged, its {field} is {ids!r}")
                return loaded
            loaded = cls.from_pretrained(name, **kwargs)
            if hasattr(loaded, "apply_chat_template"):
                # its template, tokens and sizes are looked at when they are first used
                black = np.zeros((1, 8, 8, 3), np.uint8)
                content = [{"type": "video", "video": black}, {"type": "text", "text": "?"}]
                loaded.apply_chat_template([{"role": "user", "content": content}], tokenize=True)
            return loaded
    except (HfHubHTTPError, OSError) as error:
        if Path(name).is_dir():
            raise
        raise ValueError(not_from_the_hub(name)) from error


def check_weights(name: str) -> None:
    """Refuse a folder that only describes a model.

    Raises:
        ValueError: it holds no weights.
    """
    folder = Path(name)
    if folder.is_dir() and not any(next(folder.glob(end), None) for end in ("*.safetensors", "pytorch_model*.bin")):
        raise ValueError(
            f"{name}: this folder describes a model and holds no weights, there is no model.safetensors; take one that "
            "`train` or save_pretrained wrote, or make an untrained model with `video-ma2mba convert init`"
        )


def load_model(name: str, dtype: "torch.dtype | str", adapter: str | None) -> Any:
    """The model in eval mode; LoRA adapters are merged into its weights.

    Raises:
        ValueError: There are no such adapters, or they belong to another model.
    """
    from . import VideoMa2mbaForConditionalGeneration

    model = load(VideoMa2mbaForConditionalGeneration, name, dtype=dtype).eval()
    if adapter is None:
        return model
    if not (Path(adapter) / "adapter_config.json").is_file() and not is_hub_id(adapter):
        raise ValueError(f"--adapter {adapter}: there is no adapter_config.json; `train finetune-lora` writes one")
    if is_hub_id(adapter):
        fetch_adapter(adapter)
    from peft import PeftModel, get_peft_model_state_dict
    from peft.utils import load_peft_weights

    with reading(f"--adapter {adapter}", "adapters"):
        weights = load_peft_weights(adapter, device="cpu")
        try:
            adapted = PeftModel.from_pretrained(model, adapter)
        except RuntimeError as error:  # sizes that do not match
            raise ValueError(f"--adapter {adapter}: these adapters do not fit {name}") from error
        # PEFT goes on without adapters that it finds no weights for, and without weights that it finds no place for
        if wrong := sorted(weights.keys() ^ get_peft_model_state_dict(adapted, save_embedding_layers=False).keys()):
            raise ValueError(
                f"--adapter {adapter}: its config and its weights disagree about {', '.join(wrong)}; or these adapters "
                f"do not fit {name}"
            )
        return adapted.merge_and_unload()


def fetch_adapter(name: str) -> None:
    """Adapters of the Hub, into its client's folder: PEFT would say anything of what goes wrong here."""
    from huggingface_hub import hf_hub_download

    hub_answers()
    try:
        hf_hub_download(name, "adapter_config.json")
    except OSError as error:
        raise ValueError(not_from_the_hub(name)) from error


def choose_dtype(name: str | None, device: "torch.device") -> "torch.dtype":
    """The dtype of that name; of "auto" or None bfloat16 on a GPU, else float32."""
    import torch

    if name in ("auto", None):
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return getattr(torch, name)


def choose_device(name: str) -> "torch.device":
    import torch

    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: torch finds no CUDA device here; use --device cpu")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")
