"""Frames that are in memory already, in all the forms they come in, as (frames, 3, height, width) uint8 tensors."""

from typing import Any

import numpy as np
import torch

from .frame_pixels import rgb_of_picture

_DTYPE_MESSAGE = (
    "Frames must be uint8 with values from 0 to 255, got {}. Convert, for values in [0, 1]: (frames * 255).round()."
)
_ONE_FRAME = "(height, width, 3) or (3, height, width)"
_ALL_FRAMES = "(frames, height, width, 3) or (frames, 3, height, width)"


def is_frame(item: Any) -> bool:
    """Whether this is a single picture in memory."""
    return hasattr(item, "convert") or (isinstance(item, np.ndarray | torch.Tensor) and item.ndim <= 3)


def frame_chunks(video: Any) -> list[torch.Tensor]:
    """Frames in memory as a list of (frames, 3, height, width) uint8 tensors.

    Raises:
        ValueError: Not frames: another dtype or shape, none of them, or none of their pixels.
    """
    if isinstance(video, list | tuple):
        if not video:
            raise ValueError("A video needs at least one frame, got an empty list.")
        return [channels_first(_to_tensor(frame)[None], _ONE_FRAME) for frame in video]
    frames = _to_tensor(video)
    if hasattr(video, "convert"):  # one picture
        frames = frames[None]
    if len(frames) == 0:
        raise ValueError(f"A video needs at least one frame, got shape {tuple(frames.shape)}.")
    return [channels_first(frames)]


def _to_tensor(frames: Any) -> torch.Tensor:
    if hasattr(frames, "convert"):  # a PIL image
        frames = rgb_of_picture(frames)
    if isinstance(frames, np.ndarray):
        if frames.dtype != np.uint8:
            raise ValueError(_DTYPE_MESSAGE.format(frames.dtype))
        return torch.from_numpy(np.ascontiguousarray(frames))
    if not isinstance(frames, torch.Tensor):
        raise ValueError(
            f"A video must be a path, an array, a tensor or a list of frames, got {type(frames).__name__}."
        )
    if frames.dtype != torch.uint8:
        raise ValueError(_DTYPE_MESSAGE.format(frames.dtype))
    return frames.detach().cpu()


def channels_first(frames: torch.Tensor, expected: str = _ALL_FRAMES) -> torch.Tensor:
    """Frames whose channels stand first or last, with the channels first; what is none is refused."""
    shape = tuple(frames.shape[1:]) if expected == _ONE_FRAME else tuple(frames.shape)
    if frames.ndim == 4 and frames.shape[-1] == 3:
        frames = frames.permute(0, 3, 1, 2)
    if frames.ndim != 4 or frames.shape[1] != 3:
        raise ValueError(f"Frames must have the shape {expected}, got {shape}.")
    if 0 in frames.shape:
        raise ValueError(f"Frames must have pixels, got the shape {shape}.")
    return frames
