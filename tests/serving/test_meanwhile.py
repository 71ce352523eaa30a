"""A question while something else happens to its server, its memory or its client."""

import base64
import concurrent.futures
import contextlib
import io
import json
import random
import socket
import threading
import time

import httpx
import openai
import pytest
import torch
from PIL import Image

from tests.serving.conftest import asked, head_of, serving
from tests.serving.test_memories import count_watching
from video_ma2mba import VideoMemory
from video_ma2mba.data.synthetic import make_story
from video_ma2mba.serving.answers import Transcript
from video_ma2mba.serving.memories import Memories

ENDLESS = {"ignore_eos": True}


def said(chunks, index=0):
    mine = [one for chunk in chunks for one in chunk.choices if one.index == index]
    return "".join(one.delta.content or "" for one in mine), [one.finish_reason for one in mine if one.finish_reason]


def test_several_answers_are_streamed_side_by_side(server, video):
    """They are those of the same request without streaming, each to its own end."""
    body = asked(server.watch(video), "Why?", max_tokens=30, temperature=1.2, seed=5, n=4, logprobs=True)
    whole = server.openai().chat.completions.create(**body)
    chunks = list(server.openai().chat.completions.create(**body, stream=True, stream_options={"include_usage": True}))
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
    for choice in whole.choices:
        assert said(chunks, choice.index) == (choice.message.content, [choice.finish_reason])
        mine = [one for chunk in chunks for one in chunk.choices if one.index == choice.index and one.logprobs]
        assert [token.token for one in mine for token in one.logprobs.content] == [
            token.token for token in choice.logprobs.content
        ]


def test_a_stop_string_over_the_borders_of_tokens(server, video):
    """Every piece of an answer as a stop string, streamed and not."""
    memory_id, client = server.watch(video), server.openai()
    body = asked(memory_id, "Why?", max_tokens=24, extra_body=ENDLESS)
    text = client.chat.completions.create(**body).choices[0].message.content
    chance = random.Random(1)
    for _ in range(6):
        start = chance.randrange(1, len(text) - 1)
        stop = text[start : start + chance.randint(1, 9)]
        expected = text[: text.find(stop)].rstrip()
        answer = client.chat.completions.create(**body, stop=stop).choices[0]
        assert (answer.message.content, answer.finish_reason) == (expected, "stop")
        chunks = client.chat.completions.create(**body, stop=[stop, "\0never"], stream=True)
        assert said(chunks) == (expected, ["stop"])


def test_a_memory_is_deleted_while_it_is_asked(server, tmp_path):
    """The answer that has begun is written to its end; the next question is told that there is none."""
    memory_id = server.watch(make_story(seed=71, duration_s=6).render(tmp_path / "71.mp4"))
    body = asked(memory_id, "Why?", max_tokens=60)
    whole = server.openai().chat.completions.create(**body, extra_body=ENDLESS).choices[0].message.content
    stream = server.openai().chat.completions.create(**body, extra_body=ENDLESS, stream=True)
    first = next(stream)
    assert server.http.delete(f"/v1/memories/{memory_id}").json()["deleted"]
    assert said([first, *stream]) == (whole, ["length"])
    with pytest.raises(openai.NotFoundError, match="no memory"):
        server.openai().chat.completions.create(**body)


def test_a_memory_is_deleted_while_a_question_waits_for_it(server, tmp_path, monkeypatch):
    monkeypatch.setattr(server.memories, "wait_for_turn", lambda timeout_s: time.sleep(0.1))
    path = make_story(seed=72, duration_s=60).render(tmp_path / "72.mp4")
    with open(path, "rb") as file:
        memory_id = server.http.post("/v1/memories", files={"file": file}, data={"fps": "8"}).json()["id"]
    with concurrent.futures.ThreadPoolExecutor() as pool:
        waiting = pool.submit(server.http.post, "/v1/chat/completions", json=asked(memory_id, "Why?"))
        time.sleep(0.5)
        assert server.http.delete(f"/v1/memories/{memory_id}").status_code == 200
        answer = waiting.result(60)
    assert answer.status_code == 409, answer.text
    assert answer.json()["error"]["code"] == "stopped"


