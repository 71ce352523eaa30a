"""What people are shown of a memory: its name, pictures of its time line, its video, all of it as a file.

    DIR/<id>/stills/stills.json    which part of the video they show, and their times
    DIR/<id>/stills/<n>.jpg        from the video itself, and not from the few pixels that the model was given

The pictures are made when a video comes in (`stills` of `POST /v1/memories`), and stay when it is gone.
"""

import json
import re
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from PIL import Image
from pydantic import BaseModel, ConfigDict, Field
from starlette.background import BackgroundTask
from starlette.responses import FileResponse, Response, StreamingResponse

from ..files import write_json
from ..processing.video_reader import read_frames
from .guard import ApiError
from .media import Medium
from .memories import Memories

NUM_STILLS = 24
STILL_HEIGHT, STILL_WIDTH = 270, 480  # at most
STILLS_FPS = 60.0  # of a clip so short that not even this gives as many
RANGE_BYTES = 2**20  # of a video in one response: a player that pauses leaves nobody waiting for it to take the rest
STILLS = "stills.json"
# What the file of a stranger may do when it is opened by itself.
SAFE = {"X-Content-Type-Options": "nosniff", "Content-Security-Policy": "default-src 'none'; sandbox"}
VIDEO = {**SAFE, "Accept-Ranges": "bytes", "Cache-Control": "private, no-cache"}
# What the models that we know are good at.
KNOWN = {
    "video-ma2mba-tiny": {
        "knows": "a tiny model, which knows videos of coloured shapes and nothing else",
        "questions": [
            "What colour was the circle?", "Which shape came first of all?", "Which shape came last of all?",
            "Did a red square ever appear?",
        ],
    }
}  # fmt: skip
UNKNOWN = {"knows": "", "questions": ["What happens in this video?", "How does it end?", "What is shown at 0:30?"]}


class Rename(BaseModel):
    """`PATCH /v1/memories/{id}`."""

    model_config = ConfigDict(extra="forbid")
    name: str = Field(min_length=1, max_length=200, pattern=r"\S")


def write_stills(video: Path, start_s: float, end_s: float | None, folder: Path) -> None:
    """Pictures spread evenly over a part of a video, as JPEG files of at most STILL_WIDTH x STILL_HEIGHT pixels.

    Raises:
        ValueError: the video cannot be read, or is over before `start_s`.
    """
    try:
        frames = read_frames(video, STILLS_FPS, start_s=start_s, end_s=end_s, max_frames=NUM_STILLS, resize=_still_size)
        times_s = []
        for number, frame in enumerate(frames):
            Image.fromarray(frame.pixels).save(folder / f"{number}.jpg", quality=80)
            times_s.append(round(frame.timestamp_s, 3))
    except ValueError as error:  # it names a file of this server
        raise ValueError(str(error).removeprefix(f"{str(video)!r}: ").removeprefix(f"{video}: ")) from error
    ends = frames.info.duration_s if end_s is None else min(end_s, frames.info.duration_s)
    height, width = frame.pixels.shape[:2]
    shown = {"start_s": start_s, "end_s": round(ends, 3), "width": width, "height": height, "times_s": times_s}
    write_json(folder / STILLS, shown)


def _still_size(height: int, width: int) -> tuple[int, int]:
    scale = min(1.0, STILL_HEIGHT / height, STILL_WIDTH / width)
    return max(1, round(height * scale)), max(1, round(width * scale))


def model_facts(name: str, model: Any, processor: Any, max_bytes: int) -> dict[str, Any]:
    """What a page says about the model before anybody asked it anything."""
    text, dtype = model.config.text_config, model.dtype
    # keys and values of all layers of a Transformer as deep and as wide
    attention = 2 * text.num_hidden_layers * text.hidden_size * dtype.itemsize
    return {
        "id": name, **KNOWN.get(name, UNKNOWN), "fps": processor.video_processor.fps, "max_bytes": max_bytes,
        "memory_bytes": model.model.language_model.new_cache(1).num_bytes, "attention_bytes_per_token": attention,
        "tokens_per_frame": model.config.tokens_per_frame,
    }  # fmt: skip


