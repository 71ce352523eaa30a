"""Answers over HTTP are those of `VideoMemory.ask`, token for token."""

import json
import math
import threading
import time

import openai
import pytest
import torch

from tests.serving.conftest import QUESTIONS, asked, serving
from video_ma2mba import VideoMemory
from video_ma2mba.data.synthetic import make_story
from video_ma2mba.serving.engine import Engine, Row, Sampling

NEW_TOKENS = 12


@pytest.fixture(scope="module")
def memory(model, processor, video):
    memory = VideoMemory(model, processor)
    memory.watch(video)
    return memory


@pytest.fixture(scope="module")
def truth(memory):
    return {question: memory.ask(question, max_new_tokens=NEW_TOKENS) for question in QUESTIONS}


def ids_of(memory, question, count=NEW_TOKENS):
    (ids,) = memory.generate([question], max_new_tokens=count)
    return ids.tolist()


def test_the_openai_client_gets_the_answers_of_ask(server, video, memory, truth, processor):
    memory_id, client = server.watch(video), server.openai()
    for question in QUESTIONS:
        body = asked(memory_id, question, max_completion_tokens=NEW_TOKENS)
        answer = client.chat.completions.create(**body, logprobs=True)
        ids = ids_of(memory, question)
        assert answer.choices[0].message.content == truth[question]
        assert [one.token for one in answer.choices[0].logprobs.content] == [processor.decode([one]) for one in ids]
        assert answer.choices[0].finish_reason == "length"
        assert answer.usage.completion_tokens == NEW_TOKENS
        assert answer.usage.prompt_tokens == memory.num_tokens + memory.num_prompt_tokens(question)
        assert answer.usage.prompt_tokens_details.cached_tokens == memory.num_tokens
        chunks = list(client.chat.completions.create(**body, stream=True, stream_options={"include_usage": True}))
        said = [chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices]
        assert "".join(said) == truth[question]
        assert len([piece for piece in said if piece]) > 1
        assert chunks[-2].choices[0].finish_reason == "length"
        assert chunks[-1].usage.completion_tokens == NEW_TOKENS


def test_32_clients_at_once_while_videos_are_watched(server, video, truth, tmp_path):
    memory_id, failures = server.watch(video), []
    for seed in range(3):
        path = make_story(seed=10 + seed, duration_s=60).render(tmp_path / f"{seed}.mp4")
        with open(path, "rb") as file:
            server.http.post("/v1/memories", files={"file": file})
    start = threading.Barrier(32)

    def client(number):
        try:
            client = server.openai()
            start.wait()
            for turn in range(3):
                question = QUESTIONS[(number + turn) % len(QUESTIONS)]
                body = asked(memory_id, question, max_completion_tokens=NEW_TOKENS, stream=number % 2 == 0)
                answer = client.chat.completions.create(**body)
                if number % 2 == 0:
                    text = "".join(chunk.choices[0].delta.content or "" for chunk in answer)
                else:
                    text = answer.choices[0].message.content
                assert text == truth[question]
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=client, args=(number,)) for number in range(32)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []


def test_a_long_question_is_read_in_pieces(server, video, memory, monkeypatch):
    monkeypatch.setattr("video_ma2mba.serving.engine.PIECE_TOKENS", 7)
    memory_id, question = server.watch(video), "word " * 100
    answer = server.openai().chat.completions.create(**asked(memory_id, question, max_tokens=NEW_TOKENS))
    assert answer.choices[0].message.content == memory.ask(question, max_new_tokens=NEW_TOKENS)


