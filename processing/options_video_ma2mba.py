"""The keywords of a call, as every processor of Transformers takes them: flat, or nested by modality.

`merge_options` sorts them; `check` refuses by its public name what has no meaning here. What is None was not given, as
everywhere in Transformers; what says only what is done anyway is taken.
"""

import difflib
from typing import Any

from transformers.processing_utils import AudioKwargs, ImagesKwargs, ProcessingKwargs, TextKwargs, VideosKwargs


class VideoMa2mbaVideoProcessorKwargs(VideosKwargs, total=False):
    """The settings of a `VideoMa2mbaVideoProcessor`: those of Transformers, and how a frame becomes square."""

    resize_mode: str


class VideoMa2mbaVideosKwargs(VideoMa2mbaVideoProcessorKwargs, total=False):
    """What a call may say about videos.

    Attributes:
        fps, max_frames, start_s, end_s, strict: Which frames of video files to take; see `read_frames`. `fps` counts
            for frames in memory too where their `video_metadata` says when they were shown.
        num_frames: Exactly so many frames, spread evenly, in place of `fps` and `max_frames`.
        do_sample_frames: False takes every frame, whatever else is asked (of a file: at its average rate). True asks
            for sampling also where frames come without times, which then needs `num_frames`.
        video_metadata: For frames in memory, one entry per video: their "fps", and "frames_indices" if they were
            picked before.
        return_timestamps: Also return `video_timestamps`: per row, per video, the seconds of its frames (or None).
        return_metadata: Also return `video_metadata`: per row, per video, a `VideoMetadata` of Transformers.
        do_rescale, do_normalize, rescale_factor, image_mean, image_std: As of `VideoMa2mbaVideoProcessor`, for this
            call. `do_rescale=False` also takes float frames with values from 0 to 1.
        input_data_format: "channels_first" or "channels_last", where the shape of an array leaves it open.
        device: Where the pixels are to lie at the end.
    """

    max_frames: int | None
    start_s: float | None
    end_s: float | None
    strict: bool | None
    return_timestamps: bool | None


class VideoMa2mbaTextKwargs(TextKwargs, total=False):
    """What a call may say about text.

    Attributes:
        padding: True or "longest" (default), "max_length", or False.
        padding_side: "left" or "right"; by default the tokenizer's, which the processor sets to "left" unless it was
            given one, as generation needs it.
        pad_to_multiple_of: Pad on, to the next multiple of this many tokens.
        max_length, truncation: Cut longer rows at the tokenizer's `truncation_side`; never inside or before a medium.
        return_tensors: "pt" (default), "np", or None for lists of ids.
        return_labels: Also return `labels` (chats only): the ids of the answers and of the end of their turns, -100
            elsewhere.
        return_offsets_mapping: Also return `offset_mapping`: where each token lies in the text in which every
            placeholder is repeated once per token of its medium.
        return_text_replacement_offsets: Also return where the placeholders lie in the text and in that longer one.
        return_mm_token_type_ids: Also return `mm_token_type_ids`: 1 for tokens of images, 2 of videos, 0 elsewhere.
    """

    return_labels: bool | None


class VideoMa2mbaProcessorKwargs(ProcessingKwargs, total=False):
    """Every keyword of `VideoMa2mbaProcessor`, by modality; all may also be given flat."""

    text_kwargs: VideoMa2mbaTextKwargs  # type: ignore[misc]  # with keys of our own, as below
    images_kwargs: ImagesKwargs
    videos_kwargs: VideoMa2mbaVideosKwargs  # type: ignore[misc]


NAMES: dict[str, frozenset[str]] = {
    "text_kwargs": frozenset(VideoMa2mbaTextKwargs.__annotations__)
    | {"return_mm_token_type_ids", "return_text_replacement_offsets", "sanitize_control_tokens"},
    "images_kwargs": frozenset(ImagesKwargs.__annotations__),
    "videos_kwargs": frozenset(VideoMa2mbaVideosKwargs.__annotations__),
}


