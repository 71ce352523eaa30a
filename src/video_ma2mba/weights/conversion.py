"""Carry out a conversion: check every tensor against the model, then stream them into a folder of safetensors."""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from ..files import whole_folder
from ..loading import load

# from there, because transformers must know the classes before a folder that holds code is written or read
from ..registration import VideoMa2mbaConfig, VideoMa2mbaForConditionalGeneration, VideoMa2mbaProcessor
from .checkpoint_reader import CheckpointReader, list_names
from .mapping import Source

SHARD_BYTES = 2**30
Progress = Callable[[str, float, float | None], None]
_HEAD, _TABLE = "lm_head.weight", "model.language_model.embeddings.weight"


@dataclass
class Conversion:
    """What will become a folder.

    Attributes:
        sources: checkpoints whose tensors make up the model.
        fresh: our name -> tensors that no source has.
    """

    config: VideoMa2mbaConfig
    processor: VideoMa2mbaProcessor
    sources: list[Source]
    fresh: dict[str, torch.Tensor] = field(default_factory=dict)

    def dropped(self) -> dict[str, list[str]]:
        """Why tensors are left out -> which, by the names of their source."""
        by_reason: dict[str, list[str]] = {}
        for source in self.sources:
            for name, reason in source.dropped.items():
                by_reason.setdefault(reason, []).append(name)
        return by_reason

    def write(
        self, folder: Path, dtype: torch.dtype | None = None, verify: bool = False, shard_bytes: int = SHARD_BYTES,
        progress: Progress = lambda what, done, total: None,
    ) -> None:  # fmt: skip
        """Write the model, its code and its processor to `folder`, whole or not at all.

        One shard of the result is in memory at a time. The parameters that decide how fast a state decays stay float32.

        Args:
            folder: must not exist yet, or be empty.
            dtype: of the other tensors; None: that of the source's embedding table.
            verify: afterwards compare every tensor with its source, load the folder and run a forward pass; this takes
                the memory of the whole model.
            shard_bytes: size of a file of weights at most, where no single tensor is larger.
            progress: called with what is being done, and bytes done and in all.

        Raises:
            ValueError: a missing tensor or a wrong shape, by name; a folder that is there already; a failed
                verification.
        """
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise ValueError(f"{folder}: is there already; remove it or choose another folder")
        if not folder.parent.is_dir():
            raise ValueError(f"{folder}: create the folder {folder.parent} first")
        with torch.device("meta"):
            model = VideoMa2mbaForConditionalGeneration(self.config)
        self._check(model)
        dtype = dtype or self._source_dtype()
        dtypes = {
            name: torch.float32 if any(part in name for part in model._keep_in_fp32_modules_strict) else dtype
            for name, _ in self._wanted(model)
        }
        with whole_folder(folder) as partial:
            # everything but the weights: config, generation config and code
            model.to(dtype).save_pretrained(partial, state_dict={})  # type: ignore[arg-type]  # a decorator hides `to`
            (partial / "model.safetensors").unlink(missing_ok=True)  # some versions write an empty one
            self.processor.save_pretrained(partial)
            sizes = {name: tensor.numel() * dtypes[name].itemsize for name, tensor in self._wanted(model)}
            shards = _shards(sizes, shard_bytes)
            self._write_weights(partial, shards, dtypes, progress)
            if verify:
                self._verify(partial, dtypes, progress)

    def _wanted(self, model: VideoMa2mbaForConditionalGeneration) -> Iterator[tuple[str, torch.Tensor]]:
        tied = self.config.tie_word_embeddings
        return ((name, tensor) for name, tensor in model.state_dict().items() if not (tied and name == _HEAD))

    def _check(self, model: VideoMa2mbaForConditionalGeneration) -> None:
        """Nothing missing, nothing left over, every shape right; a tied head equal to its table."""
        if self.config.tie_word_embeddings:
            for source in self.sources:
                if (head := source.names.pop(_HEAD, None)) is not None:
                    both = dict(source.reader.read([head, source.names[_TABLE]]))
                    if not torch.equal(both[head], both[source.names[_TABLE]]):
                        raise ValueError(
                            f"{source.reader.folder}: the config says that the head is tied to the embeddings, but "
                            f"{head} differs from {source.names[_TABLE]}"
                        )
                    source.dropped[head] = "tied: the same tensor as the embeddings"
        wanted, problems = dict(self._wanted(model)), []
        missing = wanted.keys() - self.fresh.keys()
        for source in self.sources:
            missing -= source.names.keys()
            if unplaced := [theirs for ours, theirs in source.names.items() if ours not in wanted]:
                problems.append(f"{source.reader.folder}: the config describes a model without {list_names(unplaced)}")
            for ours, theirs in source.names.items():
                found = source.reader.shapes[theirs]
                if ours in wanted and found != (expected := tuple(wanted[ours].shape)):
                    problems.append(
                        f"{source.reader.folder}: {theirs} has the shape {found}, the config says {expected}"
                    )
        if missing:
            folders = " and ".join(str(source.reader.folder) for source in self.sources)
            problems.append(f"{folders}: no tensor for {list_names(sorted(missing))}")
        if problems:
            raise ValueError("; ".join(problems))

    def _source_dtype(self) -> torch.dtype:
        source = next(source for source in self.sources if _TABLE in source.names)
        return source.reader.dtypes[source.names[_TABLE]]

    def _tensors(self, names: list[str], dtypes: dict[str, torch.dtype]) -> Iterator[tuple[str, torch.Tensor]]:
        """(our name, tensor of its dtype that is no view of a file), in whatever order the files give them."""
        for source in self.sources:
            ours = {source.names[name]: name for name in names if name in source.names}
            for theirs, tensor in source.reader.read(list(ours)):
                yield ours[theirs], tensor.to(dtypes[ours[theirs]], copy=True).contiguous()
        for name in names:
            if name in self.fresh:
                yield name, self.fresh[name].to(dtypes[name])

    def _write_weights(
        self, folder: Path, shards: list[dict[str, int]], dtypes: dict[str, torch.dtype], progress: Progress
    ) -> None:
        total = sum(sum(shard.values()) for shard in shards)
        index, done = {}, 0
        for number, shard in enumerate(shards, 1):
            file = f"model-{number:05}-of-{len(shards):05}.safetensors" if len(shards) > 1 else "model.safetensors"
            tensors = {}
            for name, tensor in self._tensors(list(shard), dtypes):
                tensors[name] = tensor
                done += tensor.nbytes
                progress("Converting", done, total)
            save_file(tensors, folder / file, metadata={"format": "pt"})
            index.update(dict.fromkeys(shard, file))
        if len(shards) > 1:
            value = {"metadata": {"total_size": total}, "weight_map": index}
            (folder / "model.safetensors.index.json").write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")

    def _verify(self, folder: Path, dtypes: dict[str, torch.dtype], progress: Progress) -> None:
        written = CheckpointReader(folder)
        done, total = 0, sum(written.num_bytes(name) for name in written.shapes)
        for name in dtypes:
            (_, found), (_, expected) = next(written.read([name])), next(self._tensors([name], dtypes))
            if not torch.equal(found, expected):
                raise ValueError(f"verification failed: {name} in {folder} is not what its source holds")
            done += found.nbytes
            progress("Verifying", done, total)
        check_answers(folder)


