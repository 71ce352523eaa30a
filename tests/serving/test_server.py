"""What goes wrong between a server and its clients: told in OpenAI's form, and no slot is lost."""

import asyncio
import concurrent.futures
import io
import json
import os
import random
import socket
import subprocess
import sys
import threading
import time

import openai
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.serving.conftest import asked, head_of, serving
from video_ma2mba.cli import main
from video_ma2mba.serving import guard
from video_ma2mba.serving.answers import Transcript
from video_ma2mba.serving.app import listening_socket
from video_ma2mba.serving.media import MediaRules


@pytest.fixture(scope="module")
def memory_id(server, video):
    return server.watch(video)


def refused(server, path, body, status, said, method="POST"):
    answer = server.http.request(method, path, json=body)
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert said in error["message"], error["message"]
    assert "Traceback" not in answer.text
    assert "/src/" not in answer.text
    return error


def test_what_cannot_be_honoured_is_refused_by_its_name(server, memory_id):
    good = asked(memory_id, "Why?")
    for change, said in (
        ({"messages": []}, "messages"), ({"temperature": 3}, "temperature"), ({"n": 0}, "n:"), ({"n": 17}, "n:"),
        ({"tools": [{}]}, "tools"), ({"frequency_penalty": 0.5}, "frequency_penalty"), ({"max_tokens": 0}, "max_tok"),
        ({"response_format": {"type": "json_object"}}, "response_format"), ({"stop": ["a"] * 5}, "stop"),
        ({"stop": ""}, "stop"), ({"top_logprobs": 2}, "top_logprobs"), ({"beam": 2}, "beam"),
        ({"stream_options": {}}, "stream_options"), ({"logit_bias": {"1": 2}}, "logit_bias"),
        ({"media_io_kwargs": {"video": {"num_frames": 32}}}, "num_frames"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "role"),
        ({"messages": [{"role": "user", "content": " "}]}, "question is empty"),
        ({"messages": [{"role": "assistant", "content": "x"}]}, "last turn"),
        ({"messages": [{"role": "user", "content": "<video> what"}]}, "placeholder"),
        ({"messages": [{"role": "user", "content": "word " * 20_000}]}, "tokens"),
        ({"messages": [{"role": "user", "content": "x" * 600_000}]}, "characters"),
    ):  # fmt: skip
        refused(server, "/v1/chat/completions", {**good, **change}, 400, said)
    part, text = good["messages"][0]["content"]
    for content, said in (
        ([part, part, text], "one at most"), ([text, part], "first part"), ([{**part, "id": 3}, text], "id"),
        ([{"type": "video_url", "video_url": {"url": "x", "fps": 0}}, text], "fps"),
        ([{"type": "input_audio"}, text], "input_audio"),
    ):  # fmt: skip
        body = {**good, "messages": [{"role": "user", "content": content}]}
        refused(server, "/v1/chat/completions", body, 400, said)
    system = {**good, "messages": [{"role": "system", "content": "Be brief."}, *good["messages"]]}
    refused(server, "/v1/chat/completions", system, 400, "message of the system")


def test_what_is_not_there_is_404(server, memory_id):
    good = asked(memory_id, "Why?")
    refused(server, "/v1/chat/completions", {**good, "model": "gpt"}, 404, "'tiny' alone")
    refused(server, "/v1/chat/completions", asked("0" * 32, "Why?"), 404, "no memory")
    for bad in ("0" * 32, "nothing", "..%2F..%2Fetc", "%00"):
        for method in ("GET", "DELETE"):
            refused(server, f"/v1/memories/{bad}", None, 404, "", method)
    refused(server, "/v1/nothing", None, 404, "", "GET")
    refused(server, "/v1/chat/completions", None, 405, "", "GET")
    with pytest.raises(openai.NotFoundError):
        server.openai().models.retrieve("gpt")
    assert [one.id for one in server.openai().models.list()] == ["tiny"]


