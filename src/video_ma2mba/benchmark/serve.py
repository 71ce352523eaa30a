"""Questions about remembered videos over HTTP: requests a second and time to the first token, by clients at once.

A server of the tiny model (or --model) in a process of its own, and clients in another, which ask one question after
another, each with an answer of exactly --tokens tokens:
- by clients: requests a second against one client, which is one question at a time; median time to the first token;
- the same in the same server and loop, where a Llama of equal size answers from keys and values of the longest video;
- `VideoMemory.ask`, one at a time, without HTTP;
- the time to the first token by minutes of video, in turns.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from ..data.synthetic import make_story
from ..loading import TINY_MODEL, find_model, natural
from .machine import clock, describe, one_thread, said_by

QUESTIONS = ("What colour was the circle?", "Which shape came first of all?", "Did a red square ever appear?")
CLIENTS = Path(__file__).with_name("serve_clients.py")
LONGER = 60.0  # seconds that a server may take to start, or to watch a minute of video


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", default=str(TINY_MODEL), help="folder or Hub id (default: the tiny model)")
    parser.add_argument("--clients", type=natural, nargs="+", default=[1, 8, 32, 64])
    parser.add_argument("--tokens", type=natural, default=32, help="of each answer (default: 32)")
    parser.add_argument("--requests", type=natural, default=256, help="at each number of clients (default: 256)")
    parser.add_argument("--minutes", type=natural, nargs="+", default=[1, 60], help="of the videos asked about")
    parser.add_argument("--repeats", type=natural, default=40, help="first tokens timed for each video")
    parser.add_argument(
        "--attention-requests", type=natural, default=64, help="the same of the attention model (default: 64)"
    )


def run(args: argparse.Namespace) -> dict[str, Any]:
    args.model = find_model(args.model)
    with tempfile.TemporaryDirectory() as folder:
        videos = {m: make_story(seed=1, duration_s=60 * m).render(Path(folder) / f"{m}.mp4") for m in args.minutes}
        slots, memories, longest = str(max(args.clients)), f"{folder}/memories", args.minutes[-1]
        ours = ["video_ma2mba.cli", "serve", args.model, "--port", "0", "--device", "cpu", "--slots", slots]
        with _served(*ours, "--memories", memories, "--allow-media", folder) as url:
            ids = {minutes: _remembered(url, video, minutes) for minutes, video in videos.items()}
            rows = _by_clients(url, ids[longest], args, args.requests)
            in_turns = _clients(url, list(ids.values()), args.tokens, 1, args.repeats * len(ids))["by_memory"]
        firsts = [{"minutes": minutes, "first_token_s": in_turns[one]} for minutes, one in ids.items()]
        theirs = ["video_ma2mba.benchmark.serve_attention", str(videos[longest]), args.model, memories, slots]
        with _served(*theirs) as url:
            attention_rows = _by_clients(url, ids[longest], args, args.attention_requests)
        ask_per_s = _one_at_a_time(args, videos[longest])
    return {
        "benchmark": "serve",
        "model": Path(args.model).name,
        "tokens": args.tokens,
        "minutes": longest,
        "rows": rows,
        "attention_rows": attention_rows,
        "ask_per_s": ask_per_s,
        "first_token_by_minutes": firsts,
        "first_token_ratio": firsts[-1]["first_token_s"] / firsts[0]["first_token_s"],
        "machine": describe("cpu"),
    }


@contextmanager
def _served(*arguments: str) -> Iterator[str]:
    """The address of a server in a process of its own."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}  # sums of one size, and a core left for the clients
    server = subprocess.Popen(
        [sys.executable, "-P", "-m", *arguments], stdout=subprocess.PIPE, text=True, env=environment
    )
    try:
        assert server.stdout is not None
        url = server.stdout.readline().strip()
        if not url:
            raise OSError("the server did not start; what it said stands above")
        yield url
    finally:
        server.terminate()
        server.communicate()


def _remembered(url: str, video: Path, minutes: int) -> str:
    from ..serving.client import Server

    server = Server(url)
    return server.wait(server.remember(path=str(video.resolve()))["id"], timeout_s=LONGER * (1 + minutes))["id"]


def _by_clients(url: str, memory_id: str, args: argparse.Namespace, requests: int) -> list[dict[str, Any]]:
    """What each number of clients measured."""
    rows: list[dict[str, Any]] = []
    for count in args.clients:
        _clients(url, [memory_id], args.tokens, count, requests=2 * count)  # not timed
        row = {"clients": count, **_clients(url, [memory_id], args.tokens, count, max(requests, count))}
        del row["by_memory"]
        alone = rows[0] if rows else row
        row["times_one_client"] = row["requests_per_s"] / alone["requests_per_s"] if alone["clients"] == 1 else None
        rows.append(row)
    return rows


def _clients(url: str, ids: list[str], tokens: int, clients: int, requests: int) -> dict[str, Any]:
    """What clients in a process of their own measured."""
    task = json.dumps({
        "url": url, "ids": ids, "questions": QUESTIONS, "tokens": tokens, "clients": clients, "requests": requests,
    })  # fmt: skip
    return said_by("-P", CLIENTS, task)


def _one_at_a_time(args: argparse.Namespace, video: Path) -> float:
    """Requests a second of `ask`, without HTTP."""
    from .. import VideoMa2mbaForConditionalGeneration, VideoMa2mbaProcessor, VideoMemory

    memory = VideoMemory(
        VideoMa2mbaForConditionalGeneration.from_pretrained(args.model).eval(),
        VideoMa2mbaProcessor.from_pretrained(args.model),
    )
    memory.watch(video)
    ask = partial(memory.ask, QUESTIONS[0], max_new_tokens=args.tokens, min_new_tokens=args.tokens)
    with one_thread():
        ask()
        return 10 / clock(lambda: [ask() for _ in range(10)], "cpu").seconds
