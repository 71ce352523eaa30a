"""The page's files and its command, and a page before a server elsewhere: what it is asked is handed on."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request

import httpx
import pytest

from tests.serving.conftest import asked, break_off_uploads, running, serving
from video_ma2mba.cli import main
from video_ma2mba.page import STATIC, add_page, build_forwarding_app
from video_ma2mba.serving.client import Server
from video_ma2mba.serving.guard import Guard


@pytest.fixture(scope="module")
def elsewhere(model, processor, tmp_path_factory):
    """A server that asks for a key, and a page before it that asks its visitors for none."""
    folder = tmp_path_factory.mktemp("elsewhere")
    with serving(model, processor, folder, keys=("secret",)) as served:
        served.http.headers["authorization"] = "Bearer secret"
        with running(add_page(build_forwarding_app(Server(served.url, "secret"), (), 2**22))) as url:
            served.page = httpx.Client(base_url=url, timeout=60, trust_env=False)
            yield served


def test_all_that_the_page_loads_is_here(elsewhere):
    index = elsewhere.page.get("/")
    assert "Video-Ma²mba" in index.text
    rules = dict(rule.strip().split(" ", 1) for rule in index.headers["content-security-policy"].split(";"))
    assert rules["default-src"] == "'none'"
    assert rules["script-src"] == rules["style-src"] == rules["connect-src"] == "'self'"
    names, found = {path.name for path in STATIC.iterdir()}, {"index.html"}
    for name in sorted(names):
        text = (STATIC / name).read_text(encoding="utf-8")
        assert not re.search(r"(?<!www\.w3\.org/2000/svg)https?://(?!www\.w3\.org)", text), name
        assert not re.search(r"<script(?! type=\"module\" src)|<style|\son\w+=|\sstyle=|innerHTML|\beval\(", text), name
        found |= set(re.findall(r"[\"'](?:/page|\.)/([\w.-]+)[\"']", text))
    assert found - {"example.mp4"} == names
    for name in names - {"index.html"}:
        answer = elsewhere.page.get(f"/page/{name}")
        assert answer.content == (STATIC / name).read_bytes()
        assert answer.headers["x-content-type-options"] == "nosniff"
    assert elsewhere.page.get("/page/..%2f__init__.py").status_code == 404


def test_a_video_is_handed_on_and_answered_as_by_the_server(elsewhere, video):
    with open(video, "rb") as file:
        sent = elsewhere.page.post(
            "/v1/memories", files={"file": ("a.mp4", file)}, data={"stills": "true", "fps": "1.5"}
        )
    assert sent.status_code == 202, sent.text
    memory_id = elsewhere.wait(sent.json()["id"])
    with elsewhere.page.stream("GET", f"/v1/memories/{memory_id}/events") as events:
        assert events.headers["content-type"].startswith("text/event-stream")
        assert list(events.iter_lines())[-2] == "data: [DONE]"
    body = asked(memory_id, "Why?", max_completion_tokens=16)
    one = elsewhere.page.post("/v1/chat/completions", json=body).json()["choices"]
    assert one == elsewhere.http.post("/v1/chat/completions", json=body).json()["choices"]
    with elsewhere.page.stream("POST", "/v1/chat/completions", json={**body, "stream": True}) as answer:
        assert "data: [DONE]" in list(answer.iter_lines())
    still = f"/v1/memories/{memory_id}/stills/0"
    one, other = elsewhere.page.get(still), elsewhere.http.get(still)
    assert one.content == other.content
    for name in ("content-type", "cache-control", "etag", "content-security-policy"):
        assert one.headers[name] == other.headers[name]
    assert elsewhere.page.patch(f"/v1/memories/{memory_id}", json={"name": "b"}).json()["name"] == "b"
    assert elsewhere.page.get("/v1/memories?limit=1").json()["data"][0]["id"] == memory_id
    exported = elsewhere.page.get(f"/v1/memories/{memory_id}/export")
    assert exported.headers["content-disposition"] == 'attachment; filename="b-memory.zip"'
    assert elsewhere.page.get("/v1/memories/nothing").json()["error"]["code"] == "memory_not_found"
    assert elsewhere.page.delete(f"/v1/memories/{memory_id}").json()["deleted"]


def test_what_is_not_read_to_its_end_is_given_up_elsewhere_too(elsewhere, video):
    body = asked(elsewhere.watch(video), "Why?", max_completion_tokens=8192, stream=True, ignore_eos=True)
    with elsewhere.page.stream("POST", "/v1/chat/completions", json=body) as answer:
        assert next(answer.iter_lines())
    until = time.monotonic() + 20
    while elsewhere.engine.num_busy:
        assert time.monotonic() < until
        time.sleep(0.02)


def test_an_upload_that_is_broken_off_is_broken_off_elsewhere_too(elsewhere, caplog):
    break_off_uploads(str(elsewhere.page.base_url))
    assert elsewhere.idle()
    assert not list(elsewhere.memories.folder.glob("incoming-*"))
    assert [record.getMessage() for record in caplog.records if record.levelname == "ERROR"] == []


def test_visitors_of_a_page_have_keys_of_their_own(elsewhere):
    app = add_page(build_forwarding_app(Server(elsewhere.url, "secret"), ("guest",), 2**22))
    with running(app) as url, httpx.Client(base_url=url, trust_env=False) as client:
        assert client.get("/").status_code == 200
        assert client.get("/page/page.js").status_code == 200
        for path in ("/v1/about", "/page/example.mp4"):
            assert client.get(path).status_code == 401
        for key, status in (("guest", 200), ("secret", 401)):
            assert client.get("/v1/about", headers={"authorization": f"Bearer {key}"}).status_code == status
    # whoever is not let in learns nothing of the server behind
    for headers in ({"origin": "https://evil.example"}, {"host": "evil.example"}):
        assert elsewhere.page.get("/v1/about", headers=headers).status_code == 403


def test_a_server_that_does_not_answer_is_named():
    app = add_page(build_forwarding_app(Server("http://127.0.0.1:9"), (), 2**22))
    assert isinstance(app, Guard)
    with running(app) as url, httpx.Client(base_url=url, trust_env=False) as client:
        answer = client.get("/v1/about")
        assert answer.status_code == 502
        assert answer.json()["error"]["message"] == "the server at http://127.0.0.1:9 does not answer"
        chunks = client.post("/v1/memories", content=iter([b"a"]))
        assert chunks.status_code == 411


def test_a_port_that_is_taken_is_named(capsys):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        for command in (["ui", "--server", "http://127.0.0.1:9"], ["ui", "--model", "nothing/at-all"]):
            assert main([*command, "--port", str(port)]) == 2
            said = f"error: --port {port}: another program has it; name another one, or 0 for any\n"
            assert capsys.readouterr().err == said
    assert main(["ui", "--port", "70000"]) == 2
    assert "--port: must be a whole number from 0 to 65,535, got 70000" in capsys.readouterr().err
    assert main(["ui", "--host", "0.0.0.0"]) == 2
    assert "name an --api-key-file" in capsys.readouterr().err
    assert main(["ui", "--server", "http://127.0.0.1:9", "--model", "x/y", "--port", "0"]) == 2
    assert "--model: with --server" in capsys.readouterr().err


def test_the_command_serves_the_page_and_ends_in_silence(tmp_path):
    command = [sys.executable, "-m", "video_ma2mba.cli", "ui", "--port", "0", "--memories", str(tmp_path / "kept")]
    served = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, "NO_COLOR": "1"},
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a test run in the background ignores it
    )  # fmt: skip
    try:
        url = served.stdout.readline().strip()
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        assert "Video-Ma²mba" in opener.open(url, timeout=60).read().decode()
        assert b'"video-ma2mba-tiny"' in opener.open(f"{url}/v1/about", timeout=60).read()
    finally:
        served.send_signal(signal.SIGINT)
        errors = served.communicate()[1]
    assert "Traceback" not in errors
    assert (tmp_path / "kept").is_dir()


def test_without_its_packages_the_command_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "fastapi", None)
    for name in ("video_ma2mba.page", "video_ma2mba.serving.app"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    assert main(["ui"]) == 2
    assert "pip install 'video-ma2mba[serve]'" in capsys.readouterr().err
