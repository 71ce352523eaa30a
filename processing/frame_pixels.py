"""What the pixels of a picture are, wherever it comes from: RGB, upright, 8 bits, (height, width, 3) uint8.

Frames of videos: converted by libswscale with the matrix and the range that the file names (BT.601 where it names
none), high dynamic range without tone mapping, interlaced frames as they are stored; turned by the display matrix;
pixels that are not square become square. Pictures: converted and turned as PIL does it, transparency left out, but for
16 bits of grey, of which PIL would cut off all above 255: the upper 8 are taken. Frames in memory:
see `frames_in_memory.py`.
"""

from typing import Any

import numpy as np
from PIL import ImageOps

Size = tuple[int, int]  # height, width
Orientation = tuple[bool, bool, bool]  # transpose, then flip left-right, then flip upside down


# --- frames of videos ---


def orientation_of(frame: Any) -> Orientation:
    """How the display matrix turns a stored frame: (transpose, then flip left-right, then flip upside down).

    The matrix maps stored (x, y) to displayed (a x + c y, b x + d y), fixed point, y pointing down. Ask once per file:
    PyAV's side data and its frame hold each other, so a frame once asked lives until the next garbage collection.
    """
    try:
        side_data: Any = frame.side_data
        matrix = np.frombuffer(bytes(side_data["DISPLAYMATRIX"]), dtype=np.int32)
    except KeyError:
        return False, False, False
    except ValueError:  # side data of a kind that PyAV does not know, as the EXIF of a camera's MJPEG
        return {90: (True, False, True), 180: (False, True, True), 270: (True, True, False)}.get(
            round(frame.rotation) % 360, (False, False, False)
        )
    a, b, _, c, d = (int(value) for value in matrix[:5])
    if abs(b) > abs(a):
        return True, c < 0, b < 0
    return False, a < 0, d < 0


def displayed_size(frame: Any, orientation: Orientation, pixel_aspect: float) -> Size:
    """(height, width) of a frame as it is to be seen; `pixel_aspect` is the width of a stored pixel over its height."""
    height, width = frame.height, max(1, round(frame.width * pixel_aspect))
    return (width, height) if orientation[0] else (height, width)


def rgb_of_frame(frame: Any, orientation: Orientation, size: Size, reformatter: Any) -> np.ndarray:
    """Scales to `size` as displayed, converts and turns one frame: (height, width, 3) uint8."""
    transpose, flip_x, flip_y = orientation
    height, width = reversed(size) if transpose else size
    pixels = reformatter.reformat(frame, width, height, "rgb24", interpolation="BICUBIC").to_ndarray()
    if not (transpose or flip_x or flip_y):
        return pixels
    if transpose:
        pixels = pixels.swapaxes(0, 1)
    return np.ascontiguousarray(pixels[:: -1 if flip_y else 1, :: -1 if flip_x else 1])


# --- pictures ---


def rgb_of_picture(picture: Any) -> np.ndarray:
    """A PIL image as (height, width, 3) uint8.

    Raises:
        ValueError: Values of more than 16 bits, whose range is not known.
    """
    picture = ImageOps.exif_transpose(picture)
    if picture.mode.startswith(("I", "F")):
        values = np.asarray(picture)
        wide = picture.mode.startswith("I;16") or (picture.mode == "I" and values.max(initial=0) > 255)
        if values.min(initial=0) < 0 or values.max(initial=0) >= (65536 if wide else 256):
            raise ValueError(
                f"A picture of PIL's mode {picture.mode} with values from {values.min():g} to {values.max():g} has no "
                "range that is known. Convert it to 8 bits first."
            )
        grey = (values >> 8 if wide else values).astype(np.uint8)
        return np.repeat(grey[..., None], 3, axis=-1)
    return np.array(picture.convert("RGB"))
