"""From rows of a manifest to a batch: frames loaded, cut to size where asked, padded, labelled.

A sample that cannot be used is left out of the batch and said so; the others go on.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.utils.rnn import pad_sequence

from ..processing.video_processing_video_ma2mba import stack_rows
from .holding_out import videos_of
from .manifest import clean_messages
from .media_loader import MediaLoader
from .records import media_of

if TYPE_CHECKING:
    from ..processing import VideoMa2mbaProcessor

TOO_LONG = ("refuse", "cut", "lower_fps")
INFO = "sample_info"


class VideoChatCollator:
    """Makes batches of `VideoMa2mbaForConditionalGeneration` out of rows of a manifest.

    Args:
        processor: The model's.
        fps: Frames per second of video; None takes the processor's, usually 1.
        max_tokens, max_frames: Of one sample; None for no limit.
        too_long: What becomes of a sample beyond them: "refuse" leaves it out; "cut" keeps its first frames, and drops
            the turns whose frames find no room; "lower_fps" spreads the frames that fit over the whole.
        pad_to_multiple_of: Rows are padded on the right to a multiple of this, best the chunk of the scan.
        with_info: Also return `sample_info`, one dict per row given: id, videos, frames, tokens, supervised tokens,
            what was done to it (`changed`), or why it was left out (`error`). The model does not take it:
            `VideoMa2mbaTrainer` reads it and takes it out, and the stock Trainer needs it off.
        strict: Raise where a sample cannot be used.
    """

    def __init__(
        self,
        processor: "VideoMa2mbaProcessor",
        *,
        fps: float | None = None,
        max_tokens: int | None = None,
        max_frames: int | None = None,
        too_long: str = "refuse",
        pad_to_multiple_of: int = 1,
        with_info: bool = False,
        strict: bool = False,
    ):
        if too_long not in TOO_LONG:
            raise ValueError(f"too_long must be one of {', '.join(TOO_LONG)}, got {too_long!r}")
        for name, limit in (("max_tokens", max_tokens), ("max_frames", max_frames)):
            if limit is not None and limit < 1:
                raise ValueError(f"{name} must be at least 1, got {limit}")
        self.processor = processor
        self.loader = MediaLoader(processor.video_processor, fps or processor.video_processor.fps)
        self.max_tokens, self.max_frames, self.too_long = max_tokens, max_frames, too_long
        self.pad_to_multiple_of, self.with_info, self.strict = pad_to_multiple_of, with_info, strict

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Rows of `load_manifest` -> `input_ids`, `attention_mask`, `labels`: (batch, tokens) int64, and the frames of
        videos and images, uint8 (batch, frames, 3, side, side), where there are any.

        A batch of which no row can be used becomes one black frame without labels, which moves no weight.
        """
        samples, infos = [], []
        for row in rows:
            info = {"id": row["id"], "videos": list(dict.fromkeys(path for _, path in videos_of(row)))}
            try:
                # alone: what is wrong with one row must not take the others with it
                sample = self._encode(self._load(row, info))
            except (ValueError, OSError) as error:
                if self.strict:
                    raise ValueError(
                        f"sample {row['id']} ({', '.join(info['videos']) or 'text only'}): {error}"
                    ) from error
                info["error"] = str(error)
            else:
                info["tokens"] = int(sample["attention_mask"].sum())
                info["supervised"] = int((sample["labels"][:, 1:] != -100).sum())
                samples.append(sample)
            infos.append(info)
        if not samples:
            samples = [self._encode([{"role": "user", "content": [self._black_frame()]}])]
            samples[0]["labels"].fill_(-100)
        batch = samples[0] if len(samples) == 1 else self._together(samples)
        if self.with_info:
            batch[INFO] = infos
        return batch

    def _encode(self, chat: list[dict]) -> dict[str, Any]:
        """A batch of one."""
        return self.processor.apply_chat_template(
            [chat], tokenize=True, return_labels=True, padding_side="right", pad_to_multiple_of=self.pad_to_multiple_of
        ).data

    def _together(self, samples: list[dict[str, Any]]) -> dict[str, Any]:
        """Batches of one as one batch, as the processor would make it of all conversations at once."""
        fill = {"input_ids": self.processor.tokenizer.pad_token_id, "attention_mask": 0, "labels": -100}
        batch: dict[str, Any] = {
            name: pad_sequence([sample[name][0] for sample in samples], batch_first=True, padding_value=value)
            for name, value in fill.items()
        }
        for name in ("pixel_values_videos", "pixel_values"):
            given = [sample[name][0] for sample in samples if name in sample]
            if given:
                batch[name] = stack_rows([sample[name][0] if name in sample else given[0][:0] for sample in samples])
        return batch

    def _load(self, row: dict[str, Any], info: dict[str, Any]) -> list[dict[str, Any]]:
        """The conversation of a row with its frames in memory, within the limits."""
        messages = clean_messages(row["messages"])
        wanted = [self.loader.num_frames(entry) for entry in media_of(messages)]
        given, changed = self._room(messages, wanted)
        info["frames"] = sum(given)
        if changed:
            info["changed"] = changed
        left = iter(given)
        root, folder = Path(row["media_root"]), Path(row["folder"])
        chat: list[dict[str, Any]] = []
        for message in messages:
            content = []
            for entry in message["content"]:
                if entry["type"] != "text":
                    count = next(left)
                    if count == 0:
                        return chat  # no room for this turn, so none for what follows
                    frames = self.loader.load(entry, root, folder, count, cut=self.too_long == "cut")
                    kind = entry["type"]
                    entry = {"type": kind, kind: frames if kind == "video" else frames[0]}
                content.append(entry)
            chat.append({"role": message["role"], "content": content})
        return chat

    def _room(self, messages: list[dict], wanted: list[int]) -> tuple[list[int], str]:
        """How many frames of each entry there is room for, and what that changed."""
        num_frames, per_frame = sum(wanted), self.processor.tokens_per_frame
        room = num_frames if self.max_frames is None else min(num_frames, self.max_frames)
        if self.max_tokens is not None:
            room = min(room, (self.max_tokens - self._num_text_tokens(messages, len(wanted))) // per_frame)
        if room >= num_frames:
            return wanted, ""
        if self.too_long == "refuse" or room < 1:
            raise ValueError(
                f"{num_frames} frames ({num_frames * per_frame} tokens) where there is room for {max(room, 0)}; raise "
                "max_tokens or max_frames, or let too_long be 'cut' or 'lower_fps'"
            )
        if self.too_long == "cut":
            given, left = [], room
            for count in wanted:
                given.append(min(count, left))
                left -= given[-1]
            return given, f"cut from {num_frames} to {room} frames"
        if room < len(wanted):
            raise ValueError(f"{len(wanted)} clips where there is room for {room} frames; not one frame for each")
        given = [max(1, count * room // num_frames) for count in wanted]
        while sum(given) > room:  # clips that were raised to one frame take it from the longest
            given[given.index(max(given))] -= 1
        return given, f"{num_frames} frames spread over {sum(given)}"

    def _num_text_tokens(self, messages: list[dict], num_media: int) -> int:
        """Tokens of a conversation besides its frames: counted where every medium is one frame."""
        chat = [
            {**message, "content": [e if e["type"] == "text" else self._black_frame() for e in message["content"]]}
            for message in messages
        ]
        ids = self.processor.apply_chat_template(chat, tokenize=True, return_tensors=None)["input_ids"]
        return len(ids[0]) - num_media * self.processor.tokens_per_frame

    def _black_frame(self) -> dict[str, Any]:
        side = self.processor.video_processor.side
        return {"type": "video", "video": torch.zeros((1, 3, side, side), dtype=torch.uint8)}
