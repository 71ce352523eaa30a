"""The benchmark of the server, and its examples."""

import json
import math
import queue
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from transformers import DynamicCache

from video_ma2mba import VideoMemory
from video_ma2mba.benchmark import serve, serve_attention
from video_ma2mba.benchmark.memory_of_video import attention_of_size
from video_ma2mba.cli import bench, main
from video_ma2mba.serving.engine import Engine, Row, Sampling


def test_bench_serve_prints_what_it_measured(capsys):
    options = "--clients 1 2 --requests 4 --minutes 1 2 --repeats 2 --tokens 3 --attention-requests 2"
    assert main(["bench", "serve", *options.split()]) == 0
    result = json.loads(capsys.readouterr().out)
    assert [row["clients"] for row in result["rows"]] == [1, 2]
    assert all(row["requests_per_s"] > 0 and row["first_token_s"] > 0 for row in result["rows"])
    assert result["rows"][0]["times_one_client"] == 1.0
    assert [row["minutes"] for row in result["first_token_by_minutes"]] == [1, 2]
    assert result["minutes"] == 2
    assert [row["clients"] for row in result["attention_rows"]] == [1, 2]
    assert all(row["requests_per_s"] > 0 and row["first_token_s"] > 0 for row in result["attention_rows"])
    assert result["ask_per_s"] > 0
    assert bench.load("serve") is serve


def test_the_loop_answers_by_attention_as_it_would_alone(model, processor, video):
    """Rows of different lengths, joined and left at different steps, against one row at a time."""
    attention, past = attention_of_size(model), serve_attention.past_of_video(model, processor, video)
    questions = [processor.tokenizer(words)["input_ids"] for words in ("Why?", "What came before that?", "And?")]

    def alone(ids, count):
        cache, said, step = DynamicCache(), [], torch.tensor([ids])
        for number, (keys, values) in enumerate(past.layers):
            cache.update(keys, values, number)
        for _ in range(count):
            with torch.no_grad():
                step = attention(step, past_key_values=cache).logits[:, -1:].argmax(-1)
            said.append(step.item())
        return said

    engine, told = Engine(serve_attention.Attention(attention)), queue.Queue()
    rows = [
        Row(ids, past, Sampling(4 + 2 * number, ignores_end=True), time.monotonic() + 600, math.inf,
            lambda tokens, ending, number=number: told.put((number, ending, [token.id for token in tokens])))
        for number, ids in enumerate(questions)
    ]  # fmt: skip
    engine.submit(rows)
    given = {number: ids for number, ending, ids in (told.get(timeout=600) for _ in rows) if ending == "length"}
    engine.close()
    assert given == {number: alone(ids, 4 + 2 * number) for number, ids in enumerate(questions)}


@pytest.mark.parametrize("example", ["openai_client.py", "curl.sh"])
def test_the_examples_ask_a_server(server, video, model, processor, example):
    command = [sys.executable] if example.endswith(".py") else ["sh"]
    where = ["--server", server.url] if example.endswith(".py") else [server.url]
    script = Path(__file__).resolve().parents[2] / "examples" / "serving" / example
    done = subprocess.run([*command, str(script), video, 'Why "this"?', *where], capture_output=True, timeout=120)
    assert done.returncode == 0, done.stderr
    alone = VideoMemory(model, processor)
    alone.watch(video)
    answer = alone.ask('Why "this"?', max_new_tokens=64)
    said = done.stdout.decode()
    assert (said.strip() if example.endswith(".py") else json.loads(said)["choices"][0]["message"]["content"]) == answer


def test_a_server_that_is_not_there_is_named(tmp_path, capsys, video):
    assert main(["chat", video, "--server", "http://127.0.0.1:9"]) == 2
    assert "http://127.0.0.1:9 does not answer" in capsys.readouterr().err
    assert main(["chat", video, "--server", "http://127.0.0.1:9", "--device", "cpu"]) == 2
    assert "--device: with --server" in capsys.readouterr().err
    assert main(["chat", video, "--server", "somewhere"]) == 2
    assert "looks like http://" in capsys.readouterr().err
    assert main(["chat", video, "--server", "http://127.0.0.1:9", "--model", "x", "--start", "3"]) == 2
    assert "--model, --start" in capsys.readouterr().err
