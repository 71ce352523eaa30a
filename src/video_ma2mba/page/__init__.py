"""The page of `video-ma2mba ui`: plain files, which speak to the memory server as every client does.

It is put before the server in this process (`add_page`), or before one elsewhere, to which everything else that it is
asked for is handed on (`build_forwarding_app`). There is nothing that the page could do and other clients could not.
"""

import asyncio
import socket
import tempfile
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, suppress
from functools import cache
from http.client import HTTPConnection, HTTPException, HTTPResponse
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from starlette.requests import ClientDisconnect
from starlette.responses import FileResponse, Response, StreamingResponse

from ..data.synthetic import make_story
from ..serving.client import Server
from ..serving.guard import ApiError, Guard

STATIC = Path(__file__).resolve().parent / "static"
INDEX = "index.html"
TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
# Nothing but what comes from here; `blob:` is a video that was chosen and not sent yet.
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; "
    "media-src 'self' blob:; connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer", "Cache-Control": "no-cache",
}  # fmt: skip
PATHS = {"/": INDEX} | {f"/page/{path.name}": path.name for path in sorted(STATIC.iterdir()) if path.suffix in TYPES}
PASSED_ON = ("content-type", "content-length", "accept", "range")
PASSED_BACK = (
    "content-type", "content-length", "content-range", "content-disposition", "content-security-policy",
    "x-content-type-options", "accept-ranges", "cache-control", "etag", "last-modified", "retry-after",
)  # fmt: skip
THREADS = 64
_BLOCK = 2**16


def add_page(guard: Guard) -> Guard:
    """Put the page before an application; its files are open to all, whatever keys are asked for."""

    def give(name: str) -> Any:
        def file() -> FileResponse:
            return FileResponse(STATIC / name, media_type=TYPES[Path(name).suffix], headers=HEADERS)

        return file

    for path, name in PATHS.items():
        guard.app.add_api_route(path, give(name), methods=["GET"])

    @guard.app.get("/page/example.mp4")
    def example() -> Response:
        return Response(_story(), media_type="video/mp4", headers=HEADERS)

    guard.open_paths = (*guard.open_paths, *PATHS)
    return guard


@cache
def _story() -> bytes:
    """A minute of coloured shapes, as large as is good to look at."""
    with tempfile.TemporaryDirectory() as folder:
        return make_story(seed=89, duration_s=60, size=288).render(Path(folder) / "story.mp4").read_bytes()


def build_forwarding_app(server: Server, keys: tuple[str, ...], max_upload: int) -> Guard:
    """An application that hands on to a server elsewhere.

    Args:
        keys: that visitors must send; the server is sent its own.
        max_upload: bytes of a file.
    """

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        # each answer that is handed on holds a thread
        asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(THREADS, "forwarding"))
        yield

    app = FastAPI(title="Video-Ma2mba", lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None)

    @app.exception_handler(ApiError)
    async def failed(request: Request, error: ApiError) -> Response:
        return error.response()

    @app.exception_handler(ClientDisconnect)
    async def gone(request: Request, error: ClientDisconnect) -> Response:
        return ApiError(499, "the client went away").response()

    @app.api_route("/v1/{path:path}", methods=["GET", "POST", "PATCH", "DELETE"])
    async def forward(request: Request) -> Response:
        if "transfer-encoding" in request.headers:
            raise ApiError(411, "say the length of what you send, as Content-Length")
        headers = {name: value for name in PASSED_ON if (value := request.headers.get(name)) is not None}
        target = request.url.path + (f"?{request.url.query}" if request.url.query else "")
        connection = None
        try:
            connection = await asyncio.to_thread(server.begin, request.method, target, headers)
            line = connection.sock
            async for block in request.stream():
                await asyncio.to_thread(connection.send, block)
            response = await asyncio.to_thread(connection.getresponse)
        except BaseException as error:
            if connection is not None:
                connection.close()
            if isinstance(error, OSError | HTTPException):
                message = f"the server at {server.parts.geturl()} does not answer"
                raise ApiError(502, message, "server_error") from None
            raise
        back = {name: value for name in PASSED_BACK if (value := response.headers.get(name)) is not None}
        return StreamingResponse(_blocks(line, connection, response), response.status, back)

    return Guard(app, keys, max_upload)


async def _blocks(line: Any, connection: HTTPConnection, response: HTTPResponse) -> AsyncIterator[bytes]:
    """What a server answers, as it comes; once the visitor has gone, it is told so."""
    try:
        while block := await asyncio.to_thread(response.read1, _BLOCK):
            yield block
    finally:
        with suppress(OSError):
            line.shutdown(socket.SHUT_RDWR)  # wakes the thread that may still wait for more
        connection.close()
