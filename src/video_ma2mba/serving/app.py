"""The memory server: its endpoints over HTTP."""

import asyncio
import ctypes
import errno
import socket
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from http import HTTPStatus
from pathlib import Path
from typing import Any

import torch
import uvicorn
from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from pydantic import ValidationError
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import JSONResponse, StreamingResponse

from .answers import Answer, Deliveries, Overdue, event
from .chat import Chat
from .engine import Engine, TooManyWaiting
from .guard import ApiError, Guard, busy
from .media import Forbidden, MediaRules, Medium, TooLarge, check
from .memories import Memories
from .metrics import metrics_text
from .prompts import Shown
from .schema import ChatRequest, FramesRequest, MemoryRequest
from .shown import add_routes, model_facts, settle, stills_of
from .watching import Stopped, TooManyVideos

FETCHES = 16  # URLs and files at once
THREADS = 64  # for what is short: loading memories, writing records
POLL_S = 0.2  # between looks at a video that is being watched
_BLOCK = 2**20
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h


@dataclass(frozen=True)
class Settings:
    """How a server is run; see `video-ma2mba serve --help`."""

    name: str
    memories: Path
    rules: MediaRules = field(default_factory=MediaRules)
    keys: tuple[str, ...] = ()
    num_slots: int = 32
    max_waiting: int = 256
    timeout_s: float = 300.0
    max_new_tokens: int = 512
    keeps_videos: bool = False


class Events(StreamingResponse):
    """Server-sent events of answers; their slots are free once it ends, however it ends."""

    def __init__(self, content: AsyncIterator[str], answers: list[Answer]):
        super().__init__(content, media_type="text/event-stream")
        self.answers = answers

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        try:
            await _unless_gone(receive, self.stream_response(send))
        except ClientGone:
            pass
        finally:  # a client that goes away at once ends it before `content` was begun
            for answer in self.answers:
                answer.row.cancelled = True


class ClientGone(Exception):
    """Nobody waits for the answer."""


