"""What people are shown of a memory: pictures of the real video, the video itself, a name, a file to take away; and
what can be asked while it is still being watched."""

import io
import json
import threading
import time
import zipfile
from itertools import pairwise
from pathlib import Path

import av
import httpx
import numpy as np
import pytest
from PIL import Image

from tests.serving.conftest import asked, break_off_uploads, serving
from video_ma2mba import VideoMemory
from video_ma2mba.data.synthetic import make_story
from video_ma2mba.serving.media import MediaRules


@pytest.fixture(scope="module")
def keeping(model, processor, tmp_path_factory):
    """A server that keeps the videos, as that of the page does."""
    folder = tmp_path_factory.mktemp("keeping")
    rules = MediaRules((folder,), max_bytes=2**24)
    with serving(model, processor, folder / "memories", rules=rules, keeps_videos=True) as served:
        served.folder = folder
        yield served


@pytest.fixture(scope="module")
def story(tmp_path_factory):
    """A minute, in pictures that are larger than what any model here is shown."""
    return str(make_story(seed=5, duration_s=60, size=320).render(tmp_path_factory.mktemp("film") / "film.mp4"))


def decoded(path):
    """Seconds and pixels of every frame, by PyAV alone."""
    with av.open(path) as container:
        return [(float(frame.time), frame.to_ndarray(format="rgb24")) for frame in container.decode(video=0)]


def difference(one, other):
    return np.abs(np.asarray(one, dtype=float) - np.asarray(other, dtype=float)).mean()


@pytest.mark.parametrize(("start_s", "end_s"), [(0.0, 60.0), (20.0, 35.0)])
def test_stills_are_of_the_video_itself_in_order_and_spread_evenly(keeping, story, start_s, end_s):
    part = {} if end_s == 60.0 else {"start_s": start_s, "end_s": end_s}
    memory_id = keeping.watch(story, stills=True, **part)
    shown = keeping.http.get(f"/v1/memories/{memory_id}/stills").json()
    times_s, (width, height) = shown["times_s"], (shown["width"], shown["height"])
    assert (shown["start_s"], shown["end_s"]) == (start_s, end_s)
    assert width == height == 270
    assert len(times_s) == 24
    step = (end_s - start_s) / 24
    assert all(abs(time_s - (start_s + number * step)) <= 0.25 for number, time_s in enumerate(times_s))
    assert all(one <= other for one, other in pairwise(times_s))
    frames = decoded(story)
    for number in (0, 11, 23):
        answer = keeping.http.get(f"/v1/memories/{memory_id}/stills/{number}")
        assert answer.headers["content-type"] == "image/jpeg"
        picture = Image.open(io.BytesIO(answer.content))
        assert picture.size == (width, height)
        at = min(range(len(frames)), key=lambda place: abs(frames[place][0] - times_s[number]))
        reference = Image.fromarray(frames[at][1]).resize((width, height), Image.Resampling.BICUBIC)
        assert difference(picture, reference) < 4
        other = next(pixels for _, pixels in frames if difference(pixels, frames[at][1]) > 20)
        assert difference(picture, Image.fromarray(other).resize((width, height))) > 10
    assert keeping.http.get(f"/v1/memories/{memory_id}/stills/24").status_code == 404
    assert keeping.http.get(f"/v1/memories/{memory_id}").json()["num_frames"] == end_s - start_s


def test_a_part_of_a_video_is_what_watch_sees_of_it(keeping, story, model, processor):
    memory_id = keeping.watch(story, start_s=12, end_s=31, fps=2)
    alone = VideoMemory(model, processor)
    alone.watch(story, 2.0, start_s=12.0, end_s=31.0)
    answer = keeping.http.post("/v1/chat/completions", json=asked(memory_id, "Why?", max_completion_tokens=16)).json()
    assert answer["choices"][0]["message"]["content"] == alone.ask("Why?", max_new_tokens=16)
    assert memory_id != keeping.watch(story, start_s=12, fps=2)
    for wrong, said in (
        ({"start_s": 9, "end_s": 9}, "end_s: must lie after start_s"), ({"start_s": -1}, "start_s"),
        ({"start_s": 90, "stills": True}, "lies beyond the end of the video, which lasts 60.000"),
    ):  # fmt: skip
        with open(story, "rb") as file:
            answer = keeping.http.post("/v1/memories", files={"file": ("a.mp4", file)}, data=wrong)
        assert answer.status_code == 400
        assert said in answer.json()["error"]["message"]
        assert "incoming" not in answer.text
    assert not list((keeping.folder / "memories").glob("incoming-*"))


