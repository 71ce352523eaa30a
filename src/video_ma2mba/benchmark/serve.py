"""Questions about remembered videos over HTTP: requests a second and time to the first token, by clients at once.

A server of the tiny model (or --model) in a process of its own, and clients in another, which ask one question after
another, each with an answer of exactly --tokens tokens:
- by clients: requests a second against one client, which is one question at a time; median time to the first token;
- the same of a Llama of equal size with keys and values of as many tokens as the video, in a loop that likewise takes a
  step for all its rows; without HTTP, which spares it some milliseconds a request;
- `VideoMemory.ask`, one at a time, without HTTP;
- the time to the first token by minutes of video, in turns.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..data.synthetic import make_story
from ..loading import TINY_MODEL
from .machine import describe

QUESTIONS = ("What colour was the circle?", "Which shape came first of all?", "Did a red square ever appear?")
CLIENTS = Path(__file__).with_name("serve_clients.py")
LONGER = 60.0  # seconds that a server may take to start, or to watch a minute of video


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", default=str(TINY_MODEL), help="folder or Hub id (default: the tiny model)")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 8, 32, 64])
    parser.add_argument("--tokens", type=int, default=32, help="of each answer (default: 32)")
    parser.add_argument("--requests", type=int, default=256, help="at each number of clients (default: 256)")
    parser.add_argument("--minutes", type=int, nargs="+", default=[1, 60], help="of the videos asked about")
    parser.add_argument("--repeats", type=int, default=40, help="first tokens timed for each video")
    parser.add_argument("--attention-requests", type=int, default=64, help="of the attention model; 0 leaves it out")


def run(args: argparse.Namespace) -> dict[str, Any]:
    if min(*args.clients, *args.minutes, args.tokens, args.requests, args.repeats) < 1:
        raise ValueError("clients, minutes, tokens, requests and repeats must be at least 1")
    with tempfile.TemporaryDirectory() as folder:
        videos = {m: make_story(seed=1, duration_s=60 * m).render(Path(folder) / f"{m}.mp4") for m in args.minutes}
        with _served(args.model, folder, max(args.clients)) as url:
            ids = {minutes: _remembered(url, video, minutes) for minutes, video in videos.items()}
            first = ids[args.minutes[0]]
            _clients(url, [first], args.tokens, clients=4, requests=8)  # not timed
            rows = [
                {"clients": count, **_clients(url, [first], args.tokens, count, max(args.requests, count))}
                for count in args.clients
            ]
            in_turns = _clients(url, list(ids.values()), args.tokens, 1, args.repeats * len(ids))["by_memory"]
        alone = rows[0]["requests_per_s"] if rows[0]["clients"] == 1 else None
        for row in rows:
            row["times_one_client"] = None if alone is None else row["requests_per_s"] / alone
            del row["by_memory"]
        firsts = [{"minutes": minutes, "first_token_s": in_turns[one]} for minutes, one in ids.items()]
        others = _without_http(args, videos[args.minutes[-1]])
    return {
        "benchmark": "serve",
        "model": Path(args.model).name,
        "tokens": args.tokens,
        "rows": rows,
        "first_token_by_minutes": firsts,
        "first_token_ratio": firsts[-1]["first_token_s"] / firsts[0]["first_token_s"],
        **others,
        "machine": describe("cpu"),
    }


@contextmanager
def _served(model: str, folder: str, slots: int) -> Iterator[str]:
    command = [sys.executable, "-m", "video_ma2mba.cli", "serve", model, "--port", "0", "--device", "cpu"]
    command += ["--memories", f"{folder}/memories", "--allow-media", folder, "--slots", str(slots)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}  # sums of one size, and a core left for the clients
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
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


def _clients(url: str, ids: list[str], tokens: int, clients: int, requests: int) -> dict[str, Any]:
    """What clients in a process of their own measured."""
    task = json.dumps({
        "url": url, "ids": ids, "questions": QUESTIONS, "tokens": tokens, "clients": clients, "requests": requests,
    })  # fmt: skip
    done = subprocess.run([sys.executable, "-P", str(CLIENTS), task], capture_output=True, text=True)
    if done.returncode != 0:
        raise OSError(f"the clients failed:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def _without_http(args: argparse.Namespace, video: Path) -> dict[str, Any]:
    """Requests a second of `ask`, one at a time, and of the attention model, whose rows step together."""
    import torch

    from .. import VideoMa2mbaForConditionalGeneration, VideoMa2mbaProcessor, VideoMemory
    from .memory_of_video import _attention_cache, attention_of_size

    model = VideoMa2mbaForConditionalGeneration.from_pretrained(args.model).eval()
    processor = VideoMa2mbaProcessor.from_pretrained(args.model)
    memory = VideoMemory(model, processor)
    memory.watch(video)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        options = {"max_new_tokens": args.tokens, "min_new_tokens": args.tokens}
        memory.ask(QUESTIONS[0], **options)
        begin = time.perf_counter()
        for _ in range(10):
            memory.ask(QUESTIONS[0], **options)
        result: dict[str, Any] = {"ask_per_s": 10 / (time.perf_counter() - begin)}
        if args.attention_requests:
            attention = attention_of_size(model)
            cache, num_tokens = _attention_cache(attention, model, processor, memory, video)
            ids = processor.tokenizer(f"\n{QUESTIONS[0]}<|assistant|>", return_tensors="pt")["input_ids"]
            result["attention_minutes"], result["attention_tokens"] = args.minutes[-1], num_tokens
            result["attention_rows"] = [
                {"clients": count, "requests_per_s": _attention(attention, cache, ids, args.tokens, count, args)}
                for count in args.clients
            ]
    finally:
        torch.set_num_threads(threads)
    return result


def _attention(attention: Any, cache: Any, ids: Any, tokens: int, clients: int, args: argparse.Namespace) -> float:
    import copy

    import torch

    turns = max(1, args.attention_requests // clients)
    begin = time.perf_counter()
    with torch.no_grad():
        for _ in range(turns):
            own, step = copy.deepcopy(cache), ids.repeat(clients, 1)
            own.batch_repeat_interleave(clients)
            for _ in range(tokens):
                logits = attention(step, past_key_values=own, use_cache=True, logits_to_keep=1).logits
                step = logits[:, -1:].argmax(-1)
    return turns * clients / (time.perf_counter() - begin)