def test_a_snapshot_is_asked(server, video, model, processor):
    memory_id = server.watch(video, snapshots_s=[4.0])
    assert server.http.get(f"/v1/memories/{memory_id}").json()["snapshots_s"] == [4.0]
    earlier = VideoMemory(model, processor)
    earlier.watch(video, end_s=5.0)
    body = asked(memory_id, "Why?", max_tokens=NEW_TOKENS)
    body["messages"][0]["content"][0]["at_s"] = 4.0
    answer = server.openai().chat.completions.create(**body)
    assert answer.choices[0].message.content == earlier.ask("Why?", max_new_tokens=NEW_TOKENS)
    body["messages"][0]["content"][0]["at_s"] = 5.0
    with pytest.raises(openai.BadRequestError, match="no snapshot at 5 s"):
        server.openai().chat.completions.create(**body)


def test_turns_before_count(server, video, memory):
    memory_id = server.watch(video)
    talk = memory.copy()
    first = talk.chat("Why?", max_new_tokens=NEW_TOKENS)
    body = asked(memory_id, "Why?", max_tokens=NEW_TOKENS)
    body["messages"] += [{"role": "assistant", "content": first}, {"role": "user", "content": "And then?"}]
    answer = server.openai().chat.completions.create(**body)
    assert answer.choices[0].message.content == talk.chat("And then?", max_new_tokens=NEW_TOKENS)


def generated(model, processor, messages, **kwargs):
    inputs = processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_tensors="pt")
    ids = model.generate(**inputs, max_new_tokens=NEW_TOKENS, **kwargs)[0, inputs["input_ids"].shape[1] :]
    return processor.decode(ids, skip_special_tokens=True).strip()


def test_conversations_of_all_kinds_are_those_of_generate(server, model, processor, tmp_path):
    """No medium, an image, two videos, a message of the system, a video after text, an image after a video."""
    videos = [make_story(seed=seed, duration_s=6).render(server.media / f"{seed}.mp4") for seed in (21, 22)]
    from PIL import Image

    Image.effect_noise((40, 30), 90).convert("RGB").save(server.media / "noise.png")
    picture, text = server.media / "noise.png", {"type": "text", "text": "What is it?"}
    one, two = ({"type": "video", "path": str(path)} for path in videos)
    image = {"type": "image", "path": str(picture)}
    pirate = {"role": "system", "content": "You are a pirate."}
    for messages in (
        [{"role": "user", "content": "Hello?"}],
        [{"role": "user", "content": [image, text]}],
        [{"role": "user", "content": [one, text]}],
        [{"role": "user", "content": [one, two, text]}],
        [pirate, {"role": "user", "content": [one, text]}],
        [{"role": "user", "content": [{"type": "text", "text": "Look:"}, one, text]}],
        [{"role": "user", "content": [one, {"type": "text", "text": "and"}, image, text]}],
        [{"role": "user", "content": [image, one, text]}],
    ):
        sent = json.loads(json.dumps(messages))
        for message in sent:
            for part in message["content"] if isinstance(message["content"], list) else []:
                if "path" in part:
                    kind = f"{part['type']}_url"
                    part[kind], part["type"] = {"url": f"file://{part.pop('path')}"}, kind
        for _ in range(2):  # what was watched is remembered
            answer = server.openai().chat.completions.create(model="tiny", messages=sent, max_tokens=NEW_TOKENS)
            assert answer.choices[0].message.content == generated(model, processor, messages), messages
        cached = answer.usage.prompt_tokens_details.cached_tokens
        assert (cached > 6 * model.config.tokens_per_frame) == any("video" in str(part) for part in messages)


def test_n_temperature_and_seed(server, video):
    memory_id, client = server.watch(video), server.openai()
    body = asked(memory_id, "Why?", max_tokens=NEW_TOKENS, temperature=1.5, n=3)
    one, again = (client.chat.completions.create(**body, seed=7) for _ in range(2))
    texts = [choice.message.content for choice in one.choices]
    assert texts == [choice.message.content for choice in again.choices]
    assert len(set(texts)) == 3
    assert [choice.index for choice in one.choices] == [0, 1, 2]
    other = client.chat.completions.create(**body, seed=8)
    assert other.choices[0].message.content == texts[1]  # the seeds of answers follow each other
    narrow = client.chat.completions.create(**{**body, "n": 1}, top_p=1e-9)
    greedy = client.chat.completions.create(**{**body, "n": 1, "temperature": 0})
    assert narrow.choices[0].message.content == greedy.choices[0].message.content


