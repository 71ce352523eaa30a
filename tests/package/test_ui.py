"""The page: what its buttons do, the command that serves it, and all of it in a real Chromium where there is one."""

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import urllib.request

import gradio as gr
import pytest

from video_ma2mba import VideoMemory
from video_ma2mba.cli import main
from video_ma2mba.data.synthetic import make_story
from video_ma2mba.ui import Page, nearest

CHROMIUM = shutil.which("chromium")
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium: apt-get install chromium")


@pytest.fixture(scope="module")
def url(tmp_path_factory):
    """The page, served by the command for the tiny model."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    folder = tmp_path_factory.mktemp("ui")
    command = [sys.executable, "-m", "video_ma2mba.cli", "ui", "--port", str(port), "--memories", str(folder / "kept")]
    environment = {**os.environ, "GRADIO_ANALYTICS_ENABLED": "False", "GRADIO_TEMP_DIR": str(folder / "tmp")}
    served = subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, env=environment,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a test run in the background ignores it
    )  # fmt: skip
    try:
        assert served.stdout.readline().strip() == f"http://127.0.0.1:{port}"
        yield f"http://127.0.0.1:{port}"
    finally:
        served.send_signal(signal.SIGINT)
        served.communicate()


@pytest.fixture
def buttons(model, processor, tmp_path):
    return Page(model, processor, tmp_path / "kept", example=True)


def test_buttons_watch_ask_save_and_load(buttons, video):
    *moves, (memory, pictures, status, chart, line, talk) = buttons.watch(video, 1.0)
    assert moves
    assert all("frames per second" in move[2] for move in moves)
    assert memory.num_frames == 10
    assert status.startswith("Watched in")
    assert "10 frames up to 0:09" in status
    assert set(chart["MiB"]) == {memory.num_bytes / 2**20}
    assert [caption for _, caption in line] == [f"0:{time_s:02.0f}" for time_s, _ in pictures]
    *pieces, (talk, question, line) = buttons.ask(memory, pictures, "What was at 0:05?", talk)
    assert [turn["role"] for turn in talk] == ["user", "assistant"]
    assert talk[-1]["content"].strip() == memory.dialogue[-1]["content"]
    assert pieces
    assert question == ""
    assert line[0][1] == "0:05"
    assert buttons.save(memory, "my video").startswith("Saved as my video:")
    loaded, _, status, _, _, said = buttons.load("my video")
    assert status.startswith("Loaded my video:")
    assert loaded.num_frames == 10
    assert said == memory.dialogue


def test_the_page_has_a_handler_for_each_button(buttons):
    named = {block.elem_id for block in buttons.build().blocks.values()} - {None}
    handlers = {handler.fn.__name__ for handler in buttons.build().fns.values()}
    assert handlers == {"watch", "make_example", "ask", "save", "load"}
    assert {"watch", "example", "ask", "save", "load"} <= named


def test_the_example_is_a_story_of_a_minute(buttons):
    made = VideoMemory(buttons.model, buttons.processor)
    made.watch(buttons.make_example())
    assert made.num_frames == 60


def test_what_goes_wrong_is_said_on_the_page(buttons, video, tmp_path):
    text = tmp_path / "text.mp4"
    text.write_text("no video")
    memory = VideoMemory(buttons.model, buttons.processor)
    memory.watch(video)
    for button, message in (
        (lambda: list(buttons.watch(None, 1.0)), "Drop a video first"),
        (lambda: list(buttons.watch(str(text), 1.0)), "not a video"),
        (lambda: list(buttons.ask(None, [], "What?", [])), "no memory yet"),
        (lambda: list(buttons.ask(memory, [], " ", [])), "Type a question"),
        (lambda: list(buttons.ask(memory, [], "word " * 20_000, [])), "tokens"),
        (lambda: buttons.save(None, "a"), "no memory to save"),
        (lambda: buttons.save(memory, "../a"), "Give the memory a name of letters"),
        (lambda: buttons.load("../a"), "Give the memory a name of letters"),
        (lambda: buttons.load("nothing"), "no video memory there"),
    ):
        with pytest.raises(gr.Error, match=message):
            button()


def test_the_command_serves_the_page(url):
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    assert "Video-Ma²mba" in opener.open(url, timeout=60).read().decode()


def test_without_gradio_the_command_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "gradio", None)
    assert main(["ui"]) == 2
    assert "pip install 'video-ma2mba[ui]'" in capsys.readouterr().err


@pytest.fixture
def page(url):
    from playwright.sync_api import sync_playwright

    flags = ["no-sandbox", "disable-gpu", "disable-background-networking", "disable-component-update", "disable-sync"]
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=[f"--{flag}" for flag in flags])
        page = browser.new_page(viewport={"width": 1280, "height": 900})
        page.route(re.compile(r"^https?://(?!127\.0\.0\.1)"), lambda route: route.abort())  # fonts of other hosts
        page.set_default_timeout(60_000)
        page.goto(url)
        yield page
        browser.close()


def click(page, name):
    page.locator(f"#{name}").click()


@needs_chromium
def test_upload_watch_ask_save_and_load(page, tmp_path):
    from playwright.sync_api import expect

    story = make_story(seed=7, duration_s=60)
    video = story.render(tmp_path / "story.mp4")
    page.locator("#video input[type=file]").set_input_files(str(video))
    expect(page.locator("#video video")).to_be_visible(timeout=60_000)
    click(page, "watch")
    expect(page.locator("#status")).to_contain_text("60 frames up to 0:59", timeout=60_000)
    expect(page.locator("#timeline img").first).to_be_visible()
    page.locator("#question textarea").fill("What colour was the circle?")
    click(page, "ask")
    expect(page.locator("#talk")).to_contain_text(story.circle.colour, timeout=60_000)
    if picture := os.environ.get("SCREENSHOT"):
        page.screenshot(path=picture, full_page=True)
    page.locator("#name textarea, #name input").fill("story")
    click(page, "save")
    expect(page.locator("#status")).to_contain_text("Saved as story")

    page.reload()
    expect(page.locator("#status")).to_contain_text("Nothing watched yet")
    page.locator("#name textarea, #name input").fill("story")
    click(page, "load")
    expect(page.locator("#status")).to_contain_text("Loaded story")
    expect(page.locator("#talk")).to_contain_text(story.circle.colour)  # the talk is part of the memory
    page.locator("#question textarea").fill("Which shape came last of all?")
    click(page, "ask")
    expect(page.locator("#talk")).to_contain_text(story.scenes[-1].shape, timeout=60_000)


@needs_chromium
def test_errors_are_shown(page):
    from playwright.sync_api import expect

    for button, message in (
        ("watch", "Drop a video first"),
        ("ask", "There is no memory yet"),
        ("save", "There is no memory to save"),
    ):
        click(page, button)
        expect(page.get_by_text(message).first).to_be_visible()
    page.locator("#name textarea, #name input").fill("../../etc")
    click(page, "load")
    expect(page.get_by_text("Give the memory a name of letters").first).to_be_visible()


@needs_chromium
def test_the_example_is_one_click(page):
    from playwright.sync_api import expect

    click(page, "example")
    expect(page.locator("#video video")).to_be_visible(timeout=60_000)


def test_pictures_near_a_time_come_first():
    pictures = [(float(second), None) for second in range(0, 120, 10)]
    assert [time_s for time_s, _ in nearest(pictures, "What was there at 1:12?")][:3] == [70.0, 80.0, 60.0]
    assert [time_s for time_s, _ in nearest(pictures, "And after 30 s?")][:1] == [30.0]
    assert nearest(pictures, "What was there?") == pictures
    assert len(nearest(pictures, "at 0:30")) == len(pictures)
