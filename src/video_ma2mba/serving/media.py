"""Files that clients name or send, brought within reach, and nothing else.

1. A path is read only under an allowed folder, looked at where it really leads once it is open.
2. A URL is fetched only where URLs are allowed, from addresses of the public internet only unless told otherwise: the
   address that was checked is the one connected to, at every redirect anew.
3. A medium is a bounded file before anything of it is decoded. It is opened by a demuxer of the list below, which read
   that file and nothing else: a playlist (m3u8, mpd, concat) is refused.
4. Its length and the size of its pictures are looked at before it is watched.
"""

import base64
import binascii
import hashlib
import http.client
import ipaddress
import os
import socket
import ssl
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO
from urllib.parse import unquote, unquote_to_bytes, urljoin, urlsplit

DEMUXERS = (
    "mov", "mp4", "m4a", "3gp", "3g2", "mj2", "matroska", "webm", "avi", "mpegts", "mpeg", "mpegvideo", "flv", "ogg",
    "asf", "gif", "apng", "ivf", "h264", "hevc", "av1", "m4v", "nut", "mxf",
)  # fmt: skip
IMAGE_DEMUXERS = (
    "png_pipe", "jpeg_pipe", "webp_pipe", "bmp_pipe", "tiff_pipe", "gif", "apng", "jpegxl_pipe", "webp", "webp_anim",
)  # fmt: skip
MAX_PIXELS = 2**26  # of a picture: 8192 x 8192
MAX_REDIRECTS = 5
FETCH_TIMEOUT_S = 600.0  # for the whole of a URL
SOCKET_TIMEOUT_S = 20.0
_BLOCK = 2**20


class Forbidden(ValueError):
    """A medium that clients may not name."""


class TooLarge(ValueError):
    """A medium beyond the bounds of this server."""


@dataclass
class Medium:
    """A file within reach.

    Attributes:
        path: where to read it.
        sha256: of its bytes, in hexadecimal digits.
        source: the path under an allowed folder; None for what this server keeps itself.
        file: held open while `path` leads to it.
    """

    path: Path
    sha256: str
    source: str | None = None
    file: BinaryIO | None = None

    def discard(self) -> None:
        """Close it, and remove what is only a copy."""
        if self.file is not None:
            self.file.close()
        if self.source is None:
            self.path.unlink(missing_ok=True)