def test_logprobs_are_those_of_the_model(server, video, memory, processor):
    memory_id = server.watch(video)
    body = asked(memory_id, "Why?", max_tokens=5, logprobs=True, top_logprobs=3)
    content = server.openai().chat.completions.create(**body).choices[0].logprobs.content
    ids = ids_of(memory, "Why?", 5)
    text = processor.decode(ids)
    whole = float(memory.log_likelihoods("Why?", [text])[0])
    if processor.tokenizer(text)["input_ids"] == ids:
        assert sum(one.logprob for one in content) == pytest.approx(whole, abs=1e-4)
    for one in content:
        assert len(one.top_logprobs) == 3
        assert one.top_logprobs[0].logprob >= one.top_logprobs[1].logprob >= one.top_logprobs[2].logprob
        assert one.logprob <= one.top_logprobs[0].logprob + 1e-6


@pytest.mark.parametrize(
    ("every_s", "sizes"), [(0.0, [1] * NEW_TOKENS), (3600.0, [1, NEW_TOKENS - 1]), (math.inf, [NEW_TOKENS])]
)
def test_tokens_are_handed_over_as_often_as_wanted(model, memory, every_s, sizes):
    """The first at once, each token once and in order, the last with the ending."""
    told, ended = [], threading.Event()

    def listener(tokens, ending):
        told.append(([token.id for token in tokens], ending))
        if ending is not None:
            ended.set()

    engine, ids = Engine(model), [40, 41, 42]
    sampling = Sampling(NEW_TOKENS, ignores_end=True)
    engine.submit([Row(ids, memory._cache, sampling, time.monotonic() + 600, every_s, listener)])
    assert ended.wait(600)
    engine.close()
    assert [len(tokens) for tokens, _ in told] == sizes
    assert [ending for _, ending in told] == [None] * (len(sizes) - 1) + ["length"]
    cache, said, step = memory._cache.copy(), [], torch.tensor([ids])
    with torch.no_grad():
        for _ in range(NEW_TOKENS):
            outputs = model(step, cache=cache, use_cache=True)
            cache, step = outputs.cache, outputs.logits[:, -1:].argmax(-1)
            said.append(step.item())
    assert [one for tokens, _ in told for one in tokens] == said


def test_stop_strings_end_an_answer_and_free_its_slot(server, video, truth):
    memory_id, question = server.watch(video), QUESTIONS[0]
    stop = truth[question][2:4]
    expected = truth[question].partition(stop)[0].rstrip()
    body = asked(memory_id, question, max_tokens=2000, stop=[stop, "never"])
    answer = server.openai().chat.completions.create(**body)
    assert answer.choices[0].message.content == expected
    assert answer.choices[0].finish_reason == "stop"
    assert server.idle()
    chunks = list(server.openai().chat.completions.create(**body, stream=True))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == expected


def test_the_end_of_a_turn_is_counted_and_not_said(model, processor, video, tmp_path, monkeypatch):
    memory = VideoMemory(model, processor)
    memory.watch(video)
    ids = ids_of(memory, "Why?")
    monkeypatch.setattr(model.generation_config, "eos_token_id", ids[4])
    with serving(model, processor, tmp_path / "memories") as server:
        body = asked(server.watch(video), "Why?", max_tokens=NEW_TOKENS)
        answer = server.openai().chat.completions.create(**body)
        count = ids.index(ids[4]) + 1
        assert answer.choices[0].finish_reason == "stop"
        assert answer.usage.completion_tokens == count
        assert answer.choices[0].message.content == processor.decode(ids[: count - 1]).strip()