def test_media_that_may_not_be_read_are_refused(server, tmp_path, video):
    text = {"type": "text", "text": "Why?"}
    for url, status, said in (
        (str(video), 403, "--allow-media"), ("http://127.0.0.1/x.mp4", 403, "--allow-urls"),
        ("data:video/mp4;base64,AAAA", 400, "not a video"), ("rtsp://127.0.0.1/x", 403, "path or by"),
    ):  # fmt: skip
        content = [{"type": "video_url", "video_url": {"url": url}}, text]
        body = {"messages": [{"role": "user", "content": content}]}
        refused(server, "/v1/chat/completions", body, status, said)
        refused(server, "/v1/memories", {"url": url}, status, said)
    refused(server, "/v1/memories", {"url": "x", "path": "y"}, 400, "one of url")
    refused(server, "/v1/memories", {"path": "x", "fps": -1}, 400, "fps")
    answer = server.http.post("/v1/memories", content=b"x", headers={"content-type": "video/mp4"})
    assert answer.status_code == 415
    big = server.http.post("/v1/memories", files={"file": b"x" * (2 * 2**20)})
    assert big.status_code == 413

    def endless():
        for _ in range(64):
            yield b"x" * 65536

    headers = {"content-type": "multipart/form-data; boundary=b"}
    assert server.http.post("/v1/memories", content=endless(), headers=headers).status_code in (400, 413)
    assert not list(server.memories.folder.glob("incoming-*"))


def test_keys_are_asked_for(model, processor, tmp_path, video):
    with serving(model, processor, tmp_path / "memories", keys=("first", "second")) as server:
        assert server.http.get("/health").json() == {"status": "ok"}
        for header in (
            {},
            {"authorization": "Bearer wrong"},
            {"authorization": "first"},
            {"authorization": "Basic first"},
        ):
            answer = server.http.get("/v1/models", headers=header)
            assert answer.status_code == 401
            assert answer.json()["error"]["code"] == "invalid_api_key"
        assert server.http.get("/metrics").status_code == 401
        for key in ("first", "second"):
            assert len(server.openai(key).models.list().data) == 1
        with pytest.raises(openai.AuthenticationError):
            server.openai("third").models.list()


def test_pages_of_other_sites_are_not_answered(server):
    for origin, status in (
        ("http://evil.example", 403),
        ("http://localhost:7860", 200),
        ("null", 403),
        ("http://[", 403),
    ):
        assert server.http.get("/v1/models", headers={"origin": origin}).status_code == status
    for host, status in (("evil.example", 403), ("localhost", 200), ("[::1]:80", 200), ("", 403)):
        assert server.http.get("/v1/models", headers={"host": host}).status_code == status


def test_too_many_questions_are_told_to_come_back(model, processor, tmp_path, video):
    with serving(model, processor, tmp_path / "memories", num_slots=2, max_waiting=3) as server:
        memory_id = server.watch(video)
        body = {**asked(memory_id, "Why?", max_tokens=400), "ignore_eos": True}
        with concurrent.futures.ThreadPoolExecutor(16) as pool:
            answers = list(pool.map(lambda _: server.http.post("/v1/chat/completions", json=body), range(16)))
        assert {answer.status_code for answer in answers} == {200, 429}
        for answer in answers:
            if answer.status_code == 429:
                assert int(answer.headers["retry-after"]) >= 1
                assert answer.json()["error"]["type"] == "rate_limit_error"
        assert server.http.post("/v1/chat/completions", json={**body, "n": 6}).status_code == 429
        assert server.idle()
        patient = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=3)
        assert patient.chat.completions.create(**asked(memory_id, "Why?", max_tokens=2)).choices


def test_an_answer_that_takes_too_long_is_broken_off(model, processor, tmp_path, video):
    with serving(model, processor, tmp_path / "memories", timeout_s=0.5) as server:
        body = {**asked(server.watch(video), "Why?", max_tokens=8000), "ignore_eos": True}
        refused(server, "/v1/chat/completions", body, 504, "took longer")
        assert server.idle()
        with server.http.stream("POST", "/v1/chat/completions", json={**body, "stream": True}) as answer:
            events = [line for line in answer.iter_lines() if line]
        assert json.loads(events[-1].removeprefix("data: "))["error"]["code"] == "timeout"
        assert server.idle()


def test_a_client_that_goes_away_frees_its_slot(server, memory_id):
    endless = {**asked(memory_id, "Why?", max_tokens=8000), "ignore_eos": True}
    for stream in (False, True):
        for _ in range(4):
            body = json.dumps({**endless, "stream": stream, "n": 2}).encode()
            with socket.create_connection(("127.0.0.1", int(server.url.rpartition(":")[2]))) as client:
                client.sendall(head_of(body) + body)
                while server.engine.num_busy < 2:
                    time.sleep(0.005)
        assert server.idle()


