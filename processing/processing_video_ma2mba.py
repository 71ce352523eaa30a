"""From conversations with videos to the tensors the model takes: chat schema, placeholders, padding, labels."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Unpack

import torch
from transformers import AddedToken, BatchFeature, ProcessorMixin

from .chat_video_ma2mba import TAGS, ChatSchema, Segment, media_source
from .video_processing_video_ma2mba import FrameSampling, VideoMa2mbaVideoProcessor, flatten_videos, stack_rows

IGNORED_LABEL = -100
_PAD_TOKEN = "<|padding|>"
_SAMPLING_KEYS = ("fps", "max_frames", "start_s", "end_s")


class VideoMa2mbaProcessorOptions(FrameSampling, total=False):
    """What `VideoMa2mbaProcessor` takes in every call.

    Attributes:
        fps, max_frames, start_s, end_s, strict: Which frames of video files to take; see `read_frames`. The first four
            may also stand in a video's own content entry, for that video alone.
        padding: Bring all rows to the length of the longest (default True).
        padding_side: "left" (default), as generation needs it, or "right".
        pad_to_multiple_of: Pad on, to the next multiple of this many tokens (default 1).
        return_tensors: "pt" (default), "np", or None for lists of ids.
        return_labels: Also return `labels` (chats only): the ids of the answers and of the end of their turns, -100
            elsewhere.
        return_timestamps: Also return `video_timestamps`: per row, per video, the seconds of its frames (or None).
    """

    padding: bool | str
    padding_side: str
    pad_to_multiple_of: int
    return_tensors: str | None
    return_labels: bool
    return_timestamps: bool


@dataclass
class _Row:
    """One sample before it is padded."""

    ids: list[int] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)
    videos: list[torch.Tensor] = field(default_factory=list)  # (frames, 3, side, side) each
    images: list[torch.Tensor] = field(default_factory=list)  # (1, 3, side, side) each
    timestamps: list[list[float] | None] = field(default_factory=list)

    def append(self, ids: list[int], supervised: bool = False) -> None:
        self.ids += ids
        self.labels += ids if supervised else [IGNORED_LABEL] * len(ids)


class VideoMa2mbaProcessor(ProcessorMixin):
    """Tokenizer, video processor and the paper's chat schema (Table 5) in one.

    The tokenizer is changed where it must be: `<image>`, `<video>` and `<|padding|>` are added if it does not know them
    (ids 50277 and 50278 for GPT-NeoX), and padding gets a token of its own, because padding with the end-of-turn token
    would hide the end of turns from the loss.

    Args:
        tokenizer: Any fast tokenizer with an end-of-sequence token.
        video_processor: A `VideoMa2mbaVideoProcessor`; images go through it as videos of one frame.
        patch_size: Side of a patch of the vision tower, in pixels.
        spatial_pool_stride: The model pools so many patches along each side into one token, rounding up.
        video_token, image_token: Placeholders in text; each becomes (frames x) `tokens_per_frame` ids.
        system_prompt: The system turn of conversations that bring none.
        media_separator: Between frames and the text after them; "" for none (Table 5 leaves it open).
        chat_template: Jinja text; by default made from the arguments above.
    """

    def __init__(
        self,
        tokenizer,
        video_processor,
        patch_size: int = 14,
        spatial_pool_stride: int = 2,
        video_token: str = "<video>",
        image_token: str = "<image>",
        system_prompt: str = "You are a helpful assistant.",
        media_separator: str = "\n",
        chat_template: str | None = None,
    ):
        super().__init__(tokenizer, video_processor)
        self.patch_size = patch_size
        self.spatial_pool_stride = spatial_pool_stride
        self.video_token = video_token
        self.image_token = image_token
        self.system_prompt = system_prompt
        self.media_separator = media_separator
        _prepare_tokenizer(tokenizer, [image_token, video_token])
        self.image_token_id = tokenizer.convert_tokens_to_ids(image_token)
        self.video_token_id = tokenizer.convert_tokens_to_ids(video_token)
        self._schema = ChatSchema(tokenizer.eos_token, video_token, image_token, system_prompt, media_separator)
        self.chat_template = chat_template or self._schema.chat_template()

    @property
    def tokens_per_frame(self) -> int:
        """144 for CLIP-L/14-336 (24 x 24 patches become 12 x 12), 196 for SigLIP-so400m/14-384 (27 x 27, 14 x 14)."""
        patches = self.video_processor.side // self.patch_size
        return (-(-patches // self.spatial_pool_stride)) ** 2

    @property
    def model_input_names(self) -> list[str]:
        return ["input_ids", "attention_mask", "pixel_values_videos", "pixel_values"]

    def apply_chat_template(  # type: ignore[override]  # the options it takes are ours, by name
        self,
        conversation: Sequence[dict] | Sequence[Sequence[dict]],
        chat_template: str | None = None,
        *,
        add_generation_prompt: bool = False,
        tokenize: bool = False,
        return_dict: bool = True,
        processor_kwargs: dict | None = None,
        **options: Unpack[VideoMa2mbaProcessorOptions],
    ) -> Any:
        """Renders conversations, and by `tokenize=True` makes the model's inputs of them.

        Args:
            conversation: One list of messages, or a batch of such lists; see `ChatSchema.render` for what they may
                hold. A video may bring "timestamps" (if its frames are in memory) and its own "fps", "max_frames",
                "start_s", "end_s".
            chat_template: Another Jinja template, for text only: tokenising must know where tags and bodies meet.
            add_generation_prompt: End with `<|assistant|>`; the last user turn must then hold a text.
            tokenize: False (as in transformers) gives text, with one placeholder per video and image.
            return_dict: False gives `input_ids` alone.
            processor_kwargs: The options again, as a dict.
            options: See `VideoMa2mbaProcessorOptions`.

        Returns:
            A text (or one per conversation), or a BatchFeature as of `__call__`.

        Raises:
            ValueError: Not a conversation of this schema, an empty question, or a `chat_template` that says something
                else.
            VideoReadError: A video cannot be read.
        """
        is_batch = bool(conversation) and not isinstance(conversation[0], dict)
        conversations: list[Any] = list(conversation) if is_batch else [conversation]
        rendered = [self._schema.render(messages, add_generation_prompt) for messages in conversations]
        texts = self.tokenizer.apply_chat_template(
            [[*messages] for messages in conversations],
            chat_template=chat_template or self.chat_template,
            add_generation_prompt=add_generation_prompt,
            tokenize=False,
        )
        if not tokenize:
            return texts if is_batch else texts[0]
        if texts != ["".join(segment.text for segment in segments) for segments in rendered]:
            raise ValueError(
                "The chat template gives another text than the schema of Video-Ma2mba, which tokenising follows. Use "
                "the template of the checkpoint, or render with tokenize=False and pass the text to the processor."
            )
        batch = self._encode(rendered, split_special_tokens=True, **{**(processor_kwargs or {}), **options})
        return batch if return_dict else batch["input_ids"]

    def __call__(
        self,
        images: Any = None,
        text: str | Sequence[str] | None = None,
        videos: Any = None,
        **options: Unpack[VideoMa2mbaProcessorOptions],
    ) -> BatchFeature:
        """Makes the model's inputs of texts with placeholders, and of the media that take their places, in order.

        Texts rendered by `apply_chat_template` get the same ids here as there: the schema's tags are tokenised apart.

        Args:
            images: One image or a (nested) list, in the order of their placeholders over all texts.
            text: One text or a list of texts, one per row.
            videos: One video or a (nested) list, likewise.
            options: See `VideoMa2mbaProcessorOptions`.

        Returns:
            BatchFeature with
            `input_ids`, `attention_mask`: (batch, tokens) int64;
            `pixel_values_videos`: (batch, frames, 3, side, side) uint8 (float32 if the video processor rescales): all
            videos of a row one after the other, rows with fewer frames filled with zeros at the end. How many frames
            are real follows from the ids: the number of video placeholders over `tokens_per_frame`. Absent if no row
            has a video;
            `pixel_values`: (batch, images, 3, side, side), likewise.

        Raises:
            ValueError: More or fewer placeholders than media; unusable media; no text.
        """
        if text is None:
            raise ValueError(
                "The processor needs a text. For pixel values alone call processor.video_processor(videos)."
            )
        texts = [text] if isinstance(text, str) else list(text)
        media = {
            "video": [] if videos is None else flatten_videos(videos),
            "image": [] if images is None else _flatten_images(images),
        }
        for kind, token in (("video", self.video_token), ("image", self.image_token)):
            placeholders = sum(each.count(token) for each in texts)
            if placeholders != len(media[kind]):
                raise ValueError(
                    f"The text has {placeholders} {token} placeholder(s) for {len(media[kind])} {kind}(s). "
                    f"Give one for each {kind}."
                )
        queues = {kind: iter(items) for kind, items in media.items()}
        rows = [self._split(each, queues) for each in texts]
        return self._encode(rows, split_special_tokens=False, **options)

    def _split(self, text: str, queues: dict) -> list[Segment]:
        """Cuts a text where the chat schema would, taking the media of its placeholders from the queues."""
        kinds: dict[str, Any] = {self.tokenizer.eos_token: "end", self.video_token: "video", self.image_token: "image"}
        marks = "|".join(map(re.escape, [*kinds, *TAGS.values()]))
        segments = []
        for piece in re.split(f"({marks})", text):
            kind = kinds.get(piece, "text")
            entry = {"type": kind, kind: next(queues[kind])} if kind in queues else None
            if piece:
                segments.append(Segment(kind, piece, entry=entry))
        return segments

    def _encode(
        self,
        rows: list[list[Segment]],
        *,
        split_special_tokens: bool,
        fps: float | None = None,
        max_frames: int | None = None,
        start_s: float = 0.0,
        end_s: float | None = None,
        strict: bool = False,
        padding: bool | str = True,
        padding_side: str = "left",
        pad_to_multiple_of: int = 1,
        return_tensors: str | None = "pt",
        return_labels: bool = False,
        return_timestamps: bool = False,
    ) -> BatchFeature:
        if padding not in (True, False, "longest"):
            raise ValueError(f"padding must be True, False or 'longest', got {padding!r}.")
        if padding_side not in ("left", "right"):
            raise ValueError(f"padding_side must be 'left' or 'right', got {padding_side!r}.")
        if pad_to_multiple_of < 1:
            raise ValueError(f"pad_to_multiple_of must be at least 1, got {pad_to_multiple_of}.")
        sampling = {"fps": fps, "max_frames": max_frames, "start_s": start_s, "end_s": end_s, "strict": strict}
        encoded = [self._encode_row(segments, split_special_tokens, sampling) for segments in rows]

        data: dict[str, Any] = {"input_ids": [row.ids for row in encoded]}
        data["attention_mask"] = [[1] * len(row.ids) for row in encoded]
        fill = {"input_ids": self.tokenizer.pad_token_id, "attention_mask": 0, "labels": IGNORED_LABEL}
        if return_labels:
            data["labels"] = [row.labels for row in encoded]
        if padding:
            longest = max(len(row.ids) for row in encoded)
            length = -(-longest // pad_to_multiple_of) * pad_to_multiple_of
            data = {name: _pad(values, fill[name], padding_side, length) for name, values in data.items()}
        for name, clips in (
            ("pixel_values_videos", [row.videos for row in encoded]),
            ("pixel_values", [row.images for row in encoded]),
        ):
            if any(clips):
                data[name] = self._stack(clips)
        batch = BatchFeature(data, tensor_type=return_tensors)
        if return_timestamps:
            batch["video_timestamps"] = [row.timestamps for row in encoded]
        return batch

    def _encode_row(self, segments: list[Segment], split_special_tokens: bool, sampling: dict) -> _Row:
        texts = [segment.text for segment in segments if segment.kind == "text"]
        tokenized = iter(
            self.tokenizer(texts, add_special_tokens=False, split_special_tokens=split_special_tokens)["input_ids"]
            if texts
            else []
        )
        row = _Row()
        for segment in segments:
            if segment.kind == "text":
                row.append(next(tokenized), segment.supervised)
                continue
            if segment.kind == "end":
                row.append([self.tokenizer.eos_token_id], segment.supervised)
                continue
            entry = segment.entry or {}
            if segment.kind == "image":
                row.images.append(self.video_processor.load_image(media_source(entry)))
                row.append([self.image_token_id] * self.tokens_per_frame)
            else:
                own = {key: entry[key] for key in _SAMPLING_KEYS if entry.get(key) is not None}
                video = self.video_processor.load(
                    media_source(entry), timestamps=entry.get("timestamps"), **{**sampling, **own}
                )
                row.videos.append(video.frames)
                row.timestamps.append(video.timestamps_s)
                row.append([self.video_token_id] * (len(video.frames) * self.tokens_per_frame))
        return row

    def _stack(self, rows: list[list[torch.Tensor]]) -> torch.Tensor:
        """Per row a list of (frames, 3, side, side) -> (rows, frames, 3, side, side), filled with zeros at the end."""
        side = self.video_processor.side
        empty = torch.empty((0, 3, side, side), dtype=torch.uint8)
        joined = [row[0] if len(row) == 1 else torch.cat([empty, *row]) for row in rows]
        return stack_rows([self.video_processor.rescale_and_normalize_frames(row) for row in joined])

    def check_argument_for_proper_class(self, argument_name: str, argument: Any) -> type:
        """As in transformers, whose own check of a video processor needs torchvision."""
        if argument_name != "video_processor":
            return super().check_argument_for_proper_class(argument_name, argument)
        if not isinstance(argument, VideoMa2mbaVideoProcessor):
            raise TypeError(f"video_processor must be a VideoMa2mbaVideoProcessor, got {type(argument).__name__}.")
        return VideoMa2mbaVideoProcessor

    @classmethod
    def _get_arguments_from_pretrained(cls, pretrained_model_name_or_path, processor_dict=None, **kwargs):
        """As in transformers, whose AutoVideoProcessor needs torchvision."""
        subfolder = kwargs.pop("subfolder", "")
        location = {"subfolder": subfolder, **kwargs}
        return [
            cls._load_tokenizer_from_pretrained("tokenizer", pretrained_model_name_or_path, **location),
            VideoMa2mbaVideoProcessor.from_pretrained(pretrained_model_name_or_path, **location),
        ]


def _prepare_tokenizer(tokenizer, placeholders: list[str]) -> None:
    """Sees to it that the placeholders are tokens, and that padding is not the end-of-turn token."""
    if tokenizer.eos_token is None:
        raise ValueError(
            "The tokenizer has no end-of-sequence token; Video-Ma2mba needs one to end turns ('<|endoftext|>')."
        )
    added = [AddedToken(token, special=True, normalized=False) for token in placeholders]
    tokenizer.add_tokens(added, special_tokens=True)
    if tokenizer.pad_token is None or tokenizer.pad_token_id == tokenizer.eos_token_id:
        tokenizer.add_special_tokens({"pad_token": _PAD_TOKEN})


def _flatten_images(images: Any) -> list:
    if not isinstance(images, list | tuple):
        return [images]
    return [flat for image in images for flat in _flatten_images(image)]


def _pad(rows: list[list[int]], value: int, side: str, length: int) -> list[list[int]]:
    return [
        [value] * (length - len(row)) + row if side == "left" else row + [value] * (length - len(row)) for row in rows
    ]
