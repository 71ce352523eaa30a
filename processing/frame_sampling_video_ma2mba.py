"""Which frames of a video a call wants, in the words of Transformers, and media in all the forms people hold them.

A medium may be a path or URL, the bytes of a file or an open file, {"path", "bytes"} as the `datasets` library has it,
frames in memory, or a list of the files of single frames. Decoding and scaling are the video processor's.
"""

import math
import numbers
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch.nn.functional import interpolate
from transformers.video_utils import VideoMetadata

from .frames_in_memory import channels_first
from .media_location import is_location, locate
from .video_reader import check_span, probe_video

_FASTER_THAN_ANY_VIDEO = 1e6  # frames per second: with it, `max_frames` alone decides


def load_video(processor: Any, video: Any, options: dict[str, Any]) -> tuple[Any, VideoMetadata | None]:
    """Loads one video as a call asks for it.

    Args:
        processor: A `VideoMa2mbaVideoProcessor`.
        video: See above.
        options: The keywords of `VideoMa2mbaVideosKwargs` and `timestamps`; `video_metadata` is this video's.

    Returns:
        A `LoadedVideo`, and its metadata where `return_metadata` asks for them.

    Raises:
        ValueError: Options that exclude each other, or that this video cannot follow.
    """
    check_sampling(options)
    medium = _as_location_or_frames(video)
    return (_load_file if is_location(medium) else _load_frames)(processor, medium, options)


def check_sampling(options: dict[str, Any]) -> None:
    """Raises a ValueError where the keywords about frames make no sense, for whatever video."""
    for name in ("fps", "start_s", "end_s", "num_frames", "max_frames"):
        value, counts = options.get(name), name.endswith("frames")
        if value is not None and not isinstance(value, numbers.Integral if counts else numbers.Real):
            raise ValueError(f"{name} must be a {'whole ' if counts else ''}number, got {value!r}.")
    fps, num_frames, max_frames = (options.get(name) for name in ("fps", "num_frames", "max_frames"))
    if num_frames is not None and num_frames < 1:
        raise ValueError(f"num_frames must be at least 1, got {num_frames}. Use None for no limit.")
    if num_frames is not None and (fps is not None or max_frames is not None):
        other = "max_frames" if fps is None else "fps"
        raise ValueError(f"num_frames and {other} both say how many frames to take. Give one of them.")
    check_span(fps, max_frames, options.get("start_s") or 0.0, options.get("end_s"))


def own_first(own: dict[str, Any], common: dict[str, Any]) -> dict[str, Any]:
    """What a video's own entry says, and what the call says where the entry is silent.

    How many frames to take is one question: an entry that answers it by `num_frames` is not asked again by `fps`.
    """
    if "num_frames" in own:
        common = {name: value for name, value in common.items() if name not in ("fps", "max_frames")}
    elif own.keys() & {"fps", "max_frames"}:
        common = {name: value for name, value in common.items() if name != "num_frames"}
    return common | own


def load_image(processor: Any, image: Any, options: dict[str, Any]) -> torch.Tensor:
    """Loads one image as a video of one frame: (1, 3, side, side), uint8, or float32 as in `load_video`."""
    medium = _as_location_or_frames(image)
    if _is_float(medium):
        return _float_frames(processor, medium[None], options)
    if not is_location(medium):
        medium = _channels_last(medium, options.get("input_data_format"))
    return processor.load_image(medium)