def check_answers(folder: Path) -> str:
    """Load a model and its processor, and let it answer a question about one frame; returns the answer.

    Raises:
        ValueError: weights that are not all there, or too many; logits that are not finite.
    """
    model = load(VideoMa2mbaForConditionalGeneration, str(folder))
    return answer_to_a_frame(folder, model, load(VideoMa2mbaProcessor, str(folder)))


def answer_to_a_frame(name: str | Path, model: Any, processor: VideoMa2mbaProcessor) -> str:
    """What the model called `name` says of one black frame.

    Raises:
        ValueError: its logits are not finite.
    """
    side = processor.video_processor.side
    frames = torch.zeros(1, side, side, 3, dtype=torch.uint8).numpy()
    content = [{"type": "video", "video": frames}, {"type": "text", "text": "What is shown?"}]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=True
    )
    with torch.no_grad():
        logits = model(**inputs, logits_to_keep=1).logits
    if not logits.isfinite().all():
        raise ValueError(f"{name}: the logits of a forward pass are not finite")
    ids = model.generate(**inputs, max_new_tokens=8)[0, inputs["input_ids"].shape[1] :]
    return processor.decode(ids, skip_special_tokens=True).strip()


def _shards(sizes: dict[str, int], most: int) -> list[dict[str, int]]:
    """Cut name -> bytes, in order, into parts of at most `most` bytes."""
    shards: list[dict[str, int]] = [{}]
    for name, size in sizes.items():
        if shards[-1] and sum(shards[-1].values()) + size > most:
            shards.append({})
        shards[-1][name] = size
    return shards
