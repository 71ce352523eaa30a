"""Memories on disk: never watched twice, whole or absent, gone on with after a kill, shared by several servers."""

import errno
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from tests.killed import CODE
from tests.serving.conftest import asked, serving
from video_ma2mba import VideoMemory
from video_ma2mba.data.synthetic import make_story
from video_ma2mba.serving import memories as memories_module
from video_ma2mba.serving import watching
from video_ma2mba.serving.media import MediaRules
from video_ma2mba.serving.memories import Memories
from video_ma2mba.serving.watching import TooManyVideos


@pytest.fixture
def store(model, processor, tmp_path):
    """Makes stores of one folder; all are closed in the end."""
    made = []

    def make(**rules):
        made.append(Memories(tmp_path / "memories", model, processor, MediaRules((tmp_path,), **rules)))
        return made[-1]

    yield make
    for one in made:
        one.close()


def ensure(store, path, fps=1.0, **rest):
    medium = store.rules.open(str(path))
    piece = {"type": "video", "sha256": medium.sha256, "path": medium.source, "fps": fps, "snapshots_s": []}
    return store.ensure(None, [store.head, {**piece, **rest}], {1: medium}, "a story")


def finish(store, memory_id):
    job = store.job(memory_id)
    return store.load(memory_id) if job is None else job.future.result(60)


def count_watching(monkeypatch):
    real, calls = VideoMemory.watch, []

    def watch(self, source, *args, **kwargs):
        calls.append(kwargs.get("start_s", 0.0))
        return real(self, source, *args, **kwargs)

    monkeypatch.setattr(VideoMemory, "watch", watch)
    return calls


@pytest.fixture
def story(tmp_path):
    return make_story(seed=5, duration_s=40).render(tmp_path / "story.mp4")


def test_the_same_video_is_watched_once(server, video, tmp_path, monkeypatch):
    calls = count_watching(monkeypatch)
    path = make_story(seed=31, duration_s=5).render(server.media / "31.mp4")
    first = server.watch(path)
    named = server.http.post("/v1/memories", json={"path": str(path), "name": "again"})
    assert (named.status_code, named.json()["id"]) == (200, first)
    assert server.http.post("/v1/memories", json={"url": f"file://{path}"}).json()["id"] == first
    assert calls == [0.0]
    faster = server.http.post("/v1/memories", json={"path": str(path), "fps": 2}).json()["id"]
    assert faster != first
    server.wait(faster)
    assert len(calls) == 2
    assert not [one for one in (server.memories.folder / first).iterdir() if one.name.startswith("media")]


def test_over_restarts_too(model, processor, story, tmp_path, monkeypatch):
    answers = set()
    calls = count_watching(monkeypatch)
    for _ in range(2):
        with serving(model, processor, tmp_path / "memories") as server:
            answer = server.openai().chat.completions.create(**asked(server.watch(story), "Why?", max_tokens=5))
            answers.add(answer.choices[0].message.content)
    assert len(calls) == 1
    assert len(answers) == 1


def test_half_watched_videos_are_gone_on_with(store, story, model, processor, monkeypatch):
    """The first server is closed in the middle, and what it kept is where the second begins."""
    monkeypatch.setattr(watching, "FRAMES_BETWEEN_SAVES", 8)
    calls, real = count_watching(monkeypatch), VideoMemory.save_pretrained
    first = store()

    def save(self, folder):
        real(self, folder)
        if self.num_frames >= 16:
            first._closed = True

    monkeypatch.setattr(VideoMemory, "save_pretrained", save)
    memory_id = ensure(first, story)
    job = first.job(memory_id)
    with pytest.raises(watching.Stopped):
        job.future.result(60)
    assert first.describe(memory_id)["status"] == "queued"
    monkeypatch.setattr(VideoMemory, "save_pretrained", real)
    memory = finish(second := store(), memory_id)
    assert calls == [0.0, 16.0]
    assert second.describe(memory_id)["status"] == "ready"
    alone = VideoMemory(model, processor)
    alone.watch(story)
    assert memory.timestamps_s == alone.timestamps_s
    assert memory.ask("Why?", max_new_tokens=8) == alone.ask("Why?", max_new_tokens=8)
    for one, other in zip(memory._cache.layers, alone._cache.layers, strict=True):
        torch.testing.assert_close(one, other)
    assert sorted(path.name for path in (second.folder / memory_id).iterdir()) == ["lock", "memory", "record.json"]


# Where a server is killed; `make torture` kills it at random moments.
PLACES = {
    "watching": ("video_ma2mba:VideoMemory._absorb", 3),
    "saving": ("pathlib:Path.replace", 3),
    "answering": ("video_ma2mba.serving.engine:Engine._write_step", 1),
}
SERVE = f"""
import video_ma2mba.serving.watching
video_ma2mba.serving.watching.FRAMES_BETWEEN_SAVES = 8
{CODE}"""