def _load_file(processor: Any, path: Any, options: dict[str, Any]) -> tuple[Any, VideoMetadata | None]:
    file = locate(path).name
    if options.get("video_metadata") is not None:
        raise ValueError(f"video_metadata goes with frames in memory; the file {file} brings its own. Leave it out.")
    wanted = {name: options.get(name) for name in ("fps", "max_frames", "end_s", "timestamps")}
    wanted |= {"start_s": options.get("start_s") or 0.0, "strict": bool(options.get("strict"))}
    num_frames = options.get("num_frames")
    every = _samples(processor, options) is False
    if every or num_frames is not None:
        info = probe_video(path)
        rate, start_s = info.average_fps, float(wanted["start_s"] or 0.0)
        if rate is None:
            raise ValueError(f"{file} does not say its frame rate, so frames cannot be counted. Give fps.")
        end_s = min(info.duration_s, math.inf if wanted["end_s"] is None else wanted["end_s"])
        there = round((end_s - start_s) * rate)
        if not every and num_frames is not None and 0 < there < num_frames:
            raise ValueError(f"num_frames={num_frames} is more than the {there} frames there are in {file}.")
        every = every or num_frames == there
        if every:  # picked in the middle of the time that each is shown: containers round the borders
            wanted |= {"fps": rate, "start_s": (math.floor(start_s * rate + 1e-3) + 0.5) / rate}
            wanted["end_s"] = wanted["end_s"] and wanted["end_s"] + 0.5 / rate
        else:
            wanted |= {"fps": _FASTER_THAN_ANY_VIDEO, "max_frames": num_frames}
    loaded = processor.load(path, **wanted)
    if every and wanted["max_frames"] is None and len(set(loaded.timestamps_s)) < len(loaded.timestamps_s):
        raise ValueError(
            f"The frames of {file} do not come at a constant rate, so not each can be taken once. Give fps."
        )
    if not options.get("return_metadata"):
        return loaded, None
    info = probe_video(path)
    fps = info.average_fps
    return loaded, VideoMetadata(
        total_num_frames=info.num_frames or round(info.duration_s * (fps or 0)) or len(loaded.frames),
        fps=fps,
        width=info.width,
        height=info.height,
        duration=info.duration_s,
        video_backend="pyav",
        frames_indices=[round(second * fps) for second in loaded.timestamps_s] if fps else None,
    )


