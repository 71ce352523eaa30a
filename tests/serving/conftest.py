"""A memory server in this process, at an address of its own, and clients of it."""

import threading
import time
from contextlib import contextmanager

import httpx
import openai
import pytest
import uvicorn

from video_ma2mba.serving.app import Settings, build_app, listening_socket
from video_ma2mba.serving.media import MediaRules

QUESTIONS = ["What colour was the circle?", "Which shape came last of all?", "Why?", "Was there a red square? " * 3]


class Served:
    """A running server: `url`, its parts, and a plain client."""

    def __init__(self, guard, url):
        self.guard, self.url = guard, url
        self.engine, self.memories = guard.engine, guard.memories
        self.http = httpx.Client(base_url=url, timeout=60, trust_env=False)

    def openai(self, key="none", **options):
        return openai.OpenAI(
            base_url=f"{self.url}/v1", api_key=key, max_retries=0, http_client=httpx.Client(trust_env=False), **options
        )

    def watch(self, path, **fields):
        """Upload a video and wait until it is watched; its id."""
        with open(path, "rb") as file:
            answer = self.http.post("/v1/memories", files={"file": ("story.mp4", file)}, data=fields)
        assert answer.status_code in (200, 202), answer.text
        return self.wait(answer.json()["id"])

    def wait(self, memory_id, status="ready"):
        until = time.monotonic() + 60
        while (now := self.http.get(f"/v1/memories/{memory_id}").json())["status"] != status:
            assert time.monotonic() < until, now
            time.sleep(0.02)
        return memory_id

    def idle(self):
        """Nothing is being answered, and no slot is taken."""
        until = time.monotonic() + 30
        while self.engine.num_busy or self.engine.num_waiting or self.guard.num_requests:
            assert time.monotonic() < until, (self.engine.num_busy, self.engine.num_waiting, self.guard.num_requests)
            time.sleep(0.02)
        return True


@contextmanager
def serving(model, processor, folder, **settings):
    guard = build_app(model, processor, Settings(**{"name": "tiny", "memories": folder, **settings}))
    with listening_socket("127.0.0.1", 0) as listening:
        server = uvicorn.Server(uvicorn.Config(guard, log_level="error", timeout_graceful_shutdown=1, ws="none"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
        thread.start()
        try:
            yield Served(guard, f"http://127.0.0.1:{listening.getsockname()[1]}")
        finally:
            server.should_exit = True
            thread.join()


@pytest.fixture(scope="module")
def server(model, processor, tmp_path_factory):
    folder = tmp_path_factory.mktemp("served")
    (folder / "media").mkdir()
    rules = MediaRules((folder / "media",), max_bytes=2**20, max_duration_s=120)
    with serving(model, processor, folder / "memories", rules=rules) as served:
        served.media = folder / "media"
        yield served


@pytest.fixture(autouse=True)
def _no_slot_leaks(request):
    yield
    if "server" in request.fixturenames:
        assert request.getfixturevalue("server").idle()


def asked(memory_id, question, **rest):
    """The body of a question about a memory."""
    content = [{"type": "memory", "id": memory_id}, {"type": "text", "text": question}]
    return {"model": "tiny", "messages": [{"role": "user", "content": content}], **rest}


def head_of(body):
    """The head of a question that is sent by hand."""
    fields = {
        "Host": "localhost",
        "Connection": "close",
        "Content-Type": "application/json",
        "Content-Length": len(body),
    }
    lines = ["POST /v1/chat/completions HTTP/1.1", *(f"{name}: {value}" for name, value in fields.items())]
    return ("\r\n".join(lines) + "\r\n\r\n").encode()
