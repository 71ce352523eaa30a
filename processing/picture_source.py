"""A picture or an animation that PIL opens: its frames and their times, as `VideoSource` has those of a video.

GIF, PNG, WebP and AVIF may hold an animation; of every other kind the first picture is taken. A still lasts a 25th of a
second, and a frame that asks for 10 ms or less lasts 100, as browsers and FFmpeg have it.
"""

import struct
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError

from .frame_pixels import rgb_of_picture
from .media_location import MediaLocation, VideoReadError, fetch, one_line

NOT_A_STILL = "this is {}, of which an image is the first picture. Give it as a video to have all of them."
_ANIMATED = ("GIF", "PNG", "WEBP", "AVIF")
_MS = Fraction(1, 1000)
_STILL_MS, _SHORTEST_MS, _DEFAULT_MS = 40, 10, 100
_SUFFIXES = (".jpg", ".jpeg", ".png", ".apng", ".gif", ".webp", ".avif", ".bmp", ".tif", ".tiff", ".ppm", ".pgm")
# What PIL and zlib raise for files that are damaged.
_DAMAGE = (OSError, ValueError, SyntaxError, EOFError, struct.error, LookupError, TypeError, ArithmeticError,
           MemoryError, AttributeError, RuntimeError, AssertionError, Image.DecompressionBombError,
           Image.DecompressionBombWarning)  # fmt: skip


@dataclass(frozen=True)
class Picture:
    """One picture of an animation: when it is first shown, in milliseconds, and its pixels, upright RGB."""

    pts: int
    pixels: np.ndarray


def is_picture(location: MediaLocation) -> bool:
    """Whether PIL is to open this: by the first bytes, for in a file name anything may stand."""
    header = location.header
    if location.is_url:
        return location.target.partition("?")[0].lower().endswith(_SUFFIXES)
    if header[:3] == b"\xff\xd8\xff":  # a camera's MJPEG, many pictures and no times, begins as one picture does
        return not location.path.lower().endswith((".mjpg", ".mjpeg"))
    return (
        header.startswith((b"\x89PNG\r\n", b"GIF8", b"II*\0", b"MM\0*", b"P5", b"P6", b"\0\0\1\0"))
        or (header.startswith(b"BM") and header[6:10] == bytes(4))
        or (header.startswith(b"RIFF") and header[8:12] == b"WEBP")
        or (header[4:8] == b"ftyp" and header[8:12] in (b"avif", b"avis", b"mif1", b"msf1", b"heic", b"heix", b"hevc"))
    )


def first_picture(location: MediaLocation) -> np.ndarray:
    """The picture, or the first of an animation, which a warning says: (height, width, 3) uint8.

    Raises:
        VideoReadError: As `PictureSource`.
    """
    source = PictureSource(location)
    try:
        pixels = source.at(0)
    finally:
        source.close()
    if source.num_frames > 1:
        warnings.warn(f"{source.name}: {NOT_A_STILL.format('an animation')}", stacklevel=3)
    return pixels


def check_picture(location: MediaLocation) -> None:
    """Whether the file is whole, as far as that shows without decoding it.

    Raises:
        VideoReadError: It is no picture, or damaged.
    """
    source = PictureSource(location)
    try:
        with source.reading():
            source.image.verify()
    finally:
        source.close()


class _Bounded:
    """A file of which no more is read than it has: PIL asks for what a length in it says, and memory is had first."""

    def __init__(self, file: Any):
        self._file, self._size = file, file.seek(0, 2)
        file.seek(0)

    def read(self, size: int = -1) -> bytes:
        left = max(self._size - self._file.tell(), 0)
        return self._file.read(min(size, left) if size >= 0 else left)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