def test_a_body_that_does_not_come_is_not_waited_for(server, monkeypatch):
    monkeypatch.setattr(guard, "BODY_TIMEOUT_S", 0.2)
    with socket.create_connection(("127.0.0.1", int(server.url.rpartition(":")[2]))) as client:
        client.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n")
        client.sendall(b"Content-Length: 100\r\n\r\n{")
        client.settimeout(20)
        assert b" 408 " in client.recv(4096).partition(b"\r\n")[0]


def test_a_client_that_does_not_read_holds_up_nobody(server, memory_id):
    body = json.dumps({**asked(memory_id, "Why?", max_tokens=200, stream=True), "ignore_eos": True, "logprobs": True,
                       "top_logprobs": 20}).encode()  # fmt: skip
    with socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.connect(("127.0.0.1", int(server.url.rpartition(":")[2])))
        client.sendall(head_of(body) + body)
        while not server.engine.num_busy:
            time.sleep(0.005)
        answer = server.openai().chat.completions.create(**asked(memory_id, "Why?", max_tokens=3))
        assert answer.usage.completion_tokens == 3
        until = time.monotonic() + 60
        while server.engine.num_busy:  # its answer is written all the same, and its slot is free
            assert time.monotonic() < until
            time.sleep(0.02)


def test_200_connections_are_answered(server, memory_id):
    async def one(number):
        reader, writer = await asyncio.open_connection("127.0.0.1", int(server.url.rpartition(":")[2]))
        body = json.dumps(asked(memory_id, f"Why {number}?", max_tokens=2)).encode()
        writer.write(head_of(body) + body)
        answer = await reader.read()
        writer.close()
        return answer.split(b" ")[1]

    async def all_of_them():
        return await asyncio.gather(*(one(number) for number in range(200)))

    assert set(asyncio.run(all_of_them())) == {b"200"}


