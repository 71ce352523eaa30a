"""How vLLM reads videos for this model: every frame at the processor's rate, in items of a few frames each."""

import hashlib
import math
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from importlib.metadata import version
from itertools import repeat
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import BatchFeature
from vllm.multimodal.inputs import MultiModalFieldConfig
from vllm.multimodal.parse import MultiModalDataItems, VideoProcessorItems
from vllm.multimodal.processing import (
    BaseDummyInputsBuilder,
    BaseMultiModalProcessor,
    BaseProcessingInfo,
    PromptReplacement,
)
from vllm.multimodal.video import VIDEO_LOADER_REGISTRY, VideoLoader

from ..modeling.configuration_video_ma2mba import VideoMa2mbaConfig
from ..processing.processing_video_ma2mba import VideoMa2mbaProcessor
from .media import check
from .prompts import prefix_hash
from .vllm_frames import frame_folder, place, placed

FRAMES_PER_ITEM = 32  # encoded and held at once; a longer video is several items
_NOT_ASKED = 32  # the number of frames that vLLM takes of a video where nobody says


@VIDEO_LOADER_REGISTRY.register("video_ma2mba", video_processor="VideoMa2mbaVideoProcessor")
class Undecoded(VideoLoader):
    """Hands the file on as it is: `Processor` knows how large frames must be, and decodes them."""

    @classmethod
    def load_bytes(cls, data: bytes, num_frames: int = _NOT_ASKED, fps: float | None = None, **unknown: Any) -> Any:
        if num_frames not in (_NOT_ASKED, -1) or unknown:
            wrong = ", ".join(["num_frames"] * (num_frames not in (_NOT_ASKED, -1)) + [*unknown])
            raise ValueError(f"media_io_kwargs: videos are sampled by fps alone, not by {wrong}")
        return np.frombuffer(data, np.uint8), {"fps": fps}


class Info(BaseProcessingInfo):
    """What vLLM asks of the model's inputs."""

    def get_hf_config(self) -> VideoMa2mbaConfig:
        return self.ctx.get_hf_config(VideoMa2mbaConfig)

    def get_hf_processor(self, **kwargs: object) -> VideoMa2mbaProcessor:
        return self.ctx.get_hf_processor(VideoMa2mbaProcessor, **kwargs)

    def get_supported_mm_limits(self) -> Mapping[str, int | None]:
        return {"image": None, "video": None}

    def get_mm_max_tokens_per_item(self, seq_len: int, mm_counts: Mapping[str, int]) -> Mapping[str, int]:
        tokens = self.get_hf_config().tokens_per_frame
        return {"image": tokens, "video": FRAMES_PER_ITEM * tokens}


class DummyInputs(BaseDummyInputsBuilder[Info]):
    """The largest inputs, by which vLLM plans its memory."""

    def get_dummy_text(self, mm_counts: Mapping[str, int]) -> str:
        return "<video>" * mm_counts.get("video", 0) + "<image>" * mm_counts.get("image", 0)

    def get_dummy_mm_data(self, seq_len: int, mm_counts: Mapping[str, int], mm_options: Any) -> dict[str, Any]:
        side = self.info.get_hf_config().vision_config.image_size
        videos, images = mm_counts.get("video", 0), mm_counts.get("image", 0)
        return {
            "video": [np.zeros((FRAMES_PER_ITEM, side, side, 3), np.uint8)] * videos,
            "image": self._get_dummy_images(width=side, height=side, num_images=images),
        }