@dataclass(frozen=True)
class MediaRules:
    """What clients may name and send.

    Args:
        folders: under which paths may be read.
        urls: whether http and https URLs may be fetched.
        private_urls: also from addresses that are not of the public internet.
        max_bytes: of a file.
        max_duration_s: of a video.
    """

    folders: tuple[Path, ...] = ()
    urls: bool = False
    private_urls: bool = False
    max_bytes: int = 2 * 2**30
    max_duration_s: float = 24 * 3600.0
    _known: dict[tuple, str] = field(default_factory=dict, repr=False)  # hashes of files that did not change since

    # --- coming by it ------------------------------------------------------------------------------------------------

    def bring(self, url: str, into: Path) -> Medium:
        """The medium of a `data:`, `file:`, `http:` or `https:` URL, or of a path.

        Args:
            into: folder for what has to be copied.

        Raises:
            Forbidden: it may not be read. TooLarge: it is too large. ValueError: it cannot be read. OSError: no space.
        """
        scheme = url[:12].partition(":")[0].lower() if ":" in url[:12] else ""
        if scheme == "data":
            return self.keep(_of_data_url(url, self.max_bytes), into)
        if scheme in ("http", "https"):
            if not self.urls:
                raise Forbidden("this server fetches no URLs: send the file, or start it with --allow-urls")
            return self.keep(self._fetched(url), into)
        if scheme == "file":
            parts = urlsplit(url)
            if parts.netloc not in ("", "localhost"):
                raise Forbidden("a file URL must name a file of this machine: file:///folder/file")
            return self.open(unquote(parts.path))
        if "://" in url[:64]:
            raise Forbidden("a medium is named by a path or by a data, file, http or https URL")
        return self.open(url)

    def keep(self, blocks: Iterator[bytes], into: Path) -> Medium:
        """Write what comes to a file of its own."""
        path = into / f"incoming-{uuid.uuid4().hex}"
        digest, size = hashlib.sha256(), 0
        try:
            with open(path, "xb") as file:
                for block in blocks:
                    size += len(block)
                    if size > self.max_bytes:
                        raise TooLarge(f"the file is larger than the {self.max_bytes} bytes that this server takes")
                    digest.update(block)
                    file.write(block)
        except BaseException:
            path.unlink(missing_ok=True)
            raise
        return Medium(path, digest.hexdigest())

    def open(self, path: str) -> Medium:
        """A file under an allowed folder, held open (rule 1)."""
        said = "this server reads files under the folders of --allow-media alone, and has no such file there"
        if not self.folders or "\0" in path or not os.path.isabs(path):
            raise Forbidden(said + ("" if os.path.isabs(path) else ": name it by its whole path"))
        if not self._allows(os.path.realpath(path)):
            raise Forbidden(said)
        try:
            # a pipe must not keep us waiting for somebody to write
            file = os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK | getattr(os, "O_CLOEXEC", 0)), "rb")
        except OSError:
            raise Forbidden(said) from None
        descriptor = Path(f"/proc/self/fd/{file.fileno()}")
        within = descriptor if descriptor.exists() else Path(os.path.realpath(path))
        real = os.path.realpath(within)
        status = os.fstat(file.fileno())
        try:
            if not self._allows(real) or not os.path.isfile(within):
                raise Forbidden(said)
            if status.st_size > self.max_bytes:
                raise TooLarge(f"the file is larger than the {self.max_bytes} bytes that this server takes")
            state = (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)
            if state not in self._known:
                if len(self._known) > 10_000:
                    self._known.clear()
                self._known[state] = hashlib.file_digest(file, "sha256").hexdigest()
        except BaseException:
            file.close()
            raise
        return Medium(within, self._known[state], real, file)

    def _allows(self, real: str) -> bool:
        return any(Path(real).is_relative_to(os.path.realpath(folder)) for folder in self.folders)

    # --- URLs (rule 2) -----------------------------------------------------------------------------------------------

    def _fetched(self, url: str) -> Iterator[bytes]:
        end = time.monotonic() + FETCH_TIMEOUT_S
        for _ in range(MAX_REDIRECTS + 1):
            connection, target = self._connect(url)
            try:
                connection.request("GET", target, headers={"User-Agent": "video-ma2mba", "Accept-Encoding": "identity"})
                response = connection.getresponse()
                if response.status in (301, 302, 303, 307, 308):
                    url = urljoin(url, response.getheader("Location") or "")
                    continue
                if response.status != 200:
                    raise ValueError(f"the URL could not be fetched: its server answered {response.status}")
                declared = response.getheader("Content-Length") or ""
                if declared.isdigit() and int(declared) > self.max_bytes:
                    raise TooLarge(f"the file is larger than the {self.max_bytes} bytes that this server takes")
                received = 0
                while block := response.read1(_BLOCK):
                    received += len(block)
                    if time.monotonic() > end:
                        raise ValueError(f"the URL could not be fetched within {FETCH_TIMEOUT_S:g} s")
                    yield block
                if declared.isdigit() and received != int(declared):
                    raise ValueError("the URL could not be fetched: its server broke off")
                return
            except (http.client.HTTPException, OSError) as error:
                raise ValueError(f"the URL could not be fetched: {type(error).__name__}") from error
            finally:
                connection.close()
        raise ValueError(f"the URL could not be fetched: more than {MAX_REDIRECTS} redirects")

    def _connect(self, url: str) -> tuple[http.client.HTTPConnection, str]:
        """A connection to an address of the URL's host that was checked, and what to ask it for."""
        try:
            parts = urlsplit(url)
            port = parts.port or (443 if parts.scheme == "https" else 80)
            host = (parts.hostname or "").encode("idna").decode()
        except ValueError as error:  # UnicodeError is one
            raise Forbidden("the URL is not a valid one") from error
        if parts.scheme not in ("http", "https") or not host or parts.username or parts.password:
            raise Forbidden("only http and https URLs without a user's name are fetched, also where one redirects")
        target = parts._replace(scheme="", netloc="", fragment="", path=parts.path or "/").geturl()
        if any(not 32 < ord(character) < 127 for character in target):
            raise Forbidden("the URL holds characters that must be written as %xx")
        try:
            found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        except OSError as error:
            raise ValueError("the URL could not be fetched: its host is not known") from error
        addresses = [str(entry[4][0]) for entry in found]
        if not self.private_urls and not all(is_public(address) for address in addresses):
            raise Forbidden(
                "the URL leads to an address that is not of the public internet; --allow-private-urls allows it"
            )
        kind: type[http.client.HTTPConnection] = _PinnedHTTPS if parts.scheme == "https" else http.client.HTTPConnection
        connection = kind(host, port, timeout=SOCKET_TIMEOUT_S)
        # the address that was checked: a name may lead elsewhere when it is looked up again
        connection._create_connection = (  # type: ignore[attr-defined]
            lambda place, timeout, source: socket.create_connection((addresses[0], place[1]), timeout, source)
        )
        return connection, target