def add_routes(app: FastAPI, memories: Memories, facts: dict[str, Any]) -> None:
    """The endpoints of what is shown.

    Args:
        facts: of `model_facts`.
    """

    def folder_of(memory_id: str) -> Path:
        try:
            memories.describe(memory_id)
        except KeyError:
            raise _nothing(f"there is no memory {memory_id!r}", "memory_not_found") from None
        return memories.folder / memory_id

    @app.get("/v1/about")
    async def about() -> dict[str, Any]:
        return facts

    @app.patch("/v1/memories/{memory_id}")
    def rename(memory_id: str, wanted: Rename) -> dict[str, Any]:
        folder_of(memory_id)
        memories.rename(memory_id, wanted.name.strip())
        return memories.describe(memory_id)

    @app.get("/v1/memories/{memory_id}/stills")
    def stills(memory_id: str) -> dict[str, Any]:
        try:
            shown = json.loads((folder_of(memory_id) / "stills" / STILLS).read_text(encoding="utf-8"))
        except OSError:
            raise _nothing("no pictures of this memory were kept") from None
        return {"object": "list", **shown}

    @app.get("/v1/memories/{memory_id}/stills/{number}")
    def still(memory_id: str, number: int) -> FileResponse:
        path = folder_of(memory_id) / "stills" / f"{number}.jpg"
        if not path.is_file():
            raise _nothing("there is no such picture")
        kept = {"Cache-Control": "private, max-age=86400, immutable"}
        return FileResponse(path, media_type="image/jpeg", headers={**SAFE, **kept})

    @app.get("/v1/memories/{memory_id}/video")
    def video(memory_id: str, request: Request) -> Response:
        folder_of(memory_id)
        medium = memories.video(memory_id)
        if medium is None:
            raise _nothing("the video of this memory is not kept here")
        wanted = request.headers.get("range")
        return whole_of(medium) if wanted is None else part_of(medium, wanted)

    @app.get("/v1/memories/{memory_id}/export")
    def export(memory_id: str) -> StreamingResponse:
        folder = folder_of(memory_id) / "memory"
        if not memories.is_ready(memory_id):
            raise ApiError(409, "the memory is not whole yet", code="not_ready")
        file = tempfile.TemporaryFile(dir=memories.folder)  # noqa: SIM115 - gone once nobody reads it
        with zipfile.ZipFile(file, "w") as archive:  # states are noise to a compressor
            for part in sorted(folder.iterdir()):
                archive.write(part, part.name)
        name = re.sub(r"[^A-Za-z0-9]+", "-", memories.describe(memory_id)["name"]).strip("-") or "video"
        named = {"Content-Disposition": f'attachment; filename="{name}-memory.zip"', "Content-Length": str(file.tell())}
        return StreamingResponse(_blocks(file), media_type="application/zip", headers={**SAFE, **named})


def stills_of(video: Path, start_s: float, end_s: float | None, into: Path) -> "tempfile.TemporaryDirectory[str]":
    """A folder of stills that is gone when it is closed, unless `settle` gave it a place.

    Raises:
        ValueError: as of `write_stills`.
    """
    made = tempfile.TemporaryDirectory(prefix="incoming-", dir=into, ignore_cleanup_errors=True)
    try:
        write_stills(video, start_s, end_s, Path(made.name))
    except BaseException:
        made.cleanup()
        raise
    return made


def settle(made: "tempfile.TemporaryDirectory[str]", folder: Path) -> None:
    """Give the stills to the memory of a folder, unless it has some."""
    with made, suppress(OSError):  # it has, or it was deleted meanwhile
        Path(made.name).rename(folder / "stills")


def whole_of(medium: Medium) -> Response:
    """A video as a file to be kept."""
    with open(medium.path, "rb") as file:
        kind = _kind_of(file.read(12))
    close = None if medium.file is None else BackgroundTask(medium.file.close)  # `path` may lead through it
    return FileResponse(medium.path, media_type=kind, headers=VIDEO, background=close)


def part_of(medium: Medium, wanted: str) -> Response:
    """As much as one response takes of the bytes that a player wants: RFC 9110, section 14."""
    with medium.file or nullcontext(), open(medium.path, "rb") as file:
        kind, size = _kind_of(file.read(12)), medium.path.stat().st_size
        match = re.fullmatch(r"bytes=(\d{1,18})-(\d{0,18})|bytes=-(\d{1,18})", wanted.strip(), re.ASCII)
        first, last = size, size - 1
        if match and match[3]:
            first = max(0, size - int(match[3]))
        elif match:
            first, last = int(match[1]), min(int(match[2] or last), last)
        if first > last:
            return Response(status_code=416, headers={**VIDEO, "Content-Range": f"bytes */{size}"})
        last = min(last, first + RANGE_BYTES - 1)  # a player comes again for the rest
        file.seek(first)
        place = {"Content-Range": f"bytes {first}-{last}/{size}"}
        return Response(file.read(last - first + 1), 206, {**VIDEO, **place}, kind)


def _blocks(file: Any) -> Iterator[bytes]:
    with file:
        file.seek(0)
        while block := file.read(RANGE_BYTES):
            yield block


def _kind_of(head: bytes) -> str:
    """The type of a video by its first bytes, for players; never one that a browser would run."""
    if head[4:8] == b"ftyp":
        return "video/mp4"
    if head[:4] == b"\x1a\x45\xdf\xa3":
        return "video/webm"
    return "video/ogg" if head[:4] == b"OggS" else "application/octet-stream"


def _nothing(message: str, code: str = "not_found") -> ApiError:
    return ApiError(404, message, code=code)