def _load_frames(processor: Any, frames: Any, options: dict[str, Any]) -> tuple[Any, VideoMetadata | None]:
    metadata = options.get("video_metadata")
    metadata = dict(metadata) if isinstance(metadata, Mapping) else {}
    timestamps, total = options.get("timestamps"), len(frames)
    indices = metadata.get("frames_indices")
    indices = list(range(total)) if indices is None else [int(index) for index in indices]
    if len(indices) != total:
        raise ValueError(f"video_metadata names {len(indices)} frames_indices for {total} frames. Give one for each.")
    if timestamps is None and metadata.get("fps"):
        timestamps = [index / metadata["fps"] for index in indices]
    keep = _kept(processor, frames, metadata, options)
    if keep is not None:
        frames = [frames[k] for k in keep] if isinstance(frames, list | tuple) else frames[keep]
        indices = [indices[k] for k in keep]
        timestamps = None if timestamps is None else [timestamps[k] for k in keep]
    wanted = {name: options.get(name) for name in ("max_frames", "end_s")}
    wanted |= {"timestamps": timestamps, "start_s": options.get("start_s") or 0.0}
    if isinstance(frames, list | tuple) and any(map(_is_file_of_frame, frames)):
        frames = torch.cat([load_image(processor, frame, options) for frame in frames])
    if _is_float(frames):
        pixels = _float_frames(processor, frames, options)
        side = processor.side  # the times and the limits are checked as for any frames
        loaded = processor.load(torch.zeros((len(pixels), 3, side, side), dtype=torch.uint8), **wanted)
        kept = [k * len(pixels) // len(loaded.frames) for k in range(len(loaded.frames))]
        loaded = replace(loaded, frames=pixels[kept])
    else:
        loaded = processor.load(_channels_last(frames, options.get("input_data_format")), **wanted)
    if not options.get("return_metadata"):
        return loaded, None
    fields = {"total_num_frames": total, **metadata}
    spread = [indices[k * len(indices) // len(loaded.frames)] for k in range(len(loaded.frames))]
    return loaded, VideoMetadata(**{**fields, "frames_indices": spread})


def _samples(processor: Any, options: dict[str, Any]) -> bool | None:
    given = options.get("do_sample_frames")
    return getattr(processor, "do_sample_frames", None) if given is None else given


def _kept(processor: Any, frames: Any, metadata: dict[str, Any], options: dict[str, Any]) -> list[int] | None:
    """The places of the frames in memory to keep, spread evenly; None for all."""
    sample, total = _samples(processor, options), len(frames)
    num_frames, fps = options.get("num_frames"), options.get("fps")
    if sample is False:
        return None
    if sample and isinstance(frames, list | tuple) and any(map(_is_file_of_frame, frames)):
        # this wording is what Transformers' own tests of a processor look for
        raise ValueError("Sampling frames from a list of images is not supported! Set `do_sample_frames=False`.")
    if num_frames is None and metadata.get("fps") and (fps is not None or sample):
        num_frames = max(1, int(total / metadata["fps"] * (fps or processor.fps)))
    if num_frames is None:
        if sample:
            raise ValueError(
                "do_sample_frames=True needs to know when the frames in memory were shown. Give their "
                'video_metadata={"fps": ...}, or num_frames.'
            )
        return None
    if num_frames > total:
        raise ValueError(f"num_frames={num_frames} is more than the {total} frames there are.")
    return [k * total // num_frames for k in range(num_frames)]


def _as_location_or_frames(medium: Any) -> Any:
    """The medium as something the video processor loads, also more than once: an open file is read."""
    if isinstance(medium, Mapping):
        unknown = medium.keys() - {"path", "bytes"}
        if unknown or not any(medium.get(key) is not None for key in ("path", "bytes")):
            raise ValueError(
                f'A medium given as a dict needs "path" or "bytes", as the datasets library has it; got the keys '
                f"{', '.join(map(str, medium)) or 'none'}."
            )
        medium = medium["path"] if medium.get("bytes") is None else medium["bytes"]
    return medium.read() if hasattr(medium, "read") else medium


def _is_file_of_frame(frame: Any) -> bool:
    return is_location(frame) or isinstance(frame, Mapping)


def _channels_last(frames: Any, input_data_format: Any) -> Any:
    """Arrays whose channels are said to stand first, with the channels last; the rest tells itself by its shape."""
    if input_data_format is None:
        return frames
    if input_data_format not in ("channels_first", "channels_last"):
        raise ValueError(f"input_data_format must be 'channels_first' or 'channels_last', got {input_data_format!r}.")
    if isinstance(frames, list | tuple):
        return [_channels_last(frame, input_data_format) for frame in frames]
    if input_data_format == "channels_last" or not isinstance(frames, np.ndarray | torch.Tensor):
        return frames
    return torch.as_tensor(frames).movedim(-3, -1)


def _is_float(frames: Any) -> bool:
    if isinstance(frames, list | tuple):
        return bool(frames) and _is_float(frames[0])
    if isinstance(frames, torch.Tensor):
        return frames.is_floating_point()
    return isinstance(frames, np.ndarray) and np.issubdtype(frames.dtype, np.floating)


def _float_frames(processor: Any, frames: Any, options: dict[str, Any]) -> torch.Tensor:
    """Float frames as float32 (frames, 3, side, side); normalised here, for the model does so to uint8 alone."""
    if options.get("do_rescale") is not False:
        raise ValueError(
            "Frames must be uint8 with values from 0 to 255. Say do_rescale=False where they are floats from 0 to 1."
        )
    if isinstance(frames, list | tuple):
        frames = torch.stack([torch.as_tensor(frame) for frame in frames])
    pixels = torch.as_tensor(_channels_last(frames, options.get("input_data_format"))).to(torch.float32)
    pixels = channels_first(pixels)
    normalize = options.get("do_normalize", True)
    if normalize and (pixels.min() < -1e-3 or pixels.max() > 1 + 1e-3):
        raise ValueError(
            f"Float frames must have values from 0 to 1, got {float(pixels.min()):.4g} to {float(pixels.max()):.4g}. "
            "Divide them by 255, or say do_normalize=False where they are normalised already."
        )
    size = processor._size_before_squaring(*pixels.shape[-2:])
    if size != tuple(pixels.shape[-2:]):
        low, high = pixels.min(), pixels.max()  # the filter overshoots at edges
        pixels = interpolate(pixels, size, mode="bicubic", antialias=True).clamp(low, high)
    colour = np.array(processor.image_mean if normalize else [0.0] * 3, np.float32)  # the mean is zero once normalised
    pixels = torch.from_numpy(processor._square(pixels.permute(0, 2, 3, 1).numpy(), colour)).permute(0, 3, 1, 2)
    if normalize:
        statistics = options.get("image_mean"), options.get("image_std")
        pixels = processor.rescale_and_normalize_frames(pixels, True, True, 1.0, *statistics)
    return pixels.contiguous()
