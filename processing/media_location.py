"""What a video or picture is given as, and what is opened for it: a file, an address in the web, or bytes at hand.

A name is the name of a file wherever there is such a file, whatever characters it holds. What is read from elsewhere
can lead nowhere else: from a file or from bytes no other file is opened, from the web only the web is reached, and a
server that is silent for `URL_TIMEOUT_S` is given up.
"""

import base64
import binascii
import io
import os
import re
import shutil
import stat
import tempfile
import urllib.error
import urllib.request
from dataclasses import dataclass
from typing import Any
from urllib.parse import unquote, unquote_to_bytes, urlparse

URL_TIMEOUT_S = 15.0  # of silence
_MAX_PICTURE_BYTES = 256 << 20  # of a picture in the web
_IN_MEMORY_BYTES = 64 << 20  # of what cannot seek and is copied first; the rest goes to a temporary file
_NAME_LENGTH = 240
_HEADER_BYTES = 64


class VideoReadError(ValueError):
    """A video or picture that cannot be read as asked. The message is one line, names the file and the remedy.

    Attributes:
        beyond_the_end: The part that is asked for begins where the video has ended.
    """

    beyond_the_end = False


@dataclass(frozen=True)
class MediaLocation:
    """Where the bytes are.

    Attributes:
        path: As it was given, for `VideoInfo`; bytes and objects are called by what they are.
        name: For messages: one short line.
        target: What is opened: an absolute path, a URL, or a binary file object that can seek.
        is_url: Whether it is in the web.
        header: The first bytes of it; none of a URL.
    """

    path: str
    name: str
    target: Any
    is_url: bool = False
    header: bytes = b""


def is_location(given: Any) -> bool:
    """Whether this says where bytes are, or is bytes: all but frames in memory."""
    return isinstance(given, str | os.PathLike | bytes | bytearray | memoryview) or hasattr(given, "read")


def one_line(text: str, length: int = _NAME_LENGTH) -> str:
    """The text on one line, its middle left out where it is long."""
    text = " ".join(text.split())
    return text if len(text) <= length else f"{text[: length // 2]} ... {text[-length // 4 :]}"


def locate(given: Any) -> MediaLocation:
    """Finds what was given, and opens nothing but bytes.

    Args:
        given: A path; a `file://`, `http://`, `https://` or `data:` URL; bytes; or a binary file object, which is read
            from its beginning and left open. One that cannot seek is read to its end first.

    Raises:
        VideoReadError: There is no such file, it is empty, a folder, a pipe or a device, or an address of another kind.
    """
    if isinstance(given, bytes | bytearray | memoryview):
        return _of_object(io.BytesIO(given), "bytes in memory")
    if hasattr(given, "read"):
        return _of_object(_that_seeks(given), str(getattr(given, "name", None) or type(given).__name__))
    path = os.fsdecode(os.fspath(given))
    if not os.path.exists(path):
        if path.startswith("data:"):
            return _of_object(io.BytesIO(_data_of(path)), f"a data: URL of {len(path):,} characters")
        if path.startswith("file:"):
            return _of_file(_file_of(path))
        scheme = re.match(r"([A-Za-z][A-Za-z0-9+.-]*)://", path)
        if scheme is not None:
            if scheme[1].lower() not in ("http", "https"):
                raise VideoReadError(
                    f"'{one_line(path)}': addresses that begin with {scheme[1]}: are not read, only http:, https:, "
                    "file: and data:. Save the video, or a part of it, to a file first."
                )
            return MediaLocation(path, f"'{one_line(path)}'", path, is_url=True)
    return _of_file(path)


