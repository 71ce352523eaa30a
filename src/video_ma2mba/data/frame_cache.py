"""Frames of a video, decoded and resized once, so that epochs do not decode again.

A video becomes a folder of safetensors files of at most `FRAMES_PER_SHARD` frames each, raw uint8 or JPEG, beside an
`index.json` with the times. The folder gets its name only when it is whole.
"""

import hashlib
import io
import itertools
import json
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from ..files import whole_folder
from ..loading import reading

if TYPE_CHECKING:
    from ..processing import VideoMa2mbaVideoProcessor

Frame = TypeVar("Frame")
FRAMES_PER_SHARD = 256
JPEG_QUALITY = 92


def cache_folder(cache: Path, video: str) -> Path:
    """Where the frames of a video lie; `video` is its path under the media root."""
    return cache / hashlib.sha256(video.encode()).hexdigest()[:24]


def settings(processor: "VideoMa2mbaVideoProcessor", fps: float) -> dict[str, object]:
    """What cached frames depend on besides the video."""
    return {"fps": fps, "side": processor.side, "resize_mode": processor.resize_mode}


def write_frames(
    root: Path,
    video: str,
    cache: Path,
    processor: "VideoMa2mbaVideoProcessor",
    fps: float,
    encoding: str,
    num_threads: int | None = None,
    stop: Callable[[], bool] = lambda: False,
) -> int:
    """Decode one video into the cache, at constant memory; one that is there already stays.

    Args:
        num_threads: See `read_frames`.
        stop: Asked at every frame; where it says yes, nothing is kept of this video.

    Returns:
        The number of frames.

    Raises:
        VideoReadError: It cannot be decoded. ValueError: It is there with other settings. KeyboardInterrupt: Stopped.
    """
    folder = cache_folder(cache, video)
    if folder.is_dir():
        with reading_stored(folder):
            return len(read_index(folder, settings(processor, fps))["timestamps_s"])
    with whole_folder(folder) as partial:
        timestamps_s: list[float] = []
        frames = _until(stop, processor.open_video(root / video, fps=fps, num_threads=num_threads))
        shards = iter(lambda: list(itertools.islice(frames, FRAMES_PER_SHARD)), [])
        for number, shard in enumerate(shards):
            timestamps_s += [frame.timestamp_s for frame in shard]
            pixels = np.stack([frame.pixels for frame in shard])
            save_file(_encode(pixels, encoding), partial / f"{number:05d}.safetensors")
        index = {"video": video, "encoding": encoding, **settings(processor, fps), "timestamps_s": timestamps_s}
        (partial / "index.json").write_text(json.dumps(index), encoding="utf-8")
    return len(timestamps_s)


def _until(stop: Callable[[], bool], frames: Iterable[Frame]) -> Iterator[Frame]:
    for frame in frames:
        if stop():
            raise KeyboardInterrupt
        yield frame


def reading_stored(folder: Path) -> AbstractContextManager[None]:
    """The cached frames of a video are read in here."""
    return reading(folder, "stored frames (remove them and run `video-ma2mba data prepare --cache-frames` again)")


def read_index(folder: Path, wanted: dict[str, object]) -> dict:
    """The index of a cached video.

    Raises:
        ValueError: It was made with other settings than those `wanted`.
    """
    index = json.loads((folder / "index.json").read_text(encoding="utf-8"))
    for name, value in wanted.items():
        if index[name] != value:
            raise ValueError(
                f"the cached frames of {index['video']} have {name} {index[name]!r}, and {value!r} is wanted: make the "
                "cache again with `video-ma2mba data prepare --cache-frames`, or remove it"
            )
    return index


def read_frames_between(folder: Path, first: int, last: int) -> torch.Tensor:
    """Frames number `first` to `last` (exclusive): uint8 (frames, 3, side, side); reads the shards that hold them."""
    parts = []
    for number in range(first // FRAMES_PER_SHARD, (last - 1) // FRAMES_PER_SHARD + 1):
        start = number * FRAMES_PER_SHARD
        shard = load_file(folder / f"{number:05d}.safetensors")
        parts.append(_decode(shard, slice(max(first - start, 0), last - start)))
    return torch.cat(parts)


def _encode(pixels: np.ndarray, encoding: str) -> dict[str, torch.Tensor]:
    """(frames, side, side, 3) uint8 -> tensors to store."""
    if encoding == "raw":
        return {"frames": torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous()}
    from PIL import Image

    pictures = []
    for picture in pixels:
        buffer = io.BytesIO()
        Image.fromarray(picture).save(buffer, format="JPEG", quality=JPEG_QUALITY)
        pictures.append(buffer.getvalue())
    ends = torch.tensor([len(picture) for picture in pictures]).cumsum(0)
    return {"jpeg": torch.frombuffer(bytearray(b"".join(pictures)), dtype=torch.uint8), "ends": ends}


def _decode(shard: dict[str, torch.Tensor], wanted: slice) -> torch.Tensor:
    if "frames" in shard:
        return shard["frames"][wanted]
    from PIL import Image

    data, ends = shard["jpeg"].numpy().tobytes(), [0, *shard["ends"].tolist()]
    spans = list(itertools.pairwise(ends))[wanted]
    pictures = [np.asarray(Image.open(io.BytesIO(data[start:end])).convert("RGB")) for start, end in spans]
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2)
