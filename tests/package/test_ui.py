"""The page, in a real Chromium: upload, absorb, ask, save, load; and errors shown kindly."""

import os
import re
import shutil
import socket
import subprocess
import sys

import pytest

from video_ma2mba.data.synthetic import make_story

CHROMIUM = shutil.which("chromium")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium: apt-get install chromium")


@pytest.fixture(scope="module")
def url(tmp_path_factory):
    """The page, served by the command for the tiny model."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    folder = tmp_path_factory.mktemp("ui")
    command = [sys.executable, "-m", "video_ma2mba.cli", "ui", "--port", str(port), "--memories", str(folder / "kept")]
    environment = {**os.environ, "GRADIO_ANALYTICS_ENABLED": "False", "GRADIO_TEMP_DIR": str(folder / "tmp")}
    served = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    try:
        assert served.stdout.readline().strip() == f"http://127.0.0.1:{port}"
        yield f"http://127.0.0.1:{port}"
    finally:
        served.terminate()
        served.wait()


@pytest.fixture
def page(url):
    from playwright.sync_api import sync_playwright

    flags = ["no-sandbox", "disable-gpu", "disable-background-networking", "disable-component-update", "disable-sync"]
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=[f"--{flag}" for flag in flags])
        opened = browser.new_page(viewport={"width": 1280, "height": 900})
        opened.route(re.compile(r"^https?://(?!127\.0\.0\.1)"), lambda route: route.abort())  # fonts of other hosts
        opened.set_default_timeout(60_000)
        opened.goto(url)
        yield opened
        browser.close()


def click(page, name):
    page.locator(f"#{name}").click()


def test_upload_watch_ask_save_and_load(page, tmp_path):
    from playwright.sync_api import expect

    story = make_story(seed=7, duration_s=60)
    video = story.render(tmp_path / "story.mp4")
    page.locator("#video input[type=file]").set_input_files(str(video))
    expect(page.locator("#video video")).to_be_visible(timeout=60_000)
    click(page, "watch")
    expect(page.locator("#status")).to_contain_text("Watched 60 frames", timeout=60_000)
    expect(page.locator("#status")).to_contain_text("0:59 of video")
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


def test_the_example_is_one_click(page):
    from playwright.sync_api import expect

    click(page, "example")
    expect(page.locator("#video video")).to_be_visible(timeout=60_000)


def test_pictures_near_a_time_come_first():
    from video_ma2mba.ui import nearest

    pictures = [(float(second), None) for second in range(0, 120, 10)]
    assert [time_s for time_s, _ in nearest(pictures, "What was there at 1:12?")][:3] == [70.0, 80.0, 60.0]
    assert [time_s for time_s, _ in nearest(pictures, "And after 30 s?")][:1] == [30.0]
    assert nearest(pictures, "What was there?") == pictures
    assert len(nearest(pictures, "at 0:30")) == len(pictures)
