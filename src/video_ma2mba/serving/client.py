"""A memory server from the other side: what `chat --server`, the page and the benchmark speak with.

It needs neither torch nor a package that the library does not need.
"""

import http.client
import json
import math
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit

POLL_S = 0.1
TIMEOUT_S = 600.0
_BLOCK = 2**20


class Server:
    """A running `video-ma2mba serve`.

    Args:
        url: its address, such as http://127.0.0.1:8000.
        key: its API key, where it asks for one.
    """

    def __init__(self, url: str, key: str | None = None):
        self.key = key
        try:
            self.parts = urlsplit(url)
            is_one = self.parts.scheme in ("http", "https") and self.parts.hostname and self.parts.port != 0
        except ValueError:  # what stands for the host or the port is none
            is_one = False
        if not is_one:
            raise ValueError(f"{url}: the address of a server looks like http://127.0.0.1:8000")

    def remember(self, **fields: Any) -> dict[str, Any]:
        """Let the server watch a file of its own, a URL, or nothing yet (live=True); see `POST /v1/memories`."""
        return self._json("POST", "/v1/memories", fields)

    def upload(self, video: str | Path, fps: float | None = None) -> dict[str, Any]:
        """Send a video to be watched; what the server says of its memory."""
        path, boundary = Path(video), uuid.uuid4().hex
        name = path.name.replace('"', "_").replace("\r", "_").replace("\n", "_")
        head = "" if fps is None else f'--{boundary}\r\nContent-Disposition: form-data; name="fps"\r\n\r\n{fps}\r\n'
        head += f'--{boundary}\r\nContent-Disposition: form-data; name="file"; filename="{name}"\r\n\r\n'
        tail = f"\r\n--{boundary}--\r\n"
        size = len(head.encode()) + path.stat().st_size + len(tail)

        def blocks() -> Iterator[bytes]:
            yield head.encode()
            with open(path, "rb") as file:
                while block := file.read(_BLOCK):
                    yield block
            yield tail.encode()

        headers = {"Content-Type": f"multipart/form-data; boundary={boundary}", "Content-Length": str(size)}
        return self._json("POST", "/v1/memories", blocks(), headers)

    def memory(self, memory_id: str) -> dict[str, Any]:
        """What the server says of a memory."""
        return self._json("GET", f"/v1/memories/{quote(memory_id, safe='')}")

    def wait(
        self, memory_id: str, timeout_s: float = math.inf, progress: Callable[[int, int | None], None] | None = None
    ) -> dict[str, Any]:
        """Wait until a memory is ready; what the server says of it.

        Raises:
            ValueError: the video cannot be watched, or it took longer than `timeout_s`.
        """
        end = time.monotonic() + timeout_s
        while (now := self.memory(memory_id))["status"] != "ready":
            if now["status"] == "failed":
                raise ValueError(f"{now['name']}: {now['error']}")
            if time.monotonic() > end:
                raise ValueError(f"{now['name']}: it was not watched within {timeout_s:g} s")
            if progress is not None and "progress" in now:
                progress(now["progress"]["num_frames"], now["progress"]["expected"])
            time.sleep(POLL_S)
        return now

    def answer(self, messages: list[dict[str, Any]], max_new_tokens: int) -> Iterator[str]:
        """The text of an answer as it comes; closing the iterator stops it."""
        body = {"messages": messages, "max_completion_tokens": max_new_tokens, "stream": True}
        connection, response = self._request("POST", "/v1/chat/completions", body)
        try:
            for line in response:
                said = line.decode().strip()
                if not said.startswith("data: ") or said == "data: [DONE]":
                    continue
                chunk = json.loads(said.removeprefix("data: "))
                if "error" in chunk:
                    raise ValueError(chunk["error"]["message"])
                for choice in chunk["choices"]:
                    if text := choice["delta"].get("content"):
                        yield text
        finally:
            connection.close()

    def begin(self, method: str, path: str, headers: dict[str, str]) -> http.client.HTTPConnection:
        """A connection on which a request was begun, for its body to be sent and its response to be read.

        Raises:
            OSError: the server cannot be reached.
        """
        connection = self._connection()
        connection.putrequest(method, self.parts.path.rstrip("/") + path)
        for name, value in {**headers, **self._authorization}.items():
            connection.putheader(name, value)
        connection.endheaders()
        return connection

    @property
    def _authorization(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.key}"} if self.key else {}

    def _connection(self) -> http.client.HTTPConnection:
        kind = http.client.HTTPSConnection if self.parts.scheme == "https" else http.client.HTTPConnection
        return kind(self.parts.hostname or "", self.parts.port, timeout=TIMEOUT_S)

    def _json(self, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None) -> dict[str, Any]:
        connection, response = self._request(method, path, body, headers)
        with closing(connection):
            return json.loads(response.read())

    def _request(
        self, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None
    ) -> tuple[Any, http.client.HTTPResponse]:
        connection, headers = self._connection(), {**(headers or {}), **self._authorization}
        if isinstance(body, dict):
            body, headers["Content-Type"] = json.dumps(body), "application/json"
        try:
            connection.request(method, self.parts.path.rstrip("/") + path, body, headers)
            response = connection.getresponse()
        except (OSError, http.client.HTTPException) as error:
            connection.close()
            raise OSError(f"the server at {self.parts.geturl()} does not answer: {error}") from error
        if response.status >= 400:
            said = response.read(2**16)
            connection.close()
            try:
                message = json.loads(said)["error"]["message"]
            except (ValueError, LookupError, TypeError):
                message = f"the server at {self.parts.geturl()} answered {response.status}"
            raise ValueError(message)
        return connection, response