class _PinnedHTTPS(http.client.HTTPSConnection):
    """The certificate is that of the name, whatever address is connected to."""

    def __init__(self, host: str, port: int, timeout: float):
        super().__init__(host, port, timeout=timeout, context=ssl.create_default_context())


def is_public(address: str) -> bool:
    """Whether an IP address is of the public internet, also where it stands inside one of version 6."""
    ip = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(ip, ipaddress.IPv6Address):
        inner = ip.ipv4_mapped or ip.sixtofour or (ip.teredo or (None, None))[1]
        if ip in ipaddress.ip_network("64:ff9b::/96") or ip in ipaddress.ip_network("::/96"):
            inner = ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)
        if inner is not None:
            return is_public(str(inner))
    return ip.is_global and not (ip.is_multicast or ip.is_reserved)


def _of_data_url(url: str, max_bytes: int) -> Iterator[bytes]:
    head, comma, body = url.partition(",")
    if not comma:
        raise ValueError("a data URL reads data:TYPE;base64,DATA")
    if len(body) > 4 * max_bytes:
        raise TooLarge(f"the file is larger than the {max_bytes} bytes that this server takes")
    try:
        yield base64.b64decode(body, validate=True) if head.endswith(";base64") else unquote_to_bytes(body)
    except (binascii.Error, ValueError) as error:
        raise ValueError(f"the data URL is not valid base64: {error}") from error


# --- looking at it (rules 3 and 4) -----------------------------------------------------------------------------------


def check(path: Path, kind: str, max_duration_s: float) -> None:
    """Refuse what is no plain file of a video or an image, before it is watched.

    Args:
        kind: "video" or "image".

    Raises:
        ValueError: it cannot be read, or only by following it to other files. TooLarge: too long or too wide.
    """
    import av

    # the image formats that hold one picture are read by demuxers of their own
    demuxers = DEMUXERS if kind == "video" else (*IMAGE_DEMUXERS, *DEMUXERS)
    bounds = {"max_pixels": str(MAX_PIXELS)}
    try:
        with av.open(
            str(path), metadata_errors="ignore", stream_options=[bounds] * 16,  # type: ignore[list-item]  # a dict each
            options={"format_whitelist": ",".join(demuxers), "protocol_whitelist": "file", **bounds},
        ) as container:  # fmt: skip
            for stream in container.streams.video:
                codec = stream.codec_context
                # what is too wide was not looked into, and has no size
                if codec is not None and not 0 < codec.width * codec.height <= MAX_PIXELS:
                    raise TooLarge(f"its pictures have more than the {MAX_PIXELS} pixels that this server takes")
            if not container.streams.video:
                raise ValueError(f"there are no pictures in the {kind}")
            lasts = [container.duration / av.time_base] if container.duration else []
            declared = ((stream.duration, stream.time_base) for stream in container.streams.video)
            lasts += [float(ticks * base) for ticks, base in declared if ticks and base]
    except (av.FFmpegError, OSError) as error:
        raise ValueError(f"this is not a {kind} that this server reads: {error.strerror}") from error
    if kind == "video" and max(lasts, default=0.0) > max_duration_s:
        raise TooLarge(f"the video lasts {max(lasts):.0f} s; this server takes {max_duration_s:g} s")
