"""From conversations with videos to the tensors the model takes: chat schema, placeholders, padding, labels."""

import re
import sys

import transformers

if sys.version_info < (3, 11) or tuple(map(int, transformers.__version__.split(".")[:2])) < (5, 17):
    raise ImportError(
        "the code of this Video-Ma2mba folder needs Python 3.11 and transformers 5.17 or newer; here are Python "
        f"{sys.version.split()[0]} and transformers {transformers.__version__}: pip install -U 'transformers>=5.17'"
    )

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Unpack

import torch
from transformers import AddedToken, BatchFeature, ProcessorMixin
from transformers.processing_utils import MultiModalData
from transformers.utils.chat_template_utils import _get_template_variables

from .chat_video_ma2mba import TAGS, ChatSchema, Segment, media_options, media_source, plain_messages
from .frame_sampling_video_ma2mba import check_sampling, load_image, load_video, own_first
from .options_video_ma2mba import VideoMa2mbaProcessorKwargs, check, is_option, media_rules, merge_options
from .rows_video_ma2mba import RowSettings
from .video_processing_video_ma2mba import VideoMa2mbaVideoProcessor, flat, flatten_metadata, flatten_videos

IGNORED_LABEL = -100
_PAD_TOKEN = "<|padding|>"


@dataclass
class _Row:
    """One sample before it is padded."""

    ids: list[int] = field(default_factory=list)
    supervised: list[int] = field(default_factory=list)  # 1 for what the model should learn to write
    # where a token lies in the text, placeholders repeated
    offsets: list[tuple[int, int]] = field(default_factory=list)
    replaced: list[dict[str, Any]] = field(default_factory=list)  # where the placeholders lie in it
    num_characters: int = 0  # of the text with its placeholders once
    media: dict[str, list[torch.Tensor]] = field(default_factory=lambda: {"video": [], "image": []})
    timestamps: list[list[float] | None] = field(default_factory=list)
    metadata: list[Any] = field(default_factory=list)

    def append(self, segment: Segment, ids: list[int], offsets: list[tuple[int, int]]) -> None:
        start = self.offsets[-1][1] if self.offsets else 0
        self.ids += ids
        self.supervised += [int(segment.supervised)] * len(ids)
        self.offsets += [(start + first, start + last) for first, last in offsets]
        self.num_characters += len(segment.text)

    def append_medium(self, segment: Segment, token_id: int, num_tokens: int) -> None:
        length, start = len(segment.text), self.offsets[-1][1] if self.offsets else 0
        self.replaced.append(
            {
                "type": segment.kind,
                "span": (self.num_characters, self.num_characters + length),
                "new_span": (start, start + num_tokens * length),
                "text": segment.text,
                "replacement": segment.text * num_tokens,
            }
        )
        self.append(segment, [token_id] * num_tokens, [(k * length, (k + 1) * length) for k in range(num_tokens)])