def build_app(model: Any, processor: Any, settings: Settings) -> Guard:
    """The ASGI application.

    Args:
        model, processor: of all answers; the model in eval mode.
        settings: how it is run.
    """
    deliveries = Deliveries()
    rules = settings.rules
    engine = Engine(model, settings.num_slots, settings.max_waiting, deliveries.notify)
    memories = Memories(settings.memories, model, processor, rules, engine.wait_for_turn, settings.keeps_videos)

    def translate(error: BaseException) -> ApiError:
        return as_api_error(error, memories.folder)

    fetchers = ThreadPoolExecutor(FETCHES, "fetching")  # of their own: slow sites hold up nobody but each other

    async def bring(url: str) -> Medium:
        fetching = asyncio.get_running_loop().run_in_executor(fetchers, rules.bring, url, memories.folder)
        try:
            return await asyncio.shield(fetching)
        except asyncio.CancelledError:  # the client went away; the thread does not
            fetching.add_done_callback(_discard)
            raise

    chat = Chat(
        settings.name, model, processor, engine, memories, bring, deliveries, settings.timeout_s,
        settings.max_new_tokens, translate,
    )  # fmt: skip

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        deliveries.loop = asyncio.get_running_loop()
        deliveries.loop.set_default_executor(ThreadPoolExecutor(THREADS, "requests"))
        yield
        fetchers.shutdown(wait=False, cancel_futures=True)
        await asyncio.to_thread(memories.close)
        await asyncio.to_thread(engine.close)

    app = FastAPI(title="Video-Ma2mba", lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None)
    guard = Guard(app, settings.keys, rules.max_bytes)
    guard.chat, guard.engine, guard.memories = chat, engine, memories  # type: ignore[attr-defined]

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        return _invalid(error.errors()).response()

    @app.exception_handler(HTTPException)
    async def refused(request: Request, error: HTTPException) -> JSONResponse:
        phrase = error.detail or HTTPStatus(error.status_code).phrase
        return ApiError(error.status_code, str(phrase), headers=error.headers).response()

    @app.exception_handler(Exception)
    async def failed(request: Request, error: Exception) -> JSONResponse:
        return translate(error).response()

    gone = (ClientGone, ClientDisconnect)
    for known in (ApiError, ValueError, OSError, TooManyWaiting, TooManyVideos, Stopped, Overdue, *gone):
        app.add_exception_handler(known, failed)

    # --- answers -----------------------------------------------------------------------------------------------------

    @app.post("/v1/chat/completions")
    async def complete(body: ChatRequest, request: Request) -> Response:
        if body.model is not None and body.model != settings.name:
            raise ApiError(404, f"this server has the model {settings.name!r} alone", code="model_not_found")
        deadline = asyncio.get_running_loop().time() + settings.timeout_s  # which is the clock of time.monotonic
        try:
            async with asyncio.timeout_at(deadline):
                prompt = await _unless_gone(request.receive, chat.prompt(body))
        except TimeoutError:
            raise Overdue from None
        answers = chat.begin(body, prompt, deadline)
        if body.stream:
            return Events(chat.events(body, prompt, answers), answers)
        try:
            return JSONResponse(await _unless_gone(request.receive, chat.completion(body, prompt, answers)))
        finally:
            for answer in answers:
                answer.row.cancelled = True

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [_model()]}

    @app.get("/v1/models/{name:path}")
    async def model_of_name(name: str) -> dict[str, Any]:
        if name != settings.name:
            raise ApiError(404, f"this server has the model {settings.name!r} alone", code="model_not_found")
        return _model()

    def _model() -> dict[str, Any]:
        return {"id": settings.name, "object": "model", "created": 0, "owned_by": "video-ma2mba"}

    # --- memories ----------------------------------------------------------------------------------------------------

    @app.post("/v1/memories")
    async def remember(request: Request) -> JSONResponse:
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind == "multipart/form-data":
            wanted, medium = await _uploaded(request)
        elif kind == "application/json":
            try:
                wanted = MemoryRequest.model_validate_json(await request.body())
            except ValidationError as error:
                raise _invalid(error.errors()) from None
            if wanted.live:
                memory_id = await asyncio.to_thread(memories.begin_live, wanted.name or "live")
                return JSONResponse(memories.describe(memory_id), 201)
            medium = await bring(wanted.url or wanted.path or "")
        else:
            raise ApiError(415, "send application/json, or the file as multipart/form-data under `file`")
        if len(wanted.snapshots_s) > memories.max_snapshots:
            medium.discard()
            raise ApiError(400, f"snapshots_s: at most {memories.max_snapshots} of this model", param="snapshots_s")
        name = wanted.name or (wanted.path or wanted.url or "").rpartition("/")[2][:200] or "video"
        fps = processor.video_processor.fps if wanted.fps is None else wanted.fps
        piece: Shown = {
            "type": "video", "sha256": medium.sha256, "path": medium.source, "fps": fps,
            "snapshots_s": sorted(set(wanted.snapshots_s)),
        }  # fmt: skip
        if wanted.start_s:
            piece["start_s"] = wanted.start_s
        if wanted.end_s is not None:
            piece["end_s"] = wanted.end_s

        def look() -> Any:
            check(medium.path, "video", rules.max_duration_s)  # says at once what is wrong with it
            return stills_of(medium.path, wanted.start_s, wanted.end_s, memories.folder) if wanted.stills else None

        stills = None
        try:
            stills = await asyncio.to_thread(look)
            if await request.is_disconnected():
                raise ClientGone
        except BaseException:
            medium.discard()
            if stills is not None:
                stills.cleanup()
            raise
        memory_id = await asyncio.to_thread(memories.ensure, None, [memories.head, piece], {1: medium}, name)
        if stills is not None:
            settle(stills, memories.folder / memory_id)
        described = memories.describe(memory_id)
        return JSONResponse(described, 200 if described["status"] == "ready" else 202)

    async def _uploaded(request: Request) -> tuple[MemoryRequest, Medium]:
        async with request.form(max_files=1, max_fields=1100, max_part_size=1000) as form:
            file = form.get("file")
            if not isinstance(file, UploadFile):
                raise ApiError(400, "the form has no file under the name `file`", param="file")
            fields: dict[str, Any] = {"path": "upload", "name": (file.filename or "video").rpartition("/")[2][:200]}
            for name in form:
                if name == "snapshots_s":
                    fields[name] = form.getlist(name)
                elif name != "file":
                    fields[name] = form[name]
            try:
                wanted = MemoryRequest.model_validate(fields)
            except ValidationError as error:
                raise _invalid(error.errors()) from None
            blocks: Iterator[bytes] = iter(lambda: file.file.read(_BLOCK), b"")
            return wanted, await asyncio.to_thread(rules.keep, blocks, memories.folder)

    @app.get("/v1/memories")
    async def listed(limit: int = 100, after: str | None = None) -> dict[str, Any]:
        def look() -> dict[str, Any]:
            ids = memories.ids()
            start = ids.index(after) + 1 if after in ids else 0
            data = []
            for memory_id in ids[start : start + max(1, min(limit, 1000))]:
                try:
                    data.append(memories.describe(memory_id))
                except KeyError:  # deleted meanwhile
                    continue
            return {"object": "list", "data": data, "has_more": start + len(data) < len(ids)}

        return await asyncio.to_thread(look)

    def described(memory_id: str) -> dict[str, Any]:
        try:
            return memories.describe(memory_id)
        except KeyError:
            raise ApiError(404, f"there is no memory {memory_id!r}", code="memory_not_found") from None

    @app.get("/v1/memories/{memory_id}")
    async def one(memory_id: str) -> dict[str, Any]:
        return described(memory_id)

    @app.get("/v1/memories/{memory_id}/events")
    async def events(memory_id: str) -> StreamingResponse:
        described(memory_id)

        async def changes() -> AsyncIterator[str]:
            last = None
            while True:
                try:
                    now = memories.describe(memory_id)
                except KeyError:
                    yield event({"id": memory_id, "status": "deleted"})
                    return
                if now != last:
                    yield event(now)
                if now["status"] in ("ready", "failed"):
                    yield event("[DONE]")
                    return
                last = now
                await asyncio.sleep(POLL_S)

        return StreamingResponse(changes(), media_type="text/event-stream")

    @app.post("/v1/memories/{memory_id}/frames")
    async def frames(memory_id: str, body: FramesRequest) -> dict[str, Any]:
        described(memory_id)

        def pictures() -> torch.Tensor:
            loaded = []
            for url in body.frames:
                if not url.startswith("data:"):
                    raise ValueError("frames are data URLs of pictures: data:image/jpeg;base64,...")
                medium = rules.bring(url, memories.folder)
                try:
                    check(medium.path, "image", rules.max_duration_s)
                    loaded.append(processor.video_processor.load_image(medium.path))
                finally:
                    medium.discard()
            return torch.cat(loaded)

        pixels = await asyncio.to_thread(pictures)
        future = await asyncio.to_thread(memories.push, memory_id, pixels, body.timestamps_s)
        await asyncio.wrap_future(future)
        return described(memory_id)

    @app.delete("/v1/memories/{memory_id}")
    async def delete(memory_id: str) -> dict[str, Any]:
        described(memory_id)
        await asyncio.to_thread(memories.delete, memory_id)
        return {"id": memory_id, "object": "memory.deleted", "deleted": True}

    # --- the server itself -------------------------------------------------------------------------------------------

    @app.get("/health")
    async def health() -> dict[str, str]:
        return {"status": "ok"}

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(metrics_text(guard, chat, engine, memories), media_type="text/plain; version=0.0.4")

    add_routes(app, memories, model_facts(settings.name, model, processor, rules.max_bytes))
    return guard


