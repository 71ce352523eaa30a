"""A memory server killed at random moments, again and again: `make torture`."""

import json
import os
import random
import signal
import subprocess
import sys
import threading
import time

import httpx
import pytest

from tests.torture.torture import NUM_KILLS, ROOT
from video_ma2mba import VideoMa2mbaForConditionalGeneration, VideoMa2mbaProcessor, VideoMemory
from video_ma2mba.data.synthetic import make_story
from video_ma2mba.loading import TINY_MODEL

QUESTION = "What colour was the circle?"
OPENING = """
import sys
import video_ma2mba.serving.watching
from video_ma2mba.cli import main
video_ma2mba.serving.watching.FRAMES_BETWEEN_SAVES = 64
sys.exit(main(sys.argv[1:]))"""


def started(folder):
    command = [sys.executable, "-c", OPENING, "serve", str(TINY_MODEL), "--port", "0", "--memories", f"{folder}/kept"]
    served = subprocess.Popen([*command, "--allow-media", str(folder)], stdout=subprocess.PIPE, text=True)
    return served, httpx.Client(base_url=served.stdout.readline().strip(), timeout=60, trust_env=False)


def question(memory_id):
    content = [{"type": "memory", "id": memory_id}, {"type": "text", "text": QUESTION}]
    return {"messages": [{"role": "user", "content": content}], "max_completion_tokens": 8}


def test_killed_before_every_change_on_disk(tmp_path):
    (tmp_path / "kept").mkdir()
    video = make_story(seed=3, duration_s=40).render(tmp_path / "story.mp4")
    command = [sys.executable, "-m", "tests.serving.killed_while_saving", str(TINY_MODEL), str(video)]
    done = subprocess.run([*command, f"{tmp_path}/kept", "1"], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-3000:]
    assert int(done.stdout.split()[1]) > 50


@pytest.mark.parametrize("seed", range(NUM_KILLS))
def test_killed_at_random_moments(tmp_path, seed):
    chance = random.Random(seed)
    videos = [make_story(seed=number, duration_s=900).render(tmp_path / f"{number}.mp4") for number in range(3)]
    model, processor = (
        one.from_pretrained(TINY_MODEL) for one in (VideoMa2mbaForConditionalGeneration, VideoMa2mbaProcessor)
    )
    truth = []
    for video in videos:
        memory = VideoMemory(model.eval(), processor)
        memory.watch(video)
        truth.append(memory.ask(QUESTION, max_new_tokens=8))
    ids = {}
    for _ in range(4):
        served, http = started(tmp_path)
        timer = threading.Timer(chance.uniform(0.1, 3.0), served.send_signal, [signal.SIGKILL])
        timer.start()
        try:
            while True:
                for number, video in enumerate(videos):
                    ids[number] = http.post("/v1/memories", json={"path": str(video)}).json()["id"]
                    http.post("/v1/chat/completions", json=question(ids[number]))
        except (httpx.TransportError, json.JSONDecodeError):
            pass
        served.communicate()
    served, http = started(tmp_path)
    try:
        for number, answer in enumerate(truth):
            memory_id = http.post("/v1/memories", json={"path": str(videos[number])}).json()["id"]
            assert ids.setdefault(number, memory_id) == memory_id  # a slow one was never told before
            while (status := http.get(f"/v1/memories/{memory_id}").json()["status"]) != "ready":
                assert status in ("queued", "watching")
                time.sleep(0.1)
            said = http.post("/v1/chat/completions", json=question(memory_id)).json()
            assert said["choices"][0]["message"]["content"] == answer
        assert sorted(os.listdir(tmp_path / "kept")) == sorted(ids.values())
    finally:
        served.terminate()
        served.communicate()