class PictureSource:
    """An open picture file.

    Args:
        location: What `is_picture` says yes to.

    Attributes:
        image: PIL's.
        num_frames: 1 for a still.
        duration, origin, end, holes, size, slack: As of `VideoSource`.

    Raises:
        VideoReadError: PIL does not open it.
    """

    def __init__(self, location: MediaLocation):
        if location.is_url:
            location = fetch(location)
        self.name, self.path = location.name, location.path
        with ExitStack() as opened, self.reading(), warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            is_path = isinstance(location.target, str)
            file = opened.enter_context(open(location.target, "rb")) if is_path else location.target
            self.image = opened.enter_context(Image.open(_Bounded(file)))
            animated = self.image.format in _ANIMATED and getattr(self.image, "n_frames", 1) > 1
            self.num_frames = self.image.n_frames if animated else 1  # type: ignore[attr-defined]
            self._first = int(animated and bool(getattr(self.image, "default_image", False)))
            self.num_frames -= self._first  # a PNG's still for those who cannot show animations
            self.close = opened.pop_all().close
        self.holes: list[tuple[int, int]] = []
        self.origin = self.end = 0

    # --- as VideoSource ---

    keyframe_interval: Fraction | None = None
    slack = _MS / 1000
    unread_bytes = 0

    def examine(self, stop_at_gap: Fraction | None = None) -> None:
        """Finds the times, for which an animation is decoded once."""
        self._times, time = [], 0
        for number in range(self.num_frames):
            self._times.append(time)
            time += self._duration_ms(number)
        self.duration = time * _MS
        self.average_fps = float(self.num_frames / self.duration)

    def begin(self, thread_type: Any) -> None:
        height, width = self.at(0).shape[:2]
        self.size = height, width

    def ticks(self, seconds: Fraction) -> int:
        return int(seconds / _MS + Fraction(1, 1000))

    def seconds(self, ticks: int) -> float:
        return float(ticks * _MS)

    def frames_from(self, target: int) -> Iterator[Picture]:
        first = max(number for number, time in enumerate(self._times) if time <= max(target, 0))
        for number in range(first, self.num_frames):
            later = self._times[number + 1 :]
            self.end = later[0] if later else self.ticks(self.duration)
            yield Picture(self._times[number], self.at(number))

    def frame_at(self, target: int) -> Picture | None:
        return next(self.frames_from(target))

    def restart(self) -> None:
        """Nothing runs."""

    def pixels(self, picture: Picture, resize: Any) -> np.ndarray:
        height, width = picture.pixels.shape[:2]
        size = (height, width) if resize is None else resize(height, width) if callable(resize) else resize
        if tuple(size) == (height, width):
            return picture.pixels
        with self.reading():
            return np.array(Image.fromarray(picture.pixels).resize(size[::-1], Image.Resampling.BICUBIC))

    # --- PIL ---

    def at(self, number: int) -> np.ndarray:
        """One of the pictures: (height, width, 3) uint8."""
        with self.reading():
            if self.num_frames > 1:
                self.image.seek(self._first + number)
            pixels = rgb_of_picture(self.image)
        if 0 in pixels.shape:
            raise VideoReadError(f"{self.name}: this picture has no pixels.")
        return pixels

    def _duration_ms(self, number: int) -> int:
        if self.num_frames == 1:
            return _STILL_MS
        with self.reading():
            self.image.seek(self._first + number)
            self.image.load()  # WebP and AVIF know the duration when it is decoded
            duration = round(float(self.image.info.get("duration", 0)))
        return duration if duration > _SHORTEST_MS else _DEFAULT_MS

    @contextmanager
    def reading(self) -> Iterator[None]:
        """Errors of PIL in here become one `VideoReadError`."""
        try:
            yield
        except VideoReadError:
            raise
        except _DAMAGE as error:
            known = not isinstance(error, UnidentifiedImageError)
            said = (one_line(str(error)) or type(error).__name__) if known else "it is no picture that PIL knows"
            raise VideoReadError(
                f"{self.name}: this picture cannot be read ({said}). "
                "Check that it opens in an image viewer, or save it as PNG or JPEG."
            ) from error