@pytest.mark.parametrize("place", PLACES)
def test_killed_anywhere_a_server_has_whole_memories_only(
    place, model_folder, model, processor, story, tmp_path, monkeypatch
):
    """The process is killed at a chosen call; a server after it finds each memory whole or absent, and goes on."""
    where, after = PLACES[place]
    folder = tmp_path / "memories"
    command = [sys.executable, "-c", SERVE, str(after), where, "serve", model_folder, "--port", "0"]
    command += ["--memories", str(folder), "--allow-media", str(tmp_path)]
    served = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    import httpx

    url = served.stdout.readline().strip()
    with httpx.Client(base_url=url, timeout=60, trust_env=False) as http:
        try:
            memory_id = http.post("/v1/memories", json={"path": str(story)}).json()["id"]
            while http.get(f"/v1/memories/{memory_id}").json()["status"] != "ready":
                time.sleep(0.05)
            http.post("/v1/chat/completions", json={**asked(memory_id, "Why?"), "model": None})
            served.send_signal(signal.SIGKILL)  # the place was not reached
        except httpx.TransportError:
            pass
    served.communicate(timeout=60)
    assert served.returncode == -9
    with serving(model, processor, folder, rules=MediaRules((tmp_path,))) as server:
        listed = server.http.get("/v1/memories").json()["data"]
        assert {one["status"] for one in listed} <= {"ready", "queued", "watching"}
        memory_id = server.http.post("/v1/memories", json={"path": str(story)}).json()["id"]
        assert [one["id"] for one in listed] in ([], [memory_id])
        server.wait(memory_id)
        alone = VideoMemory(model, processor)
        alone.watch(story)
        answer = server.openai().chat.completions.create(**asked(memory_id, "Why?", max_tokens=8))
        assert answer.choices[0].message.content == alone.ask("Why?", max_new_tokens=8)
        assert not list(folder.glob("incoming-*"))


