"""What stands between a client and the endpoints: keys, bounds on what is sent, counts, and errors in OpenAI's form."""

import asyncio
import hashlib
import hmac
from collections import Counter
from typing import Any
from urllib.parse import urlsplit

from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse

MAX_JSON_BYTES = 32 * 2**20
MULTIPART_OVERHEAD = 2**16
MAX_REQUESTS = 1024  # at once
BODY_TIMEOUT_S = 30.0  # for the next bytes of a body
SEND_TIMEOUT_S = 60.0  # for a client to take what is sent
OPEN_PATHS = ("/health",)
LOCAL_NAMES = ("127.0.0.1", "localhost", "::1")


class ApiError(Exception):
    """An answer in OpenAI's form of an error."""

    def __init__(self, status: int, message: str, kind: str = "invalid_request_error", **rest: Any):
        self.status, self.message, self.kind = status, message, kind
        self.param, self.code = rest.get("param"), rest.get("code")
        self.headers = rest.get("headers")

    def body(self) -> dict[str, Any]:
        error = {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}
        # what a client sent is repeated there, and may hold halves of characters
        sayable = {k: v and str(v).encode(errors="backslashreplace").decode() for k, v in error.items()}
        return {"error": sayable}

    def response(self) -> JSONResponse:
        return JSONResponse(self.body(), self.status, headers=self.headers)


def busy(message: str, retry_after_s: int = 1) -> ApiError:
    return ApiError(429, message, "rate_limit_error", code="busy", headers={"Retry-After": str(retry_after_s)})


class Guard:
    """An ASGI application around another.

    Args:
        keys: one of them must come as `Authorization: Bearer KEY`; none: everybody on this machine is let in.
        max_upload: bytes of an uploaded file.
    """

    def __init__(self, app: Any, keys: tuple[str, ...] = (), max_upload: int = 2 * 2**30):
        self.app, self.max_upload = app, max_upload
        self.digests = [hashlib.sha256(key.encode()).digest() for key in keys]
        self.num_requests = 0
        self.responses: Counter = Counter()  # (path of the endpoint, status) -> how many

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        status = 0

        async def counted(message: Any) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            async with asyncio.timeout(SEND_TIMEOUT_S):
                await send(message)

        self.num_requests += 1
        try:
            headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}
            limit = self._limit(headers)
            error = self._refusal(scope["path"], headers, limit)
            if error is not None:
                await error.response()(scope, receive, counted)
            else:
                await self.app(scope, _bounded(receive, limit), counted)
        except asyncio.CancelledError:  # the server ends, and has waited for this long enough: no trace of that
            return
        finally:
            self.num_requests -= 1
            route = scope.get("route")
            self.responses[getattr(route, "path", "other"), status] += 1

    def _limit(self, headers: dict[str, str]) -> int:
        is_upload = headers.get("content-type", "").startswith("multipart/form-data")
        return self.max_upload + MULTIPART_OVERHEAD if is_upload else MAX_JSON_BYTES

    def _refusal(self, path: str, headers: dict[str, str], limit: int) -> ApiError | None:
        if path not in OPEN_PATHS and (refused := self._stranger(headers)) is not None:
            return refused
        if self.num_requests > MAX_REQUESTS:
            return busy(f"more than {MAX_REQUESTS} requests at once")
        declared = headers.get("content-length", "0")
        if not declared.isdigit() or len(declared) > 18 or int(declared) > limit:
            return _too_large(limit)
        return None

    def _stranger(self, headers: dict[str, str]) -> ApiError | None:
        if not self.digests:
            # a page of another site, open in a browser on this machine, may send requests, under a name of its own too
            for name, place in (("origin", headers.get("origin")), ("host", f"//{headers.get('host', '')}")):
                if place is not None and _host(place) not in LOCAL_NAMES:
                    message = f"this server has no keys, and answers nobody who does not call it localhost ({name})"
                    return ApiError(403, message, "permission_error", code=name)
            return None
        scheme, _, key = headers.get("authorization", "").partition(" ")
        digest = hashlib.sha256(key.strip().encode()).digest()
        matches = [hmac.compare_digest(digest, one) for one in self.digests]  # all of them: takes the same time
        if scheme.lower() == "bearer" and any(matches):
            return None
        return ApiError(
            401, "the API key is missing or wrong: send Authorization: Bearer KEY", "authentication_error",
            code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"},
        )  # fmt: skip


def _host(origin: str) -> str | None:
    try:
        return urlsplit(origin).hostname
    except ValueError:
        return None


def _too_large(limit: int) -> ApiError:
    return ApiError(413, f"the request is larger than the {limit} bytes that this server takes", code="too_large")


def _bounded(receive: Any, limit: int) -> Any:
    """`receive` that breaks off a body that is too large, or that does not come."""
    received, is_whole = 0, False

    async def bounded() -> Any:
        nonlocal received, is_whole
        if is_whole:
            return await receive()  # that the client has gone
        try:
            async with asyncio.timeout(BODY_TIMEOUT_S):
                message = await receive()
        except TimeoutError:
            raise HTTPException(408, f"the body of the request did not come within {BODY_TIMEOUT_S:g} s") from None
        received += len(message.get("body", b""))
        is_whole = not message.get("more_body", False)
        if received > limit:
            raise HTTPException(413, _too_large(limit).message)
        return message

    return bounded