def _discard(fetching: "asyncio.Future[Medium]") -> None:
    if not fetching.cancelled() and fetching.exception() is None:
        fetching.result().discard()


async def _unless_gone(receive: Any, work: Any) -> Any:
    """The result of some work, given up once the client goes away."""

    async def gone() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    task, watcher = asyncio.ensure_future(work), asyncio.ensure_future(gone())
    try:
        await asyncio.wait([task, watcher], return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientGone
        return task.result()
    finally:
        watcher.cancel()
        task.cancel()


def as_api_error(error: BaseException, folder: Path) -> ApiError:
    """What a client is told of an exception: nothing of the inside of this server."""
    message = str(error).replace(f"{folder}/", "")
    if isinstance(error, ApiError):
        return error
    if isinstance(error, TooManyWaiting):
        return busy("too many questions are waiting")
    if isinstance(error, TooManyVideos):
        return busy("too many videos are waiting to be watched", 30)
    if isinstance(error, Forbidden):
        return ApiError(403, message, "permission_error", code="forbidden")
    if isinstance(error, TooLarge):
        return ApiError(413, message, code="too_large")
    if isinstance(error, Overdue):
        return ApiError(504, "the answer took longer than this server gives it", "timeout_error", code="timeout")
    if isinstance(error, ClientGone | ClientDisconnect):
        return ApiError(499, "the client went away")
    if isinstance(error, Stopped):
        return ApiError(409, "the memory was deleted, or the server ends", code="stopped")
    if isinstance(error, ValueError):
        return ApiError(400, message)
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return ApiError(507, "the disk of the server is full", "server_error", code="no_space")
    return ApiError(500, "the server failed to answer", "server_error", code="internal_error")


def _invalid(errors: Any) -> ApiError:
    """What is wrong with a request, from what pydantic found deepest in it: where a value may be of several kinds, that
    is the kind that was meant."""
    first = max(errors, key=lambda error: len(error["loc"]))
    kinds = ("body", "str")
    parts = [str(part) for part in first["loc"] if part not in kinds and not str(part).startswith("list[")]
    place = ".".join(parts) or None
    message = "is not one of the fields that this server knows" if first["type"] == "extra_forbidden" else first["msg"]
    message = message.removeprefix("Value error, ")
    return ApiError(400, message if place is None else f"{place}: {message}", param=place)


def listening_socket(host: str, port: int) -> socket.socket:
    """A socket that takes connections from now on; port 0 is a free one.

    Raises:
        OSError: it cannot be had.
    """
    # TCP by name: else asyncio leaves Nagle's algorithm on, and the second event of a stream waits 40 ms for an ACK
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listening = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind((host, port))
    except (OSError, OverflowError) as error:
        listening.close()
        if isinstance(error, OSError) and error.errno == errno.EADDRINUSE:
            raise OSError(f"--port {port}: another program has it; name another one, or 0 for any") from error
        raise OSError(f"--host {host} --port {port}: this machine has no such address: {error}") from error
    listening.listen(2048)
    return listening


def keep_freed_memory() -> None:
    """Let the process keep what tensors free, up to 256 MiB, for the tensors that come next.

    glibc hands buffers of some size back to the system at once, and every step of 32 rows would take megabytes anew, a
    page fault for each 4 KiB: half of the time of reading 32 questions. Other C libraries are left as they are.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # not glibc; Windows knows no library without a name
        return
    mallopt(_M_MMAP_THRESHOLD, 2**25)
    mallopt(_M_TRIM_THRESHOLD, 2**28)


def serve(app: Guard, host: str, port: int, announce: Callable[[str], None]) -> None:
    """Run the application until the process is told to end.

    Args:
        announce: called with the URL, once connections are taken.
    """
    keep_freed_memory()
    with listening_socket(host, port) as listening:
        shown = f"[{host}]" if ":" in host else host
        announce(f"http://{shown}:{listening.getsockname()[1]}")
        config = uvicorn.Config(
            app, log_level="warning", access_log=False, timeout_graceful_shutdown=5, server_header=False, ws="none"
        )
        uvicorn.Server(config).run(sockets=[listening])