def fetch(location: MediaLocation) -> MediaLocation:
    """A picture in the web as bytes.

    Raises:
        VideoReadError: The server does not give it, is silent, or gives more than a picture has.
    """
    try:
        with urllib.request.urlopen(location.target, timeout=URL_TIMEOUT_S) as response:
            data = response.read(_MAX_PICTURE_BYTES + 1)
    except TimeoutError as error:
        raise VideoReadError(silent(location)) from error
    except (OSError, ValueError) as error:
        if isinstance(getattr(error, "reason", None), TimeoutError):
            raise VideoReadError(silent(location)) from error
        raise VideoReadError(
            f"{location.name}: the server does not give this picture ({one_line(str(error))}). Check the address."
        ) from error
    if len(data) > _MAX_PICTURE_BYTES:
        raise VideoReadError(f"{location.name}: more than {_MAX_PICTURE_BYTES >> 20} MiB; this is no picture.")
    found = _of_object(io.BytesIO(data), location.path)
    return MediaLocation(location.path, location.name, found.target, header=found.header)


def silent(location: MediaLocation) -> str:
    """What is said of a server that does not answer."""
    return (
        f"{location.name}: the server has sent nothing for {URL_TIMEOUT_S:.0f} s. "
        "Try again later, or download the file first."
    )


def _of_object(file: Any, name: str) -> MediaLocation:
    file.seek(0)
    header = file.read(_HEADER_BYTES)
    file.seek(0)
    name = one_line(name) if name.startswith(("bytes", "a data")) else f"'{one_line(name)}'"
    if not isinstance(header, bytes):
        raise VideoReadError(f"{name}: this gives text. Open it for reading bytes: open(path, 'rb').")
    if not header:
        raise VideoReadError(f"{name}: there is not one byte in it. Check where it comes from.")
    return MediaLocation(name.strip("'"), name, file, header=header)


class _Copy(tempfile.SpooledTemporaryFile):
    """Closed when nobody reads it any more, which is no mistake to be warned of."""

    def __del__(self) -> None:
        self.close()


def _that_seeks(file: Any) -> Any:
    try:
        if file.seekable():
            return file
    except (AttributeError, OSError, ValueError):
        pass  # an object of others with no more than `read`
    copy = _Copy(_IN_MEMORY_BYTES)
    shutil.copyfileobj(file, copy)
    return copy


def _data_of(url: str) -> bytes:
    header, comma, body = url.partition(",")
    try:
        if not comma:
            raise ValueError("there is no comma in it")
        return base64.b64decode(unquote_to_bytes(body)) if header.endswith(";base64") else unquote_to_bytes(body)
    except (binascii.Error, ValueError) as error:
        raise VideoReadError(f"a data: URL of {len(url):,} characters: it does not decode ({error}).") from error


def _file_of(url: str) -> str:
    """The path of a `file:` URL; where somebody put it before a name as it is, that name."""
    plain = re.sub(r"^file:(//(localhost(?=/))?)?", "", url)
    return plain if os.path.exists(plain) else unquote(urlparse(url).path)


def _of_file(path: str) -> MediaLocation:
    name = f"'{one_line(path)}'"
    try:
        mode = os.stat(path).st_mode
        if stat.S_ISDIR(mode):
            raise VideoReadError(f"{name}: this is a folder. Name a video file in it.")
        if not stat.S_ISREG(mode):
            kind = "pipe" if stat.S_ISFIFO(mode) else "device" if stat.S_ISCHR(mode) else "socket"
            raise VideoReadError(
                f"{name}: this is a {kind}, which can be read only once. Save it to a file first, or pass it opened: "
                "open(path, 'rb'), sys.stdin.buffer."
            )
        with open(path, "rb") as file:
            header = file.read(_HEADER_BYTES)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise VideoReadError(f"{name}: there is no such file. Check the path.") from error
    except PermissionError as error:
        raise VideoReadError(f"{name}: no permission to read this file. Change its access rights.") from error
    except (OSError, ValueError) as error:  # a name that is too long or holds a zero byte, a disk that fails
        raise (
            error
            if isinstance(error, VideoReadError)
            else VideoReadError(f"{name}: this file cannot be read ({one_line(str(error))}).")
        ) from error
    if not header:
        raise VideoReadError(f"{name}: the file is empty. Copy or download it again.")
    return MediaLocation(path, name, os.path.abspath(path), header=header)