NAMES = ["role", "content", "type", "text", "id", "url", "video_url", "image_url", "n", "at_s"]
LEAVES = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20) | st.sampled_from(NAMES)
VALUES = st.recursive(
    LEAVES | st.sampled_from(["user", "memory"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(NAMES), inner, max_size=4),
    max_leaves=8,
)
FIELDS = ["messages", "n", "stop", "seed", "temperature", "top_p", "stream", "logprobs", "top_logprobs", "max_tokens",
          "model", "tools", "user", "frames", "path", "live", "fps", "snapshots_s"]  # fmt: skip


@settings(
    max_examples=int(os.environ.get("SERVING_BODIES", "40")),
    deadline=None,
    derandomize=True,  # the same bodies each time
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(st.dictionaries(st.sampled_from(FIELDS), VALUES, max_size=6), st.booleans(), st.randoms(use_true_random=False))
def test_random_bodies_are_answered_or_refused(server, memory_id, body, is_good, chance):
    body = {**asked(memory_id, "Why?", max_tokens=2), **body} if is_good else body
    data = bytearray(json.dumps(body).encode())
    if chance.random() < 0.3 and data:
        data[chance.randrange(len(data))] = chance.randrange(256)
    for path in ("/v1/chat/completions", "/v1/memories", f"/v1/memories/{memory_id}/frames"):
        answer = server.http.post(path, content=bytes(data), headers={"content-type": "application/json"})
        assert answer.status_code < 500, answer.text
        if answer.status_code >= 400:
            assert answer.json()["error"]["message"]
        elif path == "/v1/memories":
            server.http.delete(f"/v1/memories/{answer.json()['id']}")


def test_one_row_that_fails_takes_nobody_else_down(server, memory_id, monkeypatch):
    real = server.engine._read_piece

    def fail():
        monkeypatch.setattr(server.engine, "_read_piece", real)
        raise RuntimeError("out of memory, say /src/secret.py")

    monkeypatch.setattr(server.engine, "_read_piece", fail)
    refused(server, "/v1/chat/completions", asked(memory_id, "Why?"), 500, "failed to answer")
    assert server.openai().chat.completions.create(**asked(memory_id, "Why?", max_tokens=2)).choices


def test_metrics_count(server, memory_id):
    def values():
        lines = server.http.get("/metrics").text.splitlines()
        return {line.rpartition(" ")[0]: float(line.rpartition(" ")[2]) for line in lines if not line.startswith("#")}

    before = values()
    server.openai().chat.completions.create(**asked(memory_id, "Why?", max_tokens=4), extra_body={"ignore_eos": True})
    server.idle()
    after = values()
    grown = {name: after[name] - before.get(name, 0) for name in after}
    assert grown["video_ma2mba_completion_tokens_total"] == 4
    assert grown['video_ma2mba_responses_total{path="/v1/chat/completions",status="200"}'] == 1
    assert grown["video_ma2mba_cached_tokens_total"] > 0
    assert grown["video_ma2mba_first_token_seconds_count"] == 1
    assert after["video_ma2mba_slots_busy"] == 0


@pytest.mark.parametrize("stops", [(), ("lo w",), ("zz", "ö"), ("hello world",)])
def test_a_transcript_never_takes_back(processor, stops):
    tokenizer, text = processor.tokenizer, "  hello wörld, ünïcode \U0001f600 and  blanks   "
    ids, chance = tokenizer(text)["input_ids"], random.Random(0)
    whole = text.strip()
    places = [place for stop in stops if (place := whole.find(stop)) >= 0]
    expected = whole[: min(places)].rstrip() if places else whole
    for _ in range(20):
        transcript, said, left = Transcript(tokenizer, stops), "", list(ids)
        while left and not transcript.is_stopped:
            size = chance.randint(1, 4)
            said += transcript.push(left[:size])
            left = left[size:]
            assert expected.startswith(said)
        assert said + transcript.finish() == expected


def test_the_command_refuses_what_cannot_be_served(model_folder, tmp_path, capsys):
    empty = tmp_path / "keys"
    empty.write_text("\n")
    for options, said in (
        (["--host", "0.0.0.0"], "--api-key-file"), (["--api-key-file", str(empty)], "a key a line"),
        (["--allow-media", str(tmp_path / "none")], "no such folder"), (["--slots", "0"], "--slots"),
        (["--engine-options=--max-model-len 9"], "for --engine vllm"),
        (["--engine", "vllm", "--slots", "3"], "--slots: for the"),
        (["--engine", "vllm"], "video-ma2mba[vllm]"),
    ):  # fmt: skip
        assert main(["serve", model_folder, *options]) == 2
        assert said in capsys.readouterr().err


def test_the_command_serves_and_the_chat_command_talks_to_it(model_folder, video, tmp_path, monkeypatch, capsys):
    keys = tmp_path / "keys"
    keys.write_text("secret\n")
    command = [sys.executable, "-m", "video_ma2mba.cli", "serve", model_folder, "--port", "0"]
    served = subprocess.Popen(
        [*command, "--api-key-file", str(keys), "--memories", str(tmp_path / "m")], stdout=subprocess.PIPE, text=True
    )
    try:
        url = served.stdout.readline().strip()
        talk = ["chat", video, "--server", url, "--max-new-tokens", "8"]
        monkeypatch.setattr("sys.stdin", io.StringIO("Why?\nAnd then?\n/stats\n/save x\n/quit\n"))
        assert main([*talk, "--api-key-file", str(keys)]) == 0
        said = capsys.readouterr()
        assert "10 frames" in said.out
        assert "2 question(s) so far" in said.out
        assert "the server keeps this memory" in said.err
        assert main(talk) == 2
        assert "the API key is missing or wrong" in capsys.readouterr().err
    finally:
        served.terminate()
        served.communicate(timeout=60)


def test_close_frees_everything(model, processor, tmp_path):
    before = threading.active_count()
    with serving(model, processor, tmp_path / "m", rules=MediaRules()) as server:
        assert server.http.get("/health").status_code == 200
        server.http.close()
    until = time.monotonic() + 10
    while threading.active_count() > before + 8 and time.monotonic() < until:  # the pool of asyncio may linger
        time.sleep(0.05)
    names = {thread.name for thread in threading.enumerate()}
    assert sum(name == "answers" for name in names) <= 1


def test_events_are_sent_at_once():
    """Nagle's algorithm holds back all events after the first until that is acknowledged, 40 ms later."""

    async def accepted():
        came = asyncio.get_running_loop().create_future()
        with listening_socket("127.0.0.1", 0) as listening:
            async with await asyncio.start_server(lambda reader, writer: came.set_result(writer), sock=listening):
                _, ours = await asyncio.open_connection(*listening.getsockname())
                theirs = await came
                option = theirs.get_extra_info("socket").getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
                for writer in (ours, theirs):
                    writer.close()
                return option

    assert asyncio.run(accepted())
