"""Turns videos and images into square uint8 frames for the vision tower.

The paper feeds 336 x 336 frames to CLIP-ViT-L/14 (section 3.5) and does not say how a frame becomes square:
`resize_mode` chooses. Frames stay uint8, a quarter of the memory of float32: for two hours of video 2.3 GiB, not 9.1.
The model rescales and normalises them on its own device, a few frames at a time.
"""

import itertools
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypedDict, Unpack

import numpy as np
import torch
from torch.nn.functional import interpolate
from transformers import BatchFeature
from transformers.video_processing_utils import BaseVideoProcessor

from .frame_pixels import Size
from .frame_sampling_video_ma2mba import check_sampling, load_video
from .frames_in_memory import frame_chunks, is_frame
from .media_location import is_location, locate
from .options_video_ma2mba import NAMES, VideoMa2mbaVideoProcessorKwargs, VideoMa2mbaVideosKwargs, check, media_rules
from .picture_source import NOT_A_STILL, first_picture, is_picture
from .video_reader import VideoFrame, VideoFrames, read_frames

RESIZE_MODES = ("crop", "squash", "pad")
_FRAMES_AT_ONCE = 32  # so many frames in memory become float32 at a time
_FRAMES_AT_FIRST = 256  # so many frames of a file find room at first, whatever it says of its length
_LONGEST_EDGES = 4  # a longer picture is cut to so many of its short edges before it is scaled, if it is to be cropped


class FrameSampling(TypedDict, total=False):
    """Which frames of a file to take, as `read_frames` has it; `fps` of None is the processor's."""

    fps: float | None
    max_frames: int | None
    start_s: float
    end_s: float | None
    strict: bool


@dataclass(frozen=True, eq=False)
class LoadedVideo:
    """One video as the model wants it.

    Attributes:
        frames: (frames, 3, side, side) uint8.
        timestamps_s: When each frame is shown, in seconds from the first frame; None if frames came without times.
    """

    frames: torch.Tensor
    timestamps_s: list[float] | None


