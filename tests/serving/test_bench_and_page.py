"""The benchmark of the server, and its examples."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from video_ma2mba import VideoMemory
from video_ma2mba.benchmark import serve
from video_ma2mba.cli import bench, main


def test_bench_serve_prints_what_it_measured(capsys):
    options = "--clients 1 2 --requests 4 --minutes 1 2 --repeats 2 --tokens 3 --attention-requests 2"
    assert main(["bench", "serve", *options.split()]) == 0
    result = json.loads(capsys.readouterr().out)
    assert [row["clients"] for row in result["rows"]] == [1, 2]
    assert all(row["requests_per_s"] > 0 and row["first_token_s"] > 0 for row in result["rows"])
    assert result["rows"][0]["times_one_client"] == 1.0
    assert [row["minutes"] for row in result["first_token_by_minutes"]] == [1, 2]
    assert result["attention_tokens"] == 120
    assert [row["clients"] for row in result["attention_rows"]] == [1, 2]
    assert bench.load("serve") is serve


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
    assert main(["chat", video, "--server", "somewhere"]) == 2
    assert "looks like http://" in capsys.readouterr().err
    assert main(["chat", video, "--server", "http://127.0.0.1:9", "--model", "x", "--start", "3"]) == 2
    assert "--model, --start" in capsys.readouterr().err