def test_a_video_is_given_in_the_parts_that_are_asked_for(keeping, story):
    memory_id = keeping.watch(story)
    whole, folder = Path(story).read_bytes(), keeping.folder / "memories" / memory_id
    (folder / "video").unlink()
    assert keeping.http.get(f"/v1/memories/{memory_id}/video").status_code == 404
    assert keeping.watch(story) == memory_id  # it comes again, and is kept
    assert not list(folder.glob("media-*"))
    video = f"/v1/memories/{memory_id}/video"
    answer = keeping.http.get(video)
    assert (answer.status_code, answer.content) == (200, whole)
    assert answer.headers["content-type"] == "video/mp4"
    assert "sandbox" in answer.headers["content-security-policy"]
    size = len(whole)
    for wanted, first, last in (
        ("bytes=0-", 0, min(size, 2**20) - 1), ("bytes=10-19", 10, 19), (f"bytes={size - 5}-", size - 5, size - 1),
        ("bytes=-7", size - 7, size - 1), (f"bytes=5-{10**17}", 5, min(size, 5 + 2**20) - 1),
        (f"bytes=-{10**17}", 0, min(size, 2**20) - 1),
    ):  # fmt: skip
        answer = keeping.http.get(video, headers={"range": wanted})
        assert answer.status_code == 206
        assert answer.headers["content-range"] == f"bytes {first}-{last}/{size}"
        assert answer.content == whole[first : last + 1]
    for wanted in (f"bytes={size}-", "bytes=9-5", "bytes=-0", "bytes=-", "bytes=a-b", "lines=1-2", "bytes=1-2,4-5"):
        answer = keeping.http.get(video, headers={"range": wanted})
        assert answer.status_code == 416, wanted
        assert answer.headers["content-range"] == f"bytes */{size}"


def test_a_video_that_clients_name_is_shown_while_it_is_there(keeping, story):
    path = keeping.folder / "named.mp4"
    path.write_bytes(Path(story).read_bytes()[:-1])
    body = {"path": str(path), "stills": True}
    memory_id = keeping.wait(keeping.http.post("/v1/memories", json=body).json()["id"])
    video = f"/v1/memories/{memory_id}/video"
    assert keeping.http.get(video).content == path.read_bytes()
    assert keeping.http.get(video, headers={"range": "bytes=1-2"}).content == path.read_bytes()[1:3]
    path.write_bytes(b"another film")
    assert keeping.http.get(video).status_code == 404
    path.unlink()
    assert keeping.http.get(video).status_code == 404
    assert len(keeping.http.get(f"/v1/memories/{memory_id}/stills").json()["times_s"]) == 24


def test_a_server_that_keeps_no_videos_has_the_stills_still(server, video):
    memory_id = server.watch(video, stills=True)
    assert server.http.get(f"/v1/memories/{memory_id}").json()["has_stills"]
    assert server.http.get(f"/v1/memories/{memory_id}/video").status_code == 404
    assert server.http.get(f"/v1/memories/{memory_id}/stills/0").status_code == 200
    assert not list((server.memories.folder / memory_id).glob("media-*"))
    assert not (server.memories.folder / memory_id / "video").exists()
    live = server.http.post("/v1/memories", json={"live": True}).json()["id"]
    for what in ("video", "stills", "stills/0"):
        assert server.http.get(f"/v1/memories/{live}/{what}").status_code == 404
    assert server.http.post("/v1/memories", json={"live": True, "stills": True}).status_code == 400