class VideoMa2mbaVideoProcessor(BaseVideoProcessor):
    """Decodes, samples and squares videos; images are videos of one frame. Works without torchvision.

    Args:
        size: Side of the square frames in pixels, or {"height": side, "width": side}: what the vision tower was trained
            with, 336 for CLIP-ViT-L/14-336, 384 for SigLIP-so400m/14-384.
        resize_mode: "crop": the shortest edge becomes `size` and the middle is kept (CLIP). "squash": straight to the
            square, whatever the aspect ratio (SigLIP). "pad": the longest edge becomes `size`, mean colour around it.
        do_rescale, do_normalize: Off by default: frames stay uint8, and the model does both. `do_rescale=True` gives
            float32 x / 255; `do_normalize=True` gives float32 (x / 255 - image_mean) / image_std.
        image_mean, image_std: One number per channel, those of the vision tower. CLIP's by default.
        fps: Frames per second of video time taken from files where a call does not say otherwise. The paper's rate by
            default.

    Raises:
        ValueError: A size that is no square, an unknown resize_mode, or a setting of Transformers without meaning here.

    Files are scaled by libswscale while they are decoded, frames in memory by torch's antialiased bicubic filter. Both
    are the same filter up to rounding, but libswscale scales the colour planes before they become RGB.
    """

    valid_kwargs = VideoMa2mbaVideoProcessorKwargs  # type: ignore[assignment]  # declared for images alone
    model_input_names = ["pixel_values_videos"]  # noqa: RUF012 (as transformers declares it)
    # set by the base class from the arguments
    size: dict[str, int]
    resize_mode: str
    do_rescale: bool
    do_normalize: bool
    image_mean: list[float]
    image_std: list[float]
    fps: float

    def __init__(
        self,
        size: int | dict[str, int] = 336,
        resize_mode: str = "crop",
        do_rescale: bool = False,
        do_normalize: bool = False,
        image_mean: Sequence[float] = (0.48145466, 0.4578275, 0.40821073),
        image_std: Sequence[float] = (0.26862954, 0.26130258, 0.27577711),
        fps: float = 1.0,
        **kwargs,
    ):
        side = size if isinstance(size, int) else size.get("height")
        if not side or side < 1 or (not isinstance(size, int) and dict(size) != {"height": side, "width": side}):
            raise ValueError(f"size must be a number of pixels or a square {{'height': n, 'width': n}}, got {size}.")
        if resize_mode not in RESIZE_MODES:
            raise ValueError(f"resize_mode must be one of {', '.join(RESIZE_MODES)}, got {resize_mode!r}.")
        check(kwargs, media_rules(side, resize_mode) | {"num_frames": ((), "Give it in the call, or with the video.")})
        super().__init__(  # type: ignore[call-arg]  # it keeps settings that it does not know
            size={"height": side, "width": side},
            resize_mode=resize_mode,
            do_rescale=do_rescale,
            do_normalize=do_normalize,
            image_mean=list(image_mean),
            image_std=list(image_std),
            fps=fps,
            **kwargs,
        )

    @property
    def side(self) -> int:
        """Height and width of the frames given out, in pixels."""
        return self.size["height"]

    def preprocess(self, videos: Any, **options: Unpack[VideoMa2mbaVideosKwargs]) -> BatchFeature:
        """Loads one video, or a list of videos, one per row.

        Args:
            videos: What `load` takes, a file's bytes, {"path", "bytes"}, a list of the files of frames; or a list of
                that.
            options: See `VideoMa2mbaVideosKwargs`; `return_tensors` is "pt" by default, or "np".

        Returns:
            `pixel_values_videos`: (videos, frames, 3, side, side), uint8, or float32 after rescaling. Shorter videos
            end in zero frames.

        Raises:
            TypeError: An option that is not known.
            ValueError: One that cannot be honoured.
        """
        if unknown := options.keys() - NAMES["videos_kwargs"]:
            raise TypeError(f"The video processor has no option {', '.join(sorted(unknown))}.")
        given = {name: value for name, value in options.items() if value is not None}
        check_sampling(given)
        check(given, media_rules(self.side, self.resize_mode))
        flattened = flatten_videos(videos)
        own = flatten_metadata(given.get("video_metadata"), len(flattened))
        loaded = [load_video(self, v, given | {"video_metadata": m}) for v, m in zip(flattened, own, strict=True)]
        pixels = self.stack([[video.frames] for video, _ in loaded], given)
        batch = BatchFeature({"pixel_values_videos": pixels}, tensor_type=options.get("return_tensors", "pt"))
        if given.get("return_timestamps"):
            batch["video_timestamps"] = [video.timestamps_s for video, _ in loaded]
        if given.get("return_metadata"):
            batch["video_metadata"] = [metadata for _, metadata in loaded]
        return batch

    def stack(self, rows: list[list[torch.Tensor]], options: dict[str, Any]) -> torch.Tensor:
        """Rows of loaded media as one tensor.

        Args:
            rows: Per row a list of (frames, 3, side, side), uint8 or float32.
            options: See `VideoMa2mbaVideosKwargs`: those about pixels, and `device`.

        Returns:
            (rows, frames, 3, side, side), the media of a row one after the other, filled with zeros at the end.
        """
        names = ("do_rescale", "do_normalize", "rescale_factor", "image_mean", "image_std")
        asked = {name: options[name] for name in names if name in options}
        if any(part.is_floating_point() for row in rows for part in row):  # the others must be of the same kind
            asked = {"do_normalize": True, **asked, "do_rescale": True}
        empty = torch.empty((0, 3, self.side, self.side), dtype=torch.uint8)
        joined = []
        for row in rows:
            done = [part if part.is_floating_point() else self.rescale_and_normalize_frames(part, **asked)
                    for part in row or [empty]]  # fmt: skip
            joined.append(done[0] if len(done) == 1 else torch.cat(done))
        return stack_rows(joined).to(options.get("device", "cpu"))

    def open_video(
        self, path: Any, *, num_threads: int | None = None, **sampling: Unpack[FrameSampling]
    ) -> VideoFrames:
        """Like `read_frames` of a path, with frames of the size the model wants: pixels are (side, side, 3) uint8.

        Args:
            path, num_threads, sampling: See `read_frames` and `FrameSampling`.
        """
        options: dict[str, Any] = {"num_threads": num_threads, **sampling}
        if options.get("fps") is None:
            options["fps"] = self.fps
        frames = read_frames(path, resize=self._size_while_decoding, **options)
        squared = (VideoFrame(frame.timestamp_s, self._squared(frame.pixels)) for frame in frames)
        return VideoFrames(frames.info, frames.num_frames, squared, frames.close)

    def load(
        self,
        video: Any,
        *,
        fps: float | None = None,
        max_frames: int | None = None,
        start_s: float = 0.0,
        end_s: float | None = None,
        strict: bool = False,
        timestamps: Sequence[float] | None = None,
    ) -> LoadedVideo:
        """Loads one video.

        Args:
            video: A path, URL, bytes or file object, see `read_frames`; or frames in memory: an array or tensor
                (frames, height, width, 3) or (frames, 3, height, width), uint8, or a list of single frames as arrays,
                tensors or PIL images.
            fps, start_s, end_s, strict: Which frames of a file to take; see `read_frames`. Frames in memory are all
                taken.
            max_frames: At most so many frames, spread evenly.
            timestamps: For frames in memory: when each is shown, in seconds, ascending.

        Raises:
            VideoReadError: The file cannot be read; see `read_frames`.
            ValueError: Frames of the wrong rank, dtype or number; timestamps for a file, or `start_s` / `end_s` for
                frames.
        """
        if is_location(video):
            if timestamps is not None:
                name = locate(video).name
                raise ValueError(
                    f"timestamps go with frames in memory; the file {name} brings its own. Leave them out."
                )
            return self._collect(
                self.open_video(video, fps=fps, max_frames=max_frames, start_s=start_s, end_s=end_s, strict=strict)
            )
        if start_s or end_s is not None:
            raise ValueError("start_s and end_s choose a part of a file. Slice frames in memory before passing them.")
        chunks = frame_chunks(video)
        num_frames = sum(len(chunk) for chunk in chunks)
        if timestamps is not None:
            timestamps = [float(second) for second in timestamps]
            if len(timestamps) != num_frames or any(a > b for a, b in itertools.pairwise(timestamps)):
                raise ValueError(
                    f"timestamps must be one ascending number of seconds per frame: got {len(timestamps)} for "
                    f"{num_frames} frames."
                )
        if max_frames is not None and num_frames > max_frames:
            if max_frames < 1:
                raise ValueError(f"max_frames must be at least 1, got {max_frames}. Use None for no limit.")
            keep = [k * num_frames // max_frames for k in range(max_frames)]
            chunks = [torch.cat(chunks)[keep]] if len({c.shape[1:] for c in chunks}) == 1 else [chunks[k] for k in keep]
            timestamps = None if timestamps is None else [timestamps[k] for k in keep]
        return LoadedVideo(torch.cat([self._resize(chunk) for chunk in chunks]), timestamps)

    def load_image(self, image: Any) -> torch.Tensor:
        """Loads one image as a video of one frame: (1, 3, side, side) uint8.

        Args:
            image: A path, URL, bytes or file object; a PIL image; or an array or tensor (height, width, 3) or (3,
                height, width), uint8. Of an animation or a video the first picture is taken, and a warning says so.

        Raises:
            VideoReadError, ValueError: As `load`.
        """
        if not is_location(image):
            return self.load([image]).frames
        location = locate(image)
        if is_picture(location):
            return self.load([first_picture(location)]).frames
        frames = self.load(image, max_frames=1).frames
        warnings.warn(f"{location.name}: {NOT_A_STILL.format('a video')}", stacklevel=2)
        return frames

    def rescale_and_normalize_frames(
        self,
        pixels: torch.Tensor,
        do_rescale: bool | None = None,
        do_normalize: bool | None = None,
        rescale_factor: float | None = None,
        image_mean: float | Sequence[float] | None = None,
        image_std: float | Sequence[float] | None = None,
    ) -> torch.Tensor:
        """(..., 3, height, width) uint8 as it is, or as float32 where the settings or the arguments ask for it.

        Args:
            pixels: As above.
            do_rescale, do_normalize, rescale_factor, image_mean, image_std: In place of the settings of these names.
        """
        do_rescale = self.do_rescale if do_rescale is None else do_rescale
        do_normalize = self.do_normalize if do_normalize is None else do_normalize
        if not (do_rescale or do_normalize):
            return pixels
        pixels = pixels.to(torch.float32) * (self.rescale_factor if rescale_factor is None else rescale_factor)
        if do_normalize:
            statistics = (
                self.image_mean if image_mean is None else image_mean,
                self.image_std if image_std is None else image_std,
            )
            mean, std = (torch.tensor(values, dtype=torch.float32).reshape(-1, 1, 1) for values in statistics)
            pixels = pixels.sub_(mean).div_(std)
        return pixels

    def _collect(self, frames: VideoFrames) -> LoadedVideo:
        """All frames of an iterator in one tensor; stacking a list would need the memory twice."""
        room = min(frames.num_frames, _FRAMES_AT_FIRST)
        pixels = np.empty((room, 3, self.side, self.side), np.uint8)
        timestamps: list[float] = []
        for frame in frames:
            if len(timestamps) == len(pixels):  # the system moves large arrays without copying them
                pixels.resize((min(2 * len(pixels), frames.num_frames), *pixels.shape[1:]), refcheck=False)
            pixels[len(timestamps)] = frame.pixels.transpose(2, 0, 1)
            timestamps.append(frame.timestamp_s)
        pixels.resize((len(timestamps), *pixels.shape[1:]), refcheck=False)
        return LoadedVideo(torch.from_numpy(pixels), timestamps)

    def _size_before_squaring(self, height: int, width: int) -> Size:
        """What to scale a frame to, so that cropping or padding makes it square."""
        if self.resize_mode == "squash":
            return self.side, self.side
        edge = min(height, width) if self.resize_mode == "crop" else max(height, width)
        return max(1, height * self.side // edge), max(1, width * self.side // edge)

    def _size_while_decoding(self, height: int, width: int) -> Size:
        """The same, but for pictures so long that most of what is scaled would be cropped away."""
        if self._is_cut(height, width):
            return height, width
        return self._size_before_squaring(height, width)

    def _is_cut(self, height: int, width: int) -> bool:
        return self.resize_mode == "crop" and max(height, width) > _LONGEST_EDGES * min(height, width)

    def _squared(self, pixels: np.ndarray) -> np.ndarray:
        """(height, width, 3) uint8 as it was decoded -> (side, side, 3)."""
        if not self._is_cut(*pixels.shape[:2]):
            return self._square(pixels)
        return self._resize(torch.from_numpy(pixels).permute(2, 0, 1)[None])[0].permute(1, 2, 0).numpy()

    def _square(self, pixels: np.ndarray, colour: np.ndarray | None = None) -> np.ndarray:
        """Crops the middle of, or pads, (..., height, width, 3) to (..., side, side, 3), by default in uint8's mean."""
        height, width = pixels.shape[-3:-1]
        top, left = abs(height - self.side) // 2, abs(width - self.side) // 2
        if self.resize_mode != "pad":
            return pixels[..., top : top + self.side, left : left + self.side, :]
        if colour is None:
            colour = np.round(np.array(self.image_mean) * 255).astype(np.uint8)
        padded = np.broadcast_to(colour, (*pixels.shape[:-3], self.side, self.side, 3)).copy()
        padded[..., top : top + height, left : left + width, :] = pixels
        return padded

    def _resize(self, frames: torch.Tensor) -> torch.Tensor:
        """(frames, 3, height, width) uint8 -> (frames, 3, side, side) uint8."""
        height, width = frames.shape[-2:]
        if self._is_cut(height, width):
            longest = _LONGEST_EDGES * min(height, width)
            top, left = max(height - longest, 0) // 2, max(width - longest, 0) // 2
            frames = frames[..., top : top + longest, left : left + longest]
        size = self._size_before_squaring(*frames.shape[-2:])
        if size != tuple(frames.shape[-2:]):
            parts = [
                interpolate(part.float(), size, mode="bicubic", antialias=True).round_().clamp_(0, 255).to(torch.uint8)
                for part in frames.split(_FRAMES_AT_ONCE)
            ]
            frames = torch.cat(parts)
        squared = self._square(frames.permute(0, 2, 3, 1).numpy())
        return torch.from_numpy(squared).permute(0, 3, 1, 2).contiguous()


def flatten_videos(videos: Any) -> list:
    """One video, or a (nested) list of videos, as a flat list. A list of single frames is one video."""
    if not isinstance(videos, list | tuple):
        return [videos]
    if videos and is_frame(videos[0]):
        return [videos]
    return [flat for video in videos for flat in flatten_videos(video)]


def flatten_metadata(metadata: Any, num_videos: int) -> list:
    """`video_metadata` as Transformers takes it, one or a (nested) list, as one entry (or None) per video."""
    if metadata is None:
        return [None] * num_videos
    entries = flat(metadata)
    if len(entries) != num_videos:
        raise ValueError(f"video_metadata has {len(entries)} entries for {num_videos} videos. Give one for each.")
    return entries


def flat(nested: Any) -> list:
    """One thing, or a (nested) list of things, as a flat list."""
    return [one for part in nested for one in flat(part)] if isinstance(nested, list | tuple) else [nested]


def stack_rows(rows: list[torch.Tensor]) -> torch.Tensor:
    """Rows of (frames, ...) as one (rows, frames, ...); shorter rows are filled with zeros at the end."""
    if len(rows) == 1:
        return rows[0].unsqueeze(0)  # hours of video: no copy
    longest = max(rows, key=len)
    stacked = longest.new_zeros((len(rows), *longest.shape))
    for filled, row in zip(stacked, rows, strict=True):
        filled[: len(row)] = row
    return stacked