class Processor(BaseMultiModalProcessor[Info]):
    """From files and images to placeholders, and to where the frames lie.

    A video becomes items of `FRAMES_PER_ITEM` frames, side by side in the prompt, which is the same prompt: vLLM holds
    the embeddings of an item or two at a time, however long the video, and its frames stay on disk until then.
    """

    def apply(self, inputs: Any, timing_ctx: Any) -> Any:
        prompt = self._tags_apart(inputs.prompt)
        videos = inputs.mm_data_items.get("video")
        if not videos:
            return super().apply(replace(inputs, prompt=prompt), timing_ctx)
        parts, names, counts, side = [], [], [], self.info.get_hf_processor().video_processor.side
        for video, metadata in zip(videos.get_all(), videos.metadata, strict=True):
            name, num_frames = self._kept(video, (metadata or {}).get("fps"))
            starts = range(0, num_frames, FRAMES_PER_ITEM)
            parts += [place(name, start, min(start + FRAMES_PER_ITEM, num_frames), side) for start in starts]
            names += [prefix_hash(name, [[start]]) for start in starts]
            counts.append(len(starts))
        token, left = self.info.get_hf_config().video_token_id, iter(counts)
        prompt = [one for ids in prompt for one in [ids] * (next(left) if ids == token else 1)]
        items = MultiModalDataItems({**inputs.mm_data_items, "video": VideoProcessorItems(parts)})
        uuids = {**(inputs.mm_uuid_items or {}), "video": names}
        return super().apply(replace(inputs, prompt=prompt, mm_data_items=items, mm_uuid_items=uuids), timing_ctx)

    def _tags_apart(self, ids: list[int]) -> list[int]:
        """The tokens of the chat schema: vLLM tokenises a rendered prompt whole, which may fuse a tag with its text."""
        processor = self.info.get_hf_processor()
        tokenizer = processor.tokenizer
        text = tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        segments = processor._split(text, {"video": repeat(None), "image": repeat(None)})
        pieces = tokenizer([segment.text for segment in segments], add_special_tokens=False)["input_ids"]
        return [one for piece in pieces for one in piece]

    def _kept(self, video: Any, fps: float | None) -> tuple[str, int]:
        """The name under which the frames of an undecoded file, or those given, are kept; and how many they are."""
        array, processor = np.asarray(video), self.info.get_hf_processor().video_processor
        fps = fps or processor.fps
        taken = {
            "version": version("video-ma2mba"), "side": processor.side, "resize_mode": processor.resize_mode,
            "image_mean": processor.image_mean, "fps": fps, "shape": array.shape,
            "sha256": hashlib.sha256(np.ascontiguousarray(array).data).hexdigest(),
        }  # fmt: skip
        name = prefix_hash("frames", [taken])
        frames = _decoded(processor, array, fps) if array.ndim == 1 else _given(processor, array)
        return name, frame_folder().keep(name, frames) // (3 * processor.side**2)

    def _call_hf_processor(self, hf_data: Mapping[str, object], hf_kwargs: Mapping[str, object]) -> BatchFeature:
        processor = self.info.get_hf_processor().video_processor
        data: dict[str, Any] = {}
        videos: Any = hf_data.get("videos")
        images: Any = hf_data.get("images")
        if videos:
            data["frames_at"] = [torch.as_tensor(video) for video in videos]
        if images:
            data["pixel_values"] = [processor.load_image(image) for image in images]
        return BatchFeature(data)

    def _get_mm_fields_config(
        self, hf_inputs: BatchFeature, hf_processor_mm_kwargs: Mapping[str, object]
    ) -> Mapping[str, MultiModalFieldConfig]:
        return {
            "frames_at": MultiModalFieldConfig.batched("video", keep_on_cpu=True),
            "pixel_values": MultiModalFieldConfig.batched("image"),
        }

    def _get_prompt_updates(
        self, mm_items: Any, hf_processor_mm_kwargs: Mapping[str, object], out_mm_kwargs: Any
    ) -> Sequence[PromptReplacement]:
        config = self.info.get_hf_config()

        def of_video(item: int) -> list[int]:
            _, start, stop, _ = placed(out_mm_kwargs["video"][item]["frames_at"].data)
            return [config.video_token_id] * ((stop - start) * config.tokens_per_frame)

        return [
            PromptReplacement(modality="video", target=[config.video_token_id], replacement=of_video),
            PromptReplacement(
                modality="image", target=[config.image_token_id],
                replacement=[config.image_token_id] * config.tokens_per_frame,
            ),
        ]  # fmt: skip


def _decoded(processor: Any, data: np.ndarray, fps: float) -> Iterator[np.ndarray]:
    """(3, side, side) uint8, of the bytes of a file."""
    with tempfile.NamedTemporaryFile() as file:
        data.tofile(file)
        file.flush()
        check(Path(file.name), "video", math.inf)
        for frame in processor.open_video(file.name, fps=fps):
            yield frame.pixels.transpose(2, 0, 1)


def _given(processor: Any, frames: np.ndarray) -> Iterator[np.ndarray]:
    """(3, side, side) uint8, of frames in memory."""
    for start in range(0, len(frames), FRAMES_PER_ITEM):
        yield processor.load(frames[start : start + FRAMES_PER_ITEM]).frames.numpy()