def test_frames_are_pushed_while_the_memory_is_asked(server, model, processor):
    """Each answer is that of the frames up to some push, never of half of one."""
    frames = make_story(seed=73, duration_s=8).frames()
    alone, truth, urls = VideoMemory(model, processor), set(), []
    for frame in frames:
        buffer = io.BytesIO()
        Image.fromarray(frame).save(buffer, "png")
        urls.append("data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode())
        alone.push_frames(processor.video_processor.load_image(Image.fromarray(frame)))
        truth.add(alone.ask("Why?", max_new_tokens=12))
    memory_id = server.http.post("/v1/memories", json={"live": True}).json()["id"]
    place, done, answers, failures = f"/v1/memories/{memory_id}/frames", threading.Event(), set(), []
    assert server.http.post(place, json={"frames": urls[:1]}).status_code == 200

    def ask():
        try:
            client = server.openai()
            while not done.is_set():
                answer = client.chat.completions.create(**asked(memory_id, "Why?", max_tokens=12))
                answers.add(answer.choices[0].message.content)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    for url in urls[1:]:
        answer = server.http.post(place, json={"frames": [url]})
        assert answer.status_code == 200, answer.text
    done.set()
    for thread in threads:
        thread.join()
    assert failures == []
    assert answers <= truth
    last = server.openai().chat.completions.create(**asked(memory_id, "Why?", max_tokens=12))
    assert last.choices[0].message.content == alone.ask("Why?", max_new_tokens=12)


def test_a_memory_that_changes_while_another_server_reads_it(model, processor, tmp_path, monkeypatch):
    """A replica that has read the JSON finds its states replaced: it reads again, and says nothing of damage."""
    from video_ma2mba.serving.media import MediaRules

    one, other = (Memories(tmp_path / "m", model, processor, MediaRules()) for _ in range(2))
    try:
        memory_id, side = one.begin_live("camera"), processor.video_processor.side
        real, frames = VideoMemory.from_pretrained, torch.zeros(1, 3, side, side, dtype=torch.uint8)

        def late(folder, *rest):
            monkeypatch.setattr(VideoMemory, "from_pretrained", real)
            described = (folder / "video_memory.json").read_text()
            one.push(memory_id, frames, None).result(60)
            kept = folder.parent / "kept"
            kept.mkdir()
            (kept / "video_memory.json").write_text(described)
            return real(kept, *rest)  # the JSON of before, the states of after

        monkeypatch.setattr(VideoMemory, "from_pretrained", late)
        assert other.load(memory_id).num_frames == 1
    finally:
        one.close()
        other.close()


def test_the_same_video_is_sent_by_many_at_once(server, tmp_path, monkeypatch):
    calls = count_watching(monkeypatch)
    data = make_story(seed=74, duration_s=20).render(tmp_path / "74.mp4").read_bytes()
    video = "data:video/mp4;base64," + base64.b64encode(data).decode()
    parts = [{"type": "video_url", "video_url": {"url": video}}, {"type": "text", "text": "Why?"}]
    question = {"messages": [{"role": "user", "content": parts}], "max_tokens": 6}
    with concurrent.futures.ThreadPoolExecutor(12) as pool:
        sent = [pool.submit(server.http.post, "/v1/memories", files={"file": data}) for _ in range(8)]
        answered = [pool.submit(server.http.post, "/v1/chat/completions", json=question) for _ in range(4)]
        (memory_id,) = {one.result().json()["id"] for one in sent}
        (answer,) = {one.result().json()["choices"][0]["message"]["content"] for one in answered}
    assert len(calls) == 1
    again = server.openai().chat.completions.create(**asked(server.wait(memory_id), "Why?", max_tokens=6))
    assert again.choices[0].message.content == answer
    assert not list(server.memories.folder.glob("incoming-*"))
    assert not list((server.memories.folder / memory_id).glob("media-*"))


def test_a_client_that_goes_away_at_once_leaves_no_row(server, video):
    """Also before the first event could be sent."""
    body = json.dumps(asked(server.watch(video), "Why?", max_tokens=8000, stream=True, n=4) | ENDLESS).encode()
    for _ in range(20):
        with socket.create_connection(("127.0.0.1", int(server.url.rpartition(":")[2]))) as client:
            client.sendall(head_of(body) + body)
    assert server.idle()


def test_no_request_spoils_the_answers_of_others(server, video):
    """However small its temperature: it is greedy then, and the rows that are written beside it go on."""
    memory_id, client = server.watch(video), server.openai()
    body = asked(memory_id, "Why?", max_tokens=40, extra_body=ENDLESS)
    greedy = client.chat.completions.create(**body).choices[0].message.content
    stream = client.chat.completions.create(**body, stream=True)
    first = next(stream)
    for temperature in (5e-324, 1e-300, 1e-40, 1e-8):
        answer = client.chat.completions.create(**body, temperature=temperature, top_p=5e-324, seed=1)
        assert answer.choices[0].message.content == greedy
    assert said([first, *stream]) == (greedy, ["length"])


def test_bodies_that_are_hard_to_read_or_to_repeat(server, video):
    half = "\\ud800"
    for path in ("/v1/chat/completions", "/v1/memories"):
        for body in (
            "[" * 200_000, '{"messages":' * 20_000, f'{{"{half}": 1}}', f'{{"messages": [{{"role": "{half}"}}]}}', "{",
            f'{{"messages": [{{"role": "user", "content": "{half}"}}]}}', f'{{"path": "/{half}"}}', "1e999", "\x00", "",
            f'{{"live": true, "name": "{half}"}}', '{"n": ' + "9" * 5000 + "}",
        ):  # fmt: skip
            answer = server.http.post(path, content=body, headers={"content-type": "application/json"})
            assert 400 <= answer.status_code < 500, (body[:60], answer.status_code)
            assert answer.json()["error"]["message"]
    memory_id = server.watch(video, fps="5e-324")
    assert server.http.get(f"/v1/memories/{memory_id}").json()["num_frames"] == 1


def test_snapshots_are_bounded_by_what_they_take(server, video, monkeypatch):
    monkeypatch.setattr(server.memories, "max_snapshots", 2)
    with open(video, "rb") as file:
        sent = server.http.post("/v1/memories", files={"file": file}, data={"snapshots_s": ["1", "2", "3"]})
    assert sent.status_code == 400
    assert "at most 2" in sent.json()["error"]["message"]
    assert not list(server.memories.folder.glob("incoming-*"))


def test_long_answers_are_cheap_to_hand_over(processor):
    """A token costs the same at the end of 8,192 tokens as at the beginning: no more of the text is decoded anew."""
    tokenizer = processor.tokenizer

    class Counting:
        decoded = 0

        def decode(self, ids, **kwargs):
            self.decoded += len(ids)
            return tokenizer.decode(ids, **kwargs)

    ids = tokenizer("wörds and \U0001f600 " * 400)["input_ids"]
    transcript = Transcript(counting := Counting(), ("never",))
    said = "".join(transcript.push([one]) for one in ids) + transcript.finish()
    assert said == tokenizer.decode(ids).strip()
    assert counting.decoded < 400 * len(ids)


def test_a_server_that_restarts_in_the_middle(model, processor, video, tmp_path):
    """Told to end, it breaks off an answer that takes long; the next one has the memory."""
    with contextlib.ExitStack() as client:
        with serving(model, processor, tmp_path / "m") as server:
            memory_id = server.watch(video)
            body = {**asked(memory_id, "Why?", max_tokens=8000), **ENDLESS}
            sent = server.http.stream("POST", "/v1/chat/completions", json={**body, "stream": True})
            lines = client.enter_context(sent).iter_lines()
            next(lines)
        with pytest.raises(httpx.TransportError):
            list(lines)
    with serving(model, processor, tmp_path / "m") as server:
        assert server.http.get(f"/v1/memories/{memory_id}").json()["status"] == "ready"
        assert server.http.post("/v1/chat/completions", json={**body, "max_tokens": 3}).status_code == 200
        assert server.idle()
