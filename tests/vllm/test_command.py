"""`video-ma2mba serve --engine vllm`: vLLM's own server, asked over HTTP with a video in the request."""

import base64
import os
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import openai
import pytest

from tests.vllm.conftest import NEW_TOKENS, expected


@pytest.fixture(scope="module")
def url(folder):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "video_ma2mba.cli", "serve", str(folder), "--engine", "vllm", "--port", str(port)]
    options = "--enforce-eager --max-model-len 4096 --max-num-batched-tokens 512"
    command += ["--dtype", "float32", f"--engine-options={options}"]
    served = subprocess.Popen(command, env={**os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "1"})
    until = time.monotonic() + 900
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        while True:
            assert served.poll() is None, "the server ended"
            assert time.monotonic() < until
            try:
                opener.open(f"http://127.0.0.1:{port}/health", timeout=5)
                break
            except OSError:
                time.sleep(1)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        served.terminate()
        served.wait(60)


def test_a_video_is_asked_about_over_http(url, folder, model, processor, stories):
    client = openai.OpenAI(base_url=url, api_key="none")
    video = "data:video/mp4;base64," + base64.b64encode(Path(stories[1]).read_bytes()).decode()
    assert [one.id for one in client.models.list()] == [folder.name]
    for question in ("Why?", "(A) or (B)?"):
        parts = [{"type": "video_url", "video_url": {"url": video}}, {"type": "text", "text": question}]
        body = {"model": folder.name, "messages": [{"role": "user", "content": parts}], "max_tokens": NEW_TOKENS}
        answer = client.chat.completions.create(
            **body, temperature=0, extra_body={"min_tokens": NEW_TOKENS, "return_token_ids": True}
        )
        prompt, ids = expected(
            model, processor, [{"type": "video", "path": stories[1]}, {"type": "text", "text": question}]
        )
        assert answer.prompt_token_ids == prompt
        assert answer.choices[0].token_ids == ids
        pieces = client.chat.completions.create(
            **body, temperature=0, stream=True, extra_body={"min_tokens": NEW_TOKENS}
        )
        said = "".join(piece.choices[0].delta.content or "" for piece in pieces)
        assert said == answer.choices[0].message.content