class RemoteMemory:
    """A memory that a server keeps, with those parts of a `VideoMemory` that talks need.

    Args:
        server: that keeps it.
        described: what it says of the memory.
        at_s: the time of the snapshot that is asked; None for the whole.
    """

    def __init__(self, server: Server, described: dict[str, Any], at_s: float | None = None):
        self.server, self.at_s = server, at_s
        self.dialogue: list[dict[str, str]] = []
        self._is_now(described)

    @classmethod
    def nothing(cls, server: Server) -> "RemoteMemory":
        """A memory of nothing yet, to be given a video by `watch`."""
        empty = {"id": "", "num_frames": 0, "num_tokens": 0, "num_bytes": 0, "duration_s": 0.0, "snapshots_s": []}
        return cls(server, empty)

    def _is_now(self, described: dict[str, Any]) -> None:
        self.id = described["id"]
        self.num_frames, self.num_tokens = described["num_frames"], described["num_tokens"]
        self.num_bytes, self.duration_s = described["num_bytes"], described["duration_s"]
        self.snapshot_times_s, self._described = described["snapshots_s"], described

    def __str__(self) -> str:
        until = "" if self.at_s is None else f", as it was at {self.at_s:g} s"
        size = f"{self.num_bytes / 2**20:.1f} MiB"
        return f"{self.num_frames} frames, {self.num_tokens} tokens, {size}{until}; id {self.id}"

    def at(self, seconds: float) -> "RemoteMemory":
        """As `VideoMemory.at`."""
        return RemoteMemory(self.server, self._described, seconds)

    def watch(
        self, video: str | Path, fps: float | None = None, *, progress: Callable[[int, int | None], None] | None = None
    ) -> None:
        """Send a video to the server, and wait until it is watched."""
        self._is_now(self.server.wait(self.server.upload(video, fps)["id"], progress=progress))

    def chat(self, message: str, *, stream: bool, max_new_tokens: int) -> Iterator[str]:
        """As `VideoMemory.chat`, streamed."""
        part = {"type": "memory", "id": self.id} | ({} if self.at_s is None else {"at_s": self.at_s})
        dialogue = [*self.dialogue, {"role": "user", "content": message}]
        first, *rest = dialogue
        content = [part, {"type": "text", "text": first["content"]}]
        said = []
        for piece in self.server.answer([{"role": "user", "content": content}, *rest], max_new_tokens):
            said.append(piece)
            yield piece
        self.dialogue = [*dialogue, {"role": "assistant", "content": "".join(said)}]

    def save_pretrained(self, folder: str) -> None:
        """The server keeps it already.

        Raises:
            ValueError: always.
        """
        raise ValueError(f"the server keeps this memory, under the id {self.id}; `video-ma2mba chat` takes that too")
