"""A video memory as a folder: states and timestamps in safetensors, the rest in JSON, written whole or not at all.

It says which model and processor it belongs to, and is read back for these alone: the states mean nothing to another.
"""

import hashlib
import json
import os
import re
import shutil
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from .mamba2 import LayerState, Mamba2Cache

FORMAT_VERSION = 1
CONFIG_NAME, STATES_PREFIX = "video_memory.json", "states-"
FINGERPRINT_ELEMENTS = 1024  # of each weight
# where a model came from and how it is run; not what it computes
_INCIDENTAL = {
    "_name_or_path", "transformers_version", "dtype", "auto_map", "architectures", "scan_backend", "vision_chunk_size",
    "prefill_chunk_size", "loss_chunk_size",
}  # fmt: skip


def check_place(folder):
    """Refuse a folder that a memory cannot be written to.

    Raises:
        FileExistsError: it holds something else.
    """
    folder = Path(folder)
    if not folder.exists() or (folder / CONFIG_NAME).is_file():
        return
    if not folder.is_dir() or set(folder.iterdir()) - set(_states_in(folder)):
        raise FileExistsError(f"{folder}: holds something other than a video memory; choose another folder")


def write_memory(folder, model, processor, *, caches, timestamps_s, described):
    """Write the states under a name of their own, and then the JSON that names them, in one stroke.

    Args:
        caches: name -> `Mamba2Cache`. timestamps_s: seconds, one per frame. described: what else the JSON is to say.

    Raises:
        OSError: it cannot be written; what was in `folder` is still there.
    """
    folder = Path(folder)
    check_place(folder)
    is_new, tensors, places = not folder.exists(), {}, set()
    for name, cache in caches.items():
        for layer, state in enumerate(cache.layers):
            for field in LayerState._fields:
                tensor = getattr(state, field).contiguous()
                place = tensor.untyped_storage().data_ptr()
                # a snapshot after which nothing was watched has the very states of the memory; files have each once
                tensors[f"{name}.{layer}.{field}"] = tensor.clone() if place in places else tensor
                places.add(place)
    tensors["timestamps_s"] = torch.tensor(timestamps_s, dtype=torch.float64)
    partial = folder / f".partial-{os.getpid()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        save_file(tensors, partial)
        digest = _file_hash(partial)
        states = folder / f"{STATES_PREFIX}{digest[:16]}.safetensors"
        partial.replace(states)
        described = {
            "format_version": FORMAT_VERSION,
            **identity(model, processor),
            "states": states.name,
            "states_sha256": digest,
            "num_tokens_of": {name: cache.num_tokens for name, cache in caches.items()},
            **described,
        }
        described["sha256"] = _hash(described)
        partial.write_text(json.dumps(described, indent=2) + "\n", encoding="utf-8")
        partial.replace(folder / CONFIG_NAME)  # from here on it is the new memory, all at once
    except BaseException as error:
        if is_new:
            shutil.rmtree(folder, ignore_errors=True)
        if isinstance(error, SafetensorError):  # its writer says so of a full disk, with the number in its words
            number = re.search(r"os error (\d+)", str(error))
            failure = OSError(f"{folder}: could not be written: {error}")
            failure.errno = int(number[1]) if number else None
            raise failure from error
        raise
    finally:
        _remove_leftovers(folder)


def _remove_leftovers(folder):
    """What the JSON does not name: states of an older memory, or of a save that was cut off."""
    if not (folder / CONFIG_NAME).is_file():
        return
    kept = _read_json(folder / CONFIG_NAME).get("states")
    for path in _states_in(folder):
        if path.name != kept:
            path.unlink(missing_ok=True)


def _states_in(folder):
    """States, whole or half written: all that a save may leave that was cut off before there was a memory."""
    return [*folder.glob(f"{STATES_PREFIX}*.safetensors"), *folder.glob(".partial-*")]


def read_memory(folder, model, processor):
    """What `write_memory` wrote: the JSON, name -> `Mamba2Cache` on the model's device, and timestamps in seconds.

    Raises:
        ValueError: no memory there, a damaged one, one of a newer format, or one of another model or processor.
    """
    folder = Path(folder)
    described = _read_json(folder / CONFIG_NAME)
    if (version := described.get("format_version")) != FORMAT_VERSION:
        raise ValueError(
            f"{folder}: a memory of format {version!r}; this version of the library reads format {FORMAT_VERSION}"
        )
    if described.pop("sha256", None) != _hash(described):
        raise ValueError(f"{folder / CONFIG_NAME}: damaged; watch the video again")
    for name, value in identity(model, processor).items():
        if described.get(name) != value:
            raise ValueError(
                f"{folder}: the memory of another model (its {name.partition('_')[0]} differs): load the model that "
                "watched the video"
            )
    name = str(described.get("states"))
    path = folder / Path(name).name
    if not path.is_file() or _file_hash(path) != described.get("states_sha256"):
        raise ValueError(f"{path}: missing or damaged; watch the video again")
    with safe_open(path, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no dict
    num_layers = model.config.text_config.num_hidden_layers

    def cache(name, num_tokens):
        layers = [
            LayerState(*(tensors[f"{name}.{layer}.{field}"].to(model.device) for field in LayerState._fields))
            for layer in range(num_layers)
        ]
        return Mamba2Cache(layers, num_tokens)

    caches = {name: cache(name, num_tokens) for name, num_tokens in described["num_tokens_of"].items()}
    return described, caches, tensors["timestamps_s"].tolist()


def identity(model, processor):
    """What the states depend on besides the video: hashes of configuration, weights, and prompt and frames."""
    return {
        "config_sha256": _hash(_essential(model.config.to_dict())),
        "weights_sha256": _fingerprint(model),
        "processor_sha256": _hash(_prompt_and_frames(processor)),
    }


def _essential(value):
    if isinstance(value, dict):
        return {name: _essential(item) for name, item in value.items() if name not in _INCIDENTAL}
    return value


def _fingerprint(model):
    """Of some elements of every weight: training changes them, and reading them takes no second."""
    digest = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        flat = parameter.detach().flatten()
        sample = flat[:: max(1, flat.numel() // FINGERPRINT_ELEMENTS)].float().cpu().contiguous()
        digest.update(name.encode())
        digest.update(sample.numpy().tobytes())
    return digest.hexdigest()


def _prompt_and_frames(processor):
    video = processor.video_processor
    ids = processor.tokenizer("<|system|>You <|user|>What is shown? <|assistant|>")["input_ids"]
    return [ids, processor.chat_template, video.size, video.image_mean, video.image_std, video.resize_mode]


def _hash(value):
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


def _file_hash(path):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _read_json(path):
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise ValueError(f"{path.parent}: no video memory there: it has no {path.name}") from None
    except ValueError as error:
        raise ValueError(f"{path}: damaged ({error}); watch the video again") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path}: damaged, not a JSON object; watch the video again")
    return value
