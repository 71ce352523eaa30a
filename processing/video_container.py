"""Opening a video with PyAV: only as what it is, and leading nowhere else."""

from .media_location import URL_TIMEOUT_S, MediaLocation, VideoReadError, silent

try:
    import av
except ImportError:  # `video_source` says what to install
    av = None  # type: ignore[assignment]

# Formats that name other files or addresses; those of the web may, for what they name is then in the web too.
PLAYLISTS = {"hls", "dash"}
_NOT_VIDEO = {
    "concat",
    "imf",
    "sdp",
    "rtsp",
    "sap",
    "rtp",
    "image2",
    "webm_dash_manifest",
    "lavfi",
    "tty",
    "ffmetadata",
}
_WEB_PROTOCOLS = "http,https,httpproxy,tcp,tls,crypto,data"


def open_container(location: MediaLocation) -> "av.container.InputContainer":
    """What PyAV makes of a file, an address or bytes.

    Raises:
        VideoReadError: It is none that FFmpeg reads, or its server is silent.
    """
    target, is_url = location.target, location.is_url
    if hasattr(target, "seek"):
        target.seek(0)
    refused = _NOT_VIDEO if is_url else _NOT_VIDEO | PLAYLISTS
    options = {
        "format_whitelist": ",".join(sorted(av.formats_available - refused)),
        "protocol_whitelist": _WEB_PROTOCOLS if is_url else "file",
    }
    if is_url:
        options["rw_timeout"] = str(round(URL_TIMEOUT_S * 1e6))
    try:
        # Titles in unknown encodings are no reason to refuse a video.
        return av.open(
            target, "r", options=options, metadata_errors="ignore", timeout=URL_TIMEOUT_S if is_url else None
        )
    except (av.error.ExitError, av.error.TimeoutError) as error:
        raise VideoReadError(silent(location)) from error
    except PermissionError as error:
        raise VideoReadError(f"{location.name}: no permission to read this file. Change its access rights.") from error
    except (av.FFmpegError, OSError, ValueError) as error:
        if location.header[4:8] == b"ftyp":
            raise VideoReadError(
                f"{location.name}: an mp4 file without a readable index, most likely cut off while it was recorded or "
                "downloaded. Copy or download it again."
            ) from error
        if location.header.startswith((b"#EXTM3U", b"ffconcat")):
            raise VideoReadError(
                f"{location.name}: a list of other files, which are not opened for it. "
                "Put them into one file: ffmpeg -i LIST -c copy OUTPUT.mp4"
            ) from error
        reason = getattr(error, "strerror", None) or type(error).__name__
        raise VideoReadError(
            f"{location.name}: this is not a video that FFmpeg can read ({reason}). "
            "Check that it plays in a video player, or convert it to mp4."
        ) from error


def video_stream(container: "av.container.InputContainer", name: str) -> "av.VideoStream":
    """The default video stream, or the first.

    Raises:
        VideoReadError: There is none, or of no codec that is known.
    """
    # The cover picture of a song counts as a video stream in FFmpeg, not here.
    kinds = av.stream.Disposition
    streams = [
        stream
        for stream in container.streams.video
        if not stream.disposition & (kinds.attached_pic | kinds.timed_thumbnails)
    ]
    if not streams:
        found = sorted({stream.type for stream in container.streams})
        raise VideoReadError(
            f"{name}: there are no pictures in this file, only {', '.join(found) or 'nothing'}. Name a video file."
        )
    stream = next((stream for stream in streams if stream.disposition & kinds.default), streams[0])
    if stream.codec_context is None:
        raise VideoReadError(
            f"{name}: its pictures are in a format that this FFmpeg cannot decode. Convert it to mp4, "
            "or, if it should be one, copy or download it again."
        )
    return stream