def test_pictures_may_be_asked_for_later(server, video):
    memory_id = server.watch(video, fps=1.5)
    assert server.http.get(f"/v1/memories/{memory_id}/stills").status_code == 404
    assert server.watch(video, fps=1.5, stills=True) == memory_id
    assert server.http.get(f"/v1/memories/{memory_id}/stills").status_code == 200
    assert not list(server.memories.folder.glob("incoming-*"))


def test_a_memory_is_called_otherwise_and_stays_where_it_is(keeping, story, video):
    first, second = keeping.watch(video), keeping.watch(story)
    listed = [one["id"] for one in keeping.http.get("/v1/memories").json()["data"]]
    answer = keeping.http.patch(f"/v1/memories/{first}", json={"name": " Ämter & <b>Orte</b> "})
    assert answer.json()["name"] == "Ämter & <b>Orte</b>"
    assert keeping.http.get(f"/v1/memories/{first}").json()["name"] == "Ämter & <b>Orte</b>"
    assert [one["id"] for one in keeping.http.get("/v1/memories").json()["data"]] == listed
    for body in ({"name": ""}, {"name": "  "}, {"name": "a" * 201}, {}, {"name": "a", "path": "/"}):
        assert keeping.http.patch(f"/v1/memories/{second}", json=body).status_code == 400
    assert keeping.http.patch(f"/v1/memories/{'0' * 32}", json={"name": "a"}).status_code == 404
    assert keeping.http.patch("/v1/memories/..", json={"name": "a"}).status_code in (404, 405)


def test_an_exported_memory_is_one_for_everybody(keeping, story, model, processor, tmp_path):
    memory_id = keeping.watch(story)
    keeping.http.patch(f"/v1/memories/{memory_id}", json={"name": "a/b: film"})
    answer = keeping.http.get(f"/v1/memories/{memory_id}/export")
    assert answer.headers["content-disposition"] == 'attachment; filename="a-b-film-memory.zip"'
    with zipfile.ZipFile(io.BytesIO(answer.content)) as archive:
        archive.extractall(tmp_path)
    assert str(keeping.folder) not in (tmp_path / "video_memory.json").read_text()
    taken, alone = VideoMemory.from_pretrained(tmp_path, model, processor), VideoMemory(model, processor)
    alone.watch(story)
    assert taken.ask("Why?", max_new_tokens=16) == alone.ask("Why?", max_new_tokens=16)
    assert not list((keeping.folder / "memories").glob("incoming-*"))


def test_a_video_is_asked_about_while_it_is_watched(keeping, tmp_path, model, processor):
    video = make_story(seed=11, duration_s=24).render(tmp_path / "story.mp4")
    go_on, real = threading.Event(), keeping.memories.wait_for_turn
    keeping.memories.wait_for_turn = lambda timeout_s: go_on.wait(60)
    try:
        with open(video, "rb") as file:
            memory_id = keeping.http.post("/v1/memories", files={"file": ("a.mp4", file)}).json()["id"]
        until = time.monotonic() + 30
        while not keeping.http.get(f"/v1/memories/{memory_id}").json()["progress"]["num_frames"]:
            assert time.monotonic() < until
            time.sleep(0.02)
        seen = keeping.http.get(f"/v1/memories/{memory_id}").json()["progress"]["num_frames"]
        assert seen < 24
        alone = VideoMemory(model, processor)
        alone.watch(video, end_s=float(seen))
        body = asked(memory_id, "Why?", max_completion_tokens=16)
        body["messages"][0]["content"][0]["so_far"] = True
        said = [keeping.http.post("/v1/chat/completions", json=body).json()["choices"][0]["message"]["content"]]
        assert said == [alone.ask("Why?", max_new_tokens=16)]
        assert keeping.http.get(f"/v1/memories/{memory_id}/export").status_code == 409
        # another one waits for its turn: nothing of it was seen
        other = make_story(seed=12, duration_s=6).render(tmp_path / "other.mp4")
        with open(other, "rb") as file:
            other_id = keeping.http.post("/v1/memories", files={"file": ("b.mp4", file)}).json()["id"]
        body["messages"][0]["content"][0]["id"] = other_id
        answer = keeping.http.post("/v1/chat/completions", json=body)
        assert (answer.status_code, answer.json()["error"]["code"]) == (409, "nothing_seen")
    finally:
        go_on.set()
        keeping.memories.wait_for_turn = real
    body["messages"][0]["content"][0]["id"] = keeping.wait(memory_id)
    whole = keeping.http.post("/v1/chat/completions", json=body).json()["choices"][0]["message"]["content"]
    alone = VideoMemory(model, processor)
    alone.watch(video)
    assert whole == alone.ask("Why?", max_new_tokens=16)
    body["messages"][0]["content"][0]["at_s"] = 3
    assert "so_far: goes without at_s" in keeping.http.post("/v1/chat/completions", json=body).text
    keeping.wait(other_id)