def merge_options(options: dict[str, Any], tokenizer: Any) -> dict[str, dict[str, Any]]:
    """Sorts keywords by modality: flat ones before nested ones, before `common_kwargs`, before the tokenizer's own.

    Raises:
        TypeError: A name that no modality knows.
        ValueError: A name given both flat and nested; something about sound.
    """
    flat = dict(options)
    nested = {kind: flat.pop(kind, None) or {} for kind in NAMES}
    common = flat.pop("common_kwargs", None) or {}
    sound = {name: value for name, value in (flat.pop("audio_kwargs", None) or {}).items() if value is not None}
    if sound:
        raise ValueError(f"audio_kwargs has {', '.join(sound)}, but this model hears nothing. Leave audio_kwargs out.")
    merged: dict[str, dict[str, Any]] = {kind: {} for kind in NAMES}
    for name in NAMES["text_kwargs"] & tokenizer.init_kwargs.keys():
        merged["text_kwargs"][name] = getattr(tokenizer, name, tokenizer.init_kwargs[name])
    for kind, values in (("common_kwargs", common), *nested.items(), ("", flat)):
        for name, value in values.items():
            homes = [home for home in NAMES if name in NAMES[home] and kind in (home, "common_kwargs", "")]
            if not homes and not (kind != "" and name in AudioKwargs.__annotations__ and value is None):
                inside = f" in {kind}" if kind else ""
                raise TypeError(f"The processor has no option {name!r}{inside}. {_remedy(name)}")
            if kind in NAMES and name in flat:
                raise ValueError(f"{name} is given twice: in {kind} and beside it. Give it once.")
            for home in homes:
                merged[home][name] = value
    return {
        kind: {name: value for name, value in values.items() if value is not None or name == "return_tensors"}
        for kind, values in merged.items()
    }


def _remedy(name: str) -> str:
    known = sorted(frozenset().union(*NAMES.values()))
    near = difflib.get_close_matches(name, known, n=1)
    where = "All are in VideoMa2mbaProcessorKwargs; those of generation go to generate."
    return f"Did you mean {near[0]!r}? {where}" if near else where


def is_option(name: str) -> bool:
    """Whether `merge_options` takes a keyword of this name."""
    return name in NAMES or name in ("common_kwargs", "audio_kwargs") or any(name in names for names in NAMES.values())


def check(options: dict[str, Any], rules: dict[str, tuple[tuple, str]]) -> None:
    """Raises a ValueError where an option has another value than the neutral ones that its rule lists."""
    for name, (neutral, remedy) in rules.items():
        value = options.get(name)
        if value is not None and not any(value == each for each in neutral):
            raise ValueError(f"{name}={value!r} cannot be honoured. {remedy}")


TEXT_RULES: dict[str, tuple[tuple, str]] = {
    **dict.fromkeys(
        ("text_pair", "text_target", "text_pair_target"), ((), "A row is one conversation: pass it as text.")
    ),
    "stride": ((0,), "Rows that are cut do not go on in another row."),
    "is_split_into_words": ((False,), "Pass each text in one piece."),
    "return_token_type_ids": ((False,), "Tokens of media are told from text by return_mm_token_type_ids=True."),
    "return_overflowing_tokens": ((False,), "Rows that are cut do not go on in another row; raise max_length."),
    "return_special_tokens_mask": ((False,), "Call tokenizer.get_special_tokens_mask with the ids."),
    "return_length": ((False,), "The lengths are attention_mask.sum(-1)."),
}


def media_rules(side: int, resize_mode: str) -> dict[str, tuple[tuple, str]]:
    """What images and videos may be told about their pixels: what the video processor does anyway."""
    square = (side, {"height": side, "width": side}, [side, side], (side, side))
    other = "Build the VideoMa2mbaVideoProcessor with another size; the vision tower must have been trained with it."
    mode = f"How a frame becomes square is the video processor's resize_mode, here {resize_mode!r}."
    return {
        "do_convert_rgb": ((True,), "The vision tower takes RGB; other images are converted."),
        "do_resize": ((True,), f"The vision tower takes {side} x {side} pixels; frames of that size are left as is."),
        "size": (square, other),
        "crop_size": (square, other),
        "default_to_square": ((True,), "The vision tower takes squares."),
        "resample": ((3,), "Frames are scaled by the bicubic filter, PIL's number 3."),
        "resize_mode": ((resize_mode,), mode + " Build it with another one."),
        "do_center_crop": ((resize_mode == "crop",), mode),
        "do_pad": ((resize_mode == "pad",), mode),
        "pad_size": (square if resize_mode == "pad" else (), mode),
        "data_format": (("channels_first",), "The model takes pixels with the channels first."),
        "image_seq_length": ((), "The number of tokens of an image follows from patch_size and spatial_pool_stride."),
    }