def test_killed_while_it_saves_a_memory_is_whole_or_absent(model_folder, story, tmp_path):
    """Before every sixth of all operations that change something on disk; `make torture` takes every one."""
    (tmp_path / "kept").mkdir()
    command = [sys.executable, "-m", "tests.serving.killed_while_saving", model_folder, str(story), f"{tmp_path}/kept"]
    done = subprocess.run([*command, "6"], capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert done.returncode == 0, done.stderr[-3000:]
    assert int(done.stdout.split()[1]) > 8


def test_two_servers_share_a_folder(store, story, monkeypatch):
    calls = count_watching(monkeypatch)
    one, other = store(), store()
    ids = {ensure(one, story), ensure(other, story)}
    (memory_id,) = ids
    for each in (one, other):
        finish(each, memory_id)
    assert len(calls) == 1
    one.delete(memory_id)
    with pytest.raises(KeyError):
        other.load(memory_id)


def test_deleted_while_it_is_watched(store, story, monkeypatch):
    monkeypatch.setattr(watching, "YIELD_S", 0.05)
    one = store()
    one.wait_for_turn = time.sleep
    memory_id = ensure(one, story, fps=8.0)
    job = one.job(memory_id)
    while job.done == 0:
        time.sleep(0.01)
    one.delete(memory_id)
    with pytest.raises(watching.Stopped):
        job.future.result(60)
    assert not (one.folder / memory_id).exists()
    with pytest.raises(KeyError):
        one.describe(memory_id)
    assert ensure(one, story, fps=8.0) == memory_id  # and watched anew
    one.wait_for_turn = lambda timeout_s: None
    assert finish(one, memory_id).num_frames == 320


def test_a_video_that_cannot_be_watched_fails_for_good(store, story, tmp_path):
    broken = tmp_path / "broken.mp4"
    broken.write_bytes(story.read_bytes()[:2000])
    one = store()
    memory_id = ensure(one, broken)
    with pytest.raises(ValueError, match="not a video"):
        finish(one, memory_id)
    described = store().describe(memory_id)
    assert described["status"] == "failed"
    assert "not a video" in described["error"]
    assert str(tmp_path) not in described["error"]


def test_whoever_finds_no_job_finds_how_it_ended(store, story, tmp_path, monkeypatch):
    broken, seen = tmp_path / "broken.mp4", []
    broken.write_bytes(story.read_bytes()[:2000])
    one, write = store(), watching.write_json

    def slowly(path, value):
        if "error" in value:
            seen.append(one.job(path.parent.name) is not None)
            seen.append(one.describe(path.parent.name)["status"])
        write(path, value)

    monkeypatch.setattr(watching, "write_json", slowly)
    with pytest.raises(ValueError, match="not a video"):
        finish(one, ensure(one, broken))
    assert seen == [True, "watching"]


def test_a_video_longer_than_it_declares_is_stopped(store, story, monkeypatch):
    monkeypatch.setattr(watching, "check", lambda *args: None)
    one = store(max_duration_s=10.0)
    with pytest.raises(watching.TooLarge, match="longer than the 10 s"):
        finish(one, ensure(one, story))


def test_a_file_that_changed_meanwhile_is_not_taken_for_the_other(store, story, monkeypatch):
    one = store()
    one._closed = True  # nobody watches yet
    memory_id = ensure(one, story)
    one.close()
    make_story(seed=6, duration_s=40).render(story)
    with pytest.raises(ValueError, match="was changed"):
        finish(store(), memory_id)


def test_a_full_disk_fails_a_memory_and_not_the_server(server, tmp_path, monkeypatch):
    path, real = make_story(seed=41, duration_s=5).render(tmp_path / "41.mp4"), VideoMemory.save_pretrained

    def save(self, folder):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(VideoMemory, "save_pretrained", save)
    with open(path, "rb") as file:
        memory_id = server.http.post("/v1/memories", files={"file": file}).json()["id"]
    server.wait(memory_id, "failed")
    assert "no space" in server.http.get(f"/v1/memories/{memory_id}").json()["error"]
    assert server.http.post("/v1/memories", json={"live": True}).status_code == 507
    monkeypatch.setattr(VideoMemory, "save_pretrained", real)
    assert server.watch(path) == memory_id  # another try

    def write(self, blocks, into):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(MediaRules, "keep", write)
    with open(path, "rb") as file:
        answer = server.http.post("/v1/memories", files={"file": file}, data={"fps": "3"})
    assert answer.status_code == 507
    assert answer.json()["error"]["code"] == "no_space"


def test_live_frames_are_watched_as_they_come(server, model, processor, tmp_path):
    from PIL import Image

    frames = make_story(seed=51, duration_s=6).frames()
    urls, loaded = [], []
    for number, frame in enumerate(frames):
        path = tmp_path / f"{number}.png"
        Image.fromarray(frame).save(path)
        loaded.append(processor.video_processor.load_image(path))
        urls.append("data:image/png;base64," + __import__("base64").b64encode(path.read_bytes()).decode())
    memory_id = server.http.post("/v1/memories", json={"live": True, "name": "camera"}).json()["id"]
    for part in (urls[:2], urls[2:]):
        answer = server.http.post(f"/v1/memories/{memory_id}/frames", json={"frames": part})
        assert answer.status_code == 200, answer.text
    assert answer.json()["num_frames"] == 6
    alone = VideoMemory(model, processor)
    alone.push_frames(torch.cat(loaded))
    said = server.openai().chat.completions.create(**asked(memory_id, "Why?", max_tokens=8))
    assert said.choices[0].message.content == alone.ask("Why?", max_new_tokens=8)
    for body, status in (
        ({"frames": []}, 400), ({"frames": ["/etc/passwd"]}, 400), ({"frames": ["data:image/png;base64,AAAA"]}, 400),
        ({"frames": urls[:1], "timestamps_s": [0.0]}, 400),
    ):  # fmt: skip
        assert server.http.post(f"/v1/memories/{memory_id}/frames", json=body).status_code == status
    assert server.http.get(f"/v1/memories/{memory_id}").json()["num_frames"] == 6


def test_progress_is_told_as_events(server, tmp_path):
    path = make_story(seed=61, duration_s=30).render(tmp_path / "61.mp4")
    with open(path, "rb") as file:
        memory_id = server.http.post("/v1/memories", files={"file": file}).json()["id"]
    with server.http.stream("GET", f"/v1/memories/{memory_id}/events") as stream:
        told = [line.removeprefix("data: ") for line in stream.iter_lines() if line]
    assert told[-1] == "[DONE]"
    assert json.loads(told[-2])["status"] == "ready"
    assert json.loads(told[-2])["num_frames"] == 30


def test_the_place_to_wait_is_bounded(store, story, monkeypatch):
    monkeypatch.setattr(watching, "MAX_WAITING", 2)
    one = store()
    one.wait_for_turn = time.sleep
    for fps in (1.0, 2.0):
        ensure(one, story, fps=fps)
    with pytest.raises(TooManyVideos):
        ensure(one, story, fps=3.0)


def test_held_memories_are_bounded(store, story, tmp_path, monkeypatch):
    one = store()
    ids = [ensure(one, story, fps=fps) for fps in (1.0, 0.5, 0.25)]
    size = max(finish(one, memory_id).num_bytes for memory_id in ids)
    monkeypatch.setattr(memories_module, "MAX_LOADED_BYTES", 2 * size)
    one.load(ids[0])
    one._hold(ids[0], one.load(ids[0]), one._saved_at(ids[0]))
    assert len(one._loaded) == 2
    assert all(one.load(memory_id).num_frames for memory_id in ids)


def test_leftovers_are_removed(store, tmp_path):
    folder = tmp_path / "memories"
    old = time.time() - 10**6
    for name in (".deleted-x", "0" * 32, "other"):
        (folder / name).mkdir(parents=True)
    (folder / "incoming-old").write_bytes(b"x")
    (folder / "incoming-new").write_bytes(b"x")
    for name in ("0" * 32, "incoming-old"):
        os.utime(folder / name, (old, old))
    store()
    assert sorted(path.name for path in folder.iterdir()) == ["incoming-new", "other"]