def test_a_film_whose_sender_has_gone_is_not_watched(keeping, tmp_path, monkeypatch):
    """He went away while the server looked through it."""
    from video_ma2mba.serving import app

    real, looking, gone = app.stills_of, threading.Event(), threading.Event()

    def slow(*args):
        looking.set()
        assert gone.wait(30)
        return real(*args)

    monkeypatch.setattr(app, "stills_of", slow)
    video = make_story(seed=13, duration_s=5).render(tmp_path / "gone.mp4")
    before = keeping.http.get("/v1/memories?limit=1000").json()["data"]

    def send():
        with open(video, "rb") as file, httpx.Client(base_url=keeping.url, timeout=0.5, trust_env=False) as client:
            client.post("/v1/memories", files={"file": ("a.mp4", file)}, data={"stills": "true"})

    with pytest.raises(httpx.ReadTimeout):
        send()
    assert looking.wait(10)
    gone.set()
    assert keeping.idle()
    assert keeping.http.get("/v1/memories?limit=1000").json()["data"] == before
    assert not list((keeping.folder / "memories").glob("incoming-*"))


def test_an_upload_that_is_broken_off_leaves_nothing_and_no_traceback(keeping, caplog):
    break_off_uploads(keeping.url)
    assert keeping.idle()
    assert not list((keeping.folder / "memories").glob("incoming-*"))
    assert [record.getMessage() for record in caplog.records if record.levelname == "ERROR"] == []


def test_what_a_page_says_of_the_model(keeping, story, model):
    about = keeping.http.get("/v1/about").json()
    memory = keeping.memories.load(keeping.watch(story))
    assert about["memory_bytes"] == memory.num_bytes
    config = model.config.text_config
    keys_and_values = 2 * config.num_hidden_layers * config.hidden_size * 4  # float32
    assert about["attention_bytes_per_token"] == keys_and_values
    assert about["id"] == "tiny"
    assert about["knows"] == ""
    assert about["tokens_per_frame"] == model.config.tokens_per_frame
    assert about["max_bytes"] == 2**24


def test_a_key_may_come_as_a_cookie(model, processor, tmp_path):
    with serving(model, processor, tmp_path / "memories", keys=("open;sesame", "other")) as served:
        for cookie, status in (
            ("video_ma2mba_key=open%3Bsesame", 200), ("a=b; video_ma2mba_key=other", 200),
            ("video_ma2mba_key=wrong", 401), ("video_ma2mba_key=", 401), ("other", 401), ("", 401),
        ):  # fmt: skip
            assert served.http.get("/v1/about", headers={"cookie": cookie}).status_code == status, cookie
        wrong = {"authorization": "Bearer no", "cookie": "video_ma2mba_key=other"}
        assert served.http.get("/v1/about", headers=wrong).status_code == 401


def test_records_of_before_are_described_too(keeping, story):
    """Those of an older server lack what is told now."""
    memory_id = keeping.watch(story)
    path = keeping.folder / "memories" / memory_id / "record.json"
    record = json.loads(path.read_text())
    assert "start_s" not in record["pieces"][-1]
    assert keeping.http.get(f"/v1/memories/{memory_id}").json()["start_s"] == 0.0