class VideoMa2mbaProcessor(ProcessorMixin):
    """Tokenizer, video processor and the paper's chat schema (Table 5) in one.

    The tokenizer is changed where it must be: `<image>`, `<video>` and `<|padding|>` are added if it does not know them
    (ids 50277 and 50278 for GPT-NeoX), and padding gets a token of its own, because padding with the end-of-turn token
    would hide the end of turns from the loss. Rows are padded on the tokenizer's `padding_side`, which becomes "left",
    as generation needs it, unless the tokenizer was given one; set it, or give it to `from_pretrained`, to change it.

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

    valid_processor_kwargs = VideoMa2mbaProcessorKwargs  # type: ignore[assignment]  # declared as the base's own

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
        conversation: Any,
        chat_template: str | None = None,
        *,
        tools: list | None = None,
        documents: list | None = None,
        add_generation_prompt: bool = False,
        continue_final_message: bool | str | None = False,
        return_assistant_tokens_mask: bool | None = False,
        tokenize: bool = False,
        return_dict: bool = True,
        load_audio_from_video: bool | None = False,
        processor_kwargs: dict | None = None,
        sanitize_control_tokens: bool | None = False,
        **options: Any,
    ) -> Any:
        """Renders conversations, and by `tokenize=True` makes the model's inputs of them.

        Args:
            conversation: One list of messages, or a batch of such lists; see `ChatSchema.render` for what they may
                hold. Messages may be objects too, and entries those of OpenAI, `image_url` and `video_url`. A video
                may bring "timestamps" or "video_metadata" (if its frames are in memory), and its own "fps",
                "max_frames", "num_frames" or "nframes", "start_s" or "video_start", "end_s" or "video_end".
            chat_template: Another Jinja template or the name of one, for text only: tokenising must know where tags
                and bodies meet.
            tools, documents: For a template that reads them; the model's own knows none.
            add_generation_prompt: End with `<|assistant|>`; the last user turn must then hold a text.
            continue_final_message: Leave the last message open, so that the model goes on with it.
            return_assistant_tokens_mask: Also return `assistant_masks`: 1 for the ids of the answers and of the end of
                their turns, the same that `return_labels` keeps.
            tokenize: False (as in transformers) gives text, with one placeholder per video and image.
            return_dict: False gives `input_ids` alone. True is the default, as for the tokenizers of Transformers.
            load_audio_from_video: Must stay False: the model hears nothing.
            processor_kwargs: The options again, as a dict.
            sanitize_control_tokens: Take placeholders within a text as text, in place of an error. Other special tokens
                within a text are text in any case.
            options: Keywords of `VideoMa2mbaProcessorKwargs`, flat or nested; or variables of the template.

        Returns:
            A text (or one per conversation), or a BatchFeature as of `__call__`.

        Raises:
            TypeError: An option that neither the processor nor the template knows.
            ValueError: Not a conversation of this schema, an empty question, an option that cannot be honoured, or a
                `chat_template` that says something else.
            VideoReadError: A video cannot be read.
        """
        template = self._template(chat_template)
        known = _get_template_variables(template)
        variables = {name: options.pop(name) for name in list(options) if name in known and not is_option(name)}
        for name, value in (("tools", tools), ("documents", documents)):
            if value and name not in known:
                raise ValueError(f"{name} is given, but the chat template does not read it. Leave {name} out.")
        if load_audio_from_video:
            raise ValueError("load_audio_from_video=True cannot be honoured: the model hears nothing. Leave it out.")
        if continue_final_message not in (True, False, None, "content"):
            raise ValueError(
                f"continue_final_message={continue_final_message!r} cannot be honoured. Messages of this model have "
                "only a content: say True."
            )
        if continue_final_message and (add_generation_prompt or return_assistant_tokens_mask):
            other = "add_generation_prompt" if add_generation_prompt else "return_assistant_tokens_mask"
            raise ValueError(f"continue_final_message and {other} exclude each other. Give one of them.")
        merged = merge_options({**(processor_kwargs or {}), **options}, self.tokenizer)

        is_batch = bool(conversation) and (
            isinstance(conversation[0], list | tuple) or hasattr(conversation[0], "messages")
        )
        conversations = [plain_messages(one) for one in (conversation if is_batch else [conversation])]
        ours = chat_template is None or tokenize  # a template of the caller's may know other roles
        rendered = [
            self._schema.render(
                messages, add_generation_prompt, bool(continue_final_message), bool(sanitize_control_tokens)
            )
            for messages in conversations
            if ours
        ]
        texts = self.tokenizer.apply_chat_template(
            conversations,
            chat_template=template,
            tools=tools or None,
            documents=documents or None,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=bool(continue_final_message),
            tokenize=False,
            **variables,
        )
        if not tokenize:
            if return_assistant_tokens_mask or sanitize_control_tokens:
                name = "return_assistant_tokens_mask" if return_assistant_tokens_mask else "sanitize_control_tokens"
                raise ValueError(f"{name}=True is about ids. Say tokenize=True too.")
            return texts if is_batch else texts[0]
        if texts != ["".join(segment.text for segment in segments) for segments in rendered]:
            raise ValueError(
                "The chat template gives another text than the schema of Video-Ma2mba, which tokenising follows. Use "
                "the template of the checkpoint, or render with tokenize=False and pass the text to the processor."
            )
        merged["text_kwargs"]["return_assistant_masks"] = bool(return_assistant_tokens_mask)
        batch = self._encode(rendered, merged, split_special_tokens=True)
        return batch if return_dict else batch["input_ids"]

    def _template(self, chat_template: str | None) -> str | None:
        """A template by its text or its name; None is the processor's own."""
        if not isinstance(self.chat_template, dict):
            return chat_template or self.chat_template
        if chat_template is None and "default" not in self.chat_template:
            raise ValueError(f"Name one of the chat templates by chat_template: {', '.join(self.chat_template)}.")
        return self.chat_template.get(chat_template or "default", chat_template)

    def __call__(
        self,
        images: Any = None,
        text: str | Sequence[str] | None = None,
        videos: Any = None,
        **options: Unpack[VideoMa2mbaProcessorKwargs],
    ) -> BatchFeature:
        """Makes the model's inputs of texts with placeholders, and of the media that take their places, in order.

        Texts rendered by `apply_chat_template` get the same ids here as there: the schema's tags are tokenised apart.

        Args:
            images: One image or a (nested) list, in the order of their placeholders over all texts.
            text: One text or a list of texts, one per row.
            videos: One video or a (nested) list, likewise.
            options: See `VideoMa2mbaProcessorKwargs`; flat, or nested as `text_kwargs`, `images_kwargs`,
                `videos_kwargs` and `common_kwargs`.

        Returns:
            BatchFeature with
            `input_ids`, `attention_mask`: (batch, tokens) int64;
            `pixel_values_videos`: (batch, frames, 3, side, side) uint8 (float32 if the video processor rescales): all
            videos of a row one after the other, rows with fewer frames filled with zeros at the end. How many frames
            are real follows from the ids: the number of video placeholders over `tokens_per_frame`. Absent if no row
            has a video;
            `pixel_values`: (batch, images, 3, side, side), likewise;
            and what else the options ask for.

        Raises:
            TypeError: An option that is not known.
            ValueError: More or fewer placeholders than media; unusable media; no text; an option that cannot be
                honoured.
        """
        named = dict(options)
        if named.pop("audio", None) is not None:
            raise ValueError("audio is given, but the model hears nothing. Leave it out.")
        merged = merge_options(named, self.tokenizer)
        if text is None:
            raise ValueError(
                "The processor needs a text. For pixel values alone call processor.video_processor(videos)."
            )
        for name in ("return_labels", "sanitize_control_tokens"):
            if merged["text_kwargs"].get(name):
                raise ValueError(
                    f"{name} needs the conversation, of which a text tells nothing. Use apply_chat_template."
                )
        texts = [text] if isinstance(text, str) else list(text)
        if not texts or not all(isinstance(each, str) for each in texts):
            raise ValueError("text must be a text or a list of texts, one per row.")
        media = {
            "video": [] if videos is None else flatten_videos(videos),
            "image": [] if images is None else flat(images),
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
        return self._encode(rows, merged, split_special_tokens=False)

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
        self, rows: list[list[Segment]], options: dict[str, dict[str, Any]], *, split_special_tokens: bool
    ) -> BatchFeature:
        """Segments, a list per row, as the model's inputs; `options` as `merge_options` sorts them."""
        text, images, videos = (options[kind] for kind in ("text_kwargs", "images_kwargs", "videos_kwargs"))
        settings = RowSettings(text, self.tokenizer)
        rules = media_rules(self.video_processor.side, self.video_processor.resize_mode)
        check(images, rules)
        check(videos, rules)
        check_sampling(videos)
        num_videos = sum(segment.kind == "video" for segments in rows for segment in segments)
        metadata = iter(flatten_metadata(videos.get("video_metadata"), num_videos))
        encoded = [self._encode_row(segments, split_special_tokens, images, videos, metadata) for segments in rows]

        columns: dict[str, list[list]] = {"input_ids": [row.ids for row in encoded]}
        if text.get("return_attention_mask", True):
            columns["attention_mask"] = [[1] * len(row.ids) for row in encoded]
        if text.get("return_labels"):
            columns["labels"] = [
                [token if answer else IGNORED_LABEL for token, answer in zip(row.ids, row.supervised, strict=True)]
                for row in encoded
            ]
        if text.get("return_assistant_masks"):
            columns["assistant_masks"] = [row.supervised for row in encoded]
        if text.get("return_mm_token_type_ids"):
            kinds = {self.image_token_id: 1, self.video_token_id: 2}
            columns["mm_token_type_ids"] = [[kinds.get(token, 0) for token in row.ids] for row in encoded]
        if text.get("return_offsets_mapping"):
            columns["offset_mapping"] = [row.offsets for row in encoded]
        fill = {
            "input_ids": self.tokenizer.pad_token_id, "attention_mask": 0, "labels": IGNORED_LABEL,
            "assistant_masks": 0, "mm_token_type_ids": 0, "offset_mapping": (0, 0),
        }  # fmt: skip
        placeholders = {self.image_token_id, self.video_token_id}
        data: dict[str, Any] = settings.cut_and_pad(columns, fill, placeholders)
        for name, kind, kwargs in (("pixel_values_videos", "video", videos), ("pixel_values", "image", images)):
            if any(row.media[kind] for row in encoded):
                data[name] = self.video_processor.stack([row.media[kind] for row in encoded], kwargs)
        batch = BatchFeature(data, tensor_type=text.get("return_tensors", "pt"))
        if text.get("return_text_replacement_offsets"):
            batch["text_replacement_offsets"] = [row.replaced for row in encoded]
        if videos.get("return_timestamps"):
            batch["video_timestamps"] = [row.timestamps for row in encoded]
        if videos.get("return_metadata"):
            batch["video_metadata"] = [row.metadata for row in encoded]
        return batch

    def _encode_row(
        self,
        segments: list[Segment],
        split_special_tokens: bool,
        images: dict[str, Any],
        videos: dict[str, Any],
        metadata: Iterator,
    ) -> _Row:
        tokenized = self._tokenized(segments, split_special_tokens)
        row = _Row()
        for segment in segments:
            if segment.kind == "text":
                row.append(segment, *next(tokenized))
            elif segment.kind == "end":
                row.append(segment, [self.tokenizer.eos_token_id], [(0, len(segment.text))])
            entry = segment.entry or {}
            if segment.kind == "image":
                row.media["image"].append(load_image(self.video_processor, media_source(entry), images))
                row.append_medium(segment, self.image_token_id, self.tokens_per_frame)
            elif segment.kind == "video":
                asked = own_first(media_options(entry), videos | {"video_metadata": next(metadata)})
                video, its_metadata = load_video(self.video_processor, media_source(entry), asked)
                row.media["video"].append(video.frames)
                row.timestamps.append(video.timestamps_s)
                row.metadata.append(its_metadata)
                row.append_medium(segment, self.video_token_id, len(video.frames) * self.tokens_per_frame)
        return row

    def _tokenized(self, segments: list[Segment], split_special_tokens: bool) -> Iterator[tuple[list[int], list]]:
        """Ids and offsets of the segments that are text."""
        texts = [segment.text for segment in segments if segment.kind == "text"]
        if not texts:
            return iter(())
        told = self.tokenizer(
            texts,
            add_special_tokens=False,
            split_special_tokens=split_special_tokens,
            return_offsets_mapping=True,
            padding=False,
            truncation=False,
        )
        return zip(told["input_ids"], told["offset_mapping"], strict=True)

    def pieces(self, conversation: Sequence[dict[str, Any]]) -> list[list[int] | dict[str, Any]]:
        """A conversation that an answer is to follow, cut where its media stand: for who watches them elsewhere.

        Args:
            conversation: As `apply_chat_template` takes it, whose ids these are; the media themselves may be anything.

        Returns:
            Lists of token ids, and between them the entries of the media as they were given; the last is a list.

        Raises:
            ValueError: Not a conversation of the chat schema, or one without a question.
        """
        segments = self._schema.render(conversation, add_generation_prompt=True)
        tokenized = self._tokenized(segments, split_special_tokens=True)
        pieces: list[list[int] | dict[str, Any]] = []
        ids: list[int] = []  # since the last medium
        for segment in segments:
            if segment.kind in ("text", "end"):
                ids += [self.tokenizer.eos_token_id] if segment.kind == "end" else next(tokenized)[0]
            else:
                pieces += [ids, segment.entry or {}] if ids else [segment.entry or {}]
                ids = []
        return [*pieces, ids]

    def _get_num_multimodal_tokens(self, image_sizes=None, video_sizes=None, **kwargs: Any) -> MultiModalData:
        """How many tokens media of these sizes become, as vLLM asks; videos are (frames, height, width)."""
        if given := [name for name, value in kwargs.items() if value is not None]:
            raise TypeError(f"Images and videos are counted here, not {', '.join(given)}.")
        counts: dict[str, list[int]] = {}
        if image_sizes is not None:
            counts["num_image_tokens"] = [self.tokens_per_frame] * len(image_sizes)
            counts["num_image_patches"] = [1] * len(image_sizes)
        if video_sizes is not None:
            counts["num_video_tokens"] = [size[0] * self.tokens_per_frame for size in video_sizes]
        return MultiModalData(**counts)

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
    if "padding_side" not in tokenizer.init_kwargs:
        tokenizer.padding_side = tokenizer.init_kwargs["padding_side"] = "left"
