"""Tensors of a checkpoint folder by name, read a few at a time: safetensors, or `.bin` files without code."""

import json
import math
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

_LAYOUTS = ("model.safetensors", "pytorch_model.bin")  # each whole, or in shards with an index beside them


class CheckpointReader:
    """The tensors of `folder`. Only their names, shapes and dtypes are read until `read` is called.

    Attributes:
        shapes: the shape of every tensor, by its name.
        dtypes: likewise, `torch.dtype`.

    Raises:
        ValueError: no weights there, a shard that is missing, truncated or not what the index says, or a `.bin` file
            that is more than plain tensors: unpickling one could run code.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self._files: dict[str, Path] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, torch.dtype] = {}
        files, indexed = _find_files(folder)
        for file in files:
            for name, tensor in _tensors_of(file).items():
                if name in self._files:
                    raise ValueError(f"{file}: holds {name}, which {self._files[name].name} holds too")
                self._files[name] = file
                self.shapes[name], self.dtypes[name] = tuple(tensor.shape), tensor.dtype
        if indexed is not None and indexed != {name: file.name for name, file in self._files.items()}:
            wrong = sorted(set(indexed.items()) ^ {(name, file.name) for name, file in self._files.items()})
            raise ValueError(f"{folder}: the index and the shards disagree about {list_names([n for n, _ in wrong])}")

    def file_names(self) -> set[str]:
        """The files that hold the tensors, and their index where there is one."""
        names = {file.name for file in self._files.values()}
        return names | {path.name for path in self.folder.glob("*.safetensors.index.json")}

    def num_bytes(self, name: str) -> int:
        return math.prod(self.shapes[name]) * self.dtypes[name].itemsize

    def read(self, names: Sequence[str]) -> Iterator[tuple[str, torch.Tensor]]:
        """Yields (name, tensor), file by file. A tensor may be a view of its file: copy what is kept.

        Files are mapped while they are read and let go after it, so that no more stays resident than was asked for.
        """
        by_file: dict[Path, list[str]] = {}
        for name in names:
            by_file.setdefault(self._files[name], []).append(name)
        for file, wanted in by_file.items():
            tensors = _tensors_of(file)
            yield from ((name, tensors[name]) for name in wanted)


def _tensors_of(file: Path) -> dict[str, torch.Tensor]:
    """What a file holds, mapped: of tensors that nobody looks at nothing is read."""
    try:
        if file.suffix == ".safetensors":
            with safe_open(file, framework="pt") as opened:
                return {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 - it is no dict
        # only the zip layout can be mapped; files of before torch 1.6 are read whole
        tensors = torch.load(file, weights_only=True, map_location="cpu", mmap=zipfile.is_zipfile(file))
    except SafetensorError as error:
        raise ValueError(f"{file}: truncated, or not a safetensors file ({error}); download it again") from error
    except Exception as error:  # the kinds of ways in which bytes are no pickle of tensors are without number
        reason = str(error).strip().partition("\n")[0]
        raise ValueError(
            f"{file}: truncated, or a pickle of more than plain tensors, which could run code: it is not loaded "
            f"({type(error).__name__}: {reason[:200]})"
        ) from error
    if not isinstance(tensors, dict):
        raise ValueError(f"{file}: holds a {type(tensors).__name__}, not a dict of tensors")
    for name, value in tensors.items():
        if not isinstance(value, torch.Tensor):
            raise ValueError(f"{file}: {name} is a {type(value).__name__}, not a tensor")
    return tensors


def read_json(folder: Path, name: str) -> dict:
    """The object in a JSON file; what is wrong with it is a ValueError that names the file."""
    try:
        value = json.loads((folder / name).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{folder}: there is no {name}") from None
    except ValueError as error:
        raise ValueError(f"{folder / name}: not valid JSON ({error})") from error
    if not isinstance(value, dict):
        raise ValueError(f"{folder / name}: holds a {type(value).__name__}, not an object")
    return value


def list_names(names: Sequence[str], most: int = 5) -> str:
    """'a, b' or 'a, b, c, d, e and 7 more'"""
    names = list(dict.fromkeys(names))
    rest = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + rest


def _find_files(folder: Path) -> tuple[list[Path], dict[str, str] | None]:
    """The weight files of a folder, and what its index says where it has one: tensor name -> file name."""
    for name in _LAYOUTS:
        if (folder / f"{name}.index.json").is_file():
            indexed = read_json(folder, f"{name}.index.json").get("weight_map")
            if not isinstance(indexed, dict):
                raise ValueError(f"{folder / name}.index.json: has no weight_map")
            shards = sorted(set(indexed.values()))
            if outside := [shard for shard in shards if Path(shard).name != shard]:
                raise ValueError(f"{folder / name}.index.json: points outside its folder: {list_names(outside)}")
            if missing := [shard for shard in shards if not (folder / shard).is_file()]:
                raise ValueError(f"{folder}: missing shards: {list_names(missing)}; download them")
            return [folder / shard for shard in shards], indexed
        if (folder / name).is_file():
            return [folder / name], None
    raise ValueError(f"{folder}: no weights there; looked for {' and '.join(_LAYOUTS)}, whole or with an index")
