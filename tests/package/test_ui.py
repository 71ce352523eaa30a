"""The page in a real Chromium, where there is one: at three widths, by day and by night, and what goes wrong."""

import re
import shutil
import threading
from pathlib import Path

import pytest

from tests.serving.conftest import running
from video_ma2mba.data.synthetic import make_story
from video_ma2mba.loading import TINY_MODEL, load_model
from video_ma2mba.page import add_page, build_forwarding_app
from video_ma2mba.processing.processing_video_ma2mba import VideoMa2mbaProcessor
from video_ma2mba.serving.app import Settings, build_app
from video_ma2mba.serving.client import Server
from video_ma2mba.serving.media import MediaRules

CHROMIUM = shutil.which("chromium")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium: apt-get install chromium")
FLAGS = ["no-sandbox", "disable-gpu", "disable-background-networking", "disable-component-update", "disable-sync"]
WIDTHS, SCHEMES = {390: 844, 1280: 800, 1600: 900}, ("light", "dark")
STORY = make_story(seed=7, duration_s=60, size=160)
# What is on the page: everything that can be used has a name, no text is cut at the side, all can be read.
LOOK = Path(__file__).with_name("look_at_page.js").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def tiny():
    return load_model(str(TINY_MODEL), "auto", None), VideoMa2mbaProcessor.from_pretrained(str(TINY_MODEL))


def build(tiny, folder, **settings):
    rules = MediaRules(max_bytes=2**22)
    given = {"name": "video-ma2mba-tiny", "memories": folder, "rules": rules, "keeps_videos": True, **settings}
    return add_page(build_app(*tiny, Settings(**given)))


@pytest.fixture(scope="module")
def served(tiny, tmp_path_factory):
    guard = build(tiny, tmp_path_factory.mktemp("kept"))
    with running(guard) as url:
        guard.url = url
        yield guard


@pytest.fixture(scope="module")
def film(tmp_path_factory):
    return str(STORY.render(tmp_path_factory.mktemp("film") / "film.mp4"))


@pytest.fixture(scope="module")
def chromium():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=[f"--{flag}" for flag in FLAGS])
        yield browser
        browser.close()


@pytest.fixture
def visit(chromium, caplog):
    """Opens pages; in the end, none of them had an error, or asked another host, and no server had one."""
    from playwright.sync_api import expect

    contexts, wrong = [], []

    def open_page(url, width=1280, scheme="light"):
        options = {"viewport": {"width": width, "height": WIDTHS[width]}, "color_scheme": scheme}
        contexts.append(chromium.new_context(**options, permissions=["clipboard-read", "clipboard-write"]))
        page = contexts[-1].new_page()
        page.set_default_timeout(30_000)  # a busy machine is no error
        expect.set_options(timeout=30_000)
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("request", lambda asked: wrong.extend(
            [asked.url] * (not asked.url.startswith((url.partition("#")[0], "blob:", "data:")))
        ))  # fmt: skip
        page.goto(url)
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert wrong == []
    assert [record for record in caplog.records if record.levelname in ("ERROR", "CRITICAL")] == []


def is_view(page, name):
    from playwright.sync_api import expect

    expect(page.locator("body")).to_have_attribute("data-view", re.compile(name), timeout=30_000)


def watch(page, film, expected="ready"):
    page.locator("#main").wait_for()  # before that a person sees no place for a file
    page.locator("#file").set_input_files(film)
    page.locator("#watch").click()
    is_view(page, expected)


def ask(page, question):
    """The answer to a question that is typed and sent with Enter."""
    before = page.locator(".answer").count()
    page.locator("#question").fill(question)
    page.locator("#question").press("Enter")
    page.wait_for_function("n => document.querySelectorAll('.answer .copy').length > n", arg=before)
    page.locator("#stop").wait_for(state="hidden")
    return page.locator(".answer .text").last.inner_text()


def error(page, name):
    from playwright.sync_api import expect

    expect(page.locator(f"#{name}-error")).not_to_be_empty()
    return page.locator(f"#{name}-error").inner_text()


def player_time(page):
    return page.locator("#player").evaluate("player => player.currentTime")


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("width", WIDTHS)
def test_a_video_is_watched_asked_about_sought_in_and_kept(tiny, served, visit, film, width, scheme):
    page = visit(served.url, width, scheme)
    is_view(page, "empty")
    assert "knows videos of coloured shapes and nothing else" in page.locator("#model").inner_text()
    assert page.evaluate(LOOK) == []
    page.locator("#file").set_input_files(film)
    is_view(page, "chosen")
    page.locator("#more summary").click()
    assert page.evaluate(LOOK) == []
    page.locator("#watch").click()
    is_view(page, "ready")
    model, config = tiny[0], tiny[0].config
    kept = model.model.language_model.new_cache(1).num_bytes
    keys_and_values = 60 * config.tokens_per_frame * 2 * config.text_config.num_hidden_layers
    sentence = page.inner_text("#facts").replace("\u00a0", " ")
    assert sentence.startswith(f"The memory of 60 frames takes {round(kept / 2**10)} KiB, and takes no more")
    assert f"attention would need {round(keys_and_values * config.text_config.hidden_size * 4 / 2**10)} KiB" in sentence
    assert ask(page, "What colour was the circle?") == STORY.circle.colour
    assert ask(page, "And what was shown at 0:20?")

    labels = [button.get_attribute("aria-label") for button in page.locator(".stills button").all()]
    assert labels[0] == "Go to 0:00"
    assert labels == sorted(labels)
    assert len(labels) == {390: 6, 1280: 8, 1600: 12}[width]
    pin, strip = page.locator(".pin").bounding_box(), page.locator(".strip").bounding_box()
    assert page.locator(".pin").all_inner_texts() == ["0:20"]
    assert (pin["x"] + pin["width"] / 2 - strip["x"]) / strip["width"] == pytest.approx(20 / 60, abs=0.01)
    page.locator(".stills button").nth(2).click()
    step = 60 / len(labels)
    assert player_time(page) == pytest.approx(2.5 * step, abs=0.05 * step + 0.1)
    page.locator(".question .time").click()
    assert player_time(page) == pytest.approx(20.0)
    assert page.locator("#list li.current .name").inner_text() == "film.mp4"
    assert "1:00" in page.locator("#list li.current .open").inner_text()
    page.locator("#list li.current .menu summary").click()
    assert page.evaluate(LOOK) == []
    # the picture in the middle of the strip is of the video, and as fine as it is
    assert page.locator(".stills img").first.evaluate("picture => picture.naturalWidth") == 160


@pytest.mark.parametrize(("width", "fps", "frames"), [(390, 2, 114), (1280, 3, 171)])
def test_watching_can_be_asked_about_and_cancelled(served, visit, film, width, fps, frames):
    from playwright.sync_api import expect

    page, go_on, memories = visit(served.url, width), threading.Event(), served.memories
    real, memories.wait_for_turn = memories.wait_for_turn, lambda timeout_s: go_on.wait(60)
    try:
        page.locator("#main").wait_for()
        page.locator("#file").set_input_files(film)
        page.locator("#more summary").click()
        page.locator("#fps").fill(str(fps))
        page.locator("#start").fill("0:03")
        page.locator("#watch").click()
        is_view(page, "watching")
        page.wait_for_function(f"() => / of {frames} frames/.test(document.querySelector('#progress').textContent)")
        assert 0 < page.locator("#bar").evaluate("bar => bar.value") < 1
        assert page.locator(".unseen").is_visible()
        assert re.search("takes .*KiB, .*attention would need .* by now", page.inner_text("#facts"))
        assert page.evaluate(LOOK) == []
        assert ask(page, "Which shape came first of all?") == STORY.scenes[1].shape
        assert re.fullmatch(r"seen up to 0:\d\d", page.locator(".notes").inner_text())
        expect(page.locator("#list li.current")).to_contain_text("% watched")
        assert re.search(r"\d+\u00a0% watched", page.locator("#list li.current").inner_text())
        page.locator("#cancel").click()
        is_view(page, "chosen")
    finally:
        go_on.set()
        memories.wait_for_turn = real
    assert page.locator("#list li.current").count() == 0
    assert page.locator("#timeline").is_hidden()
    assert not [one for one in memories.ids() if memories.describe(one)["fps"] == fps]


def test_memories_are_found_again_after_a_restart(tiny, visit, film, tmp_path):
    from playwright.sync_api import expect

    folder = tmp_path / "kept"
    with running(build(tiny, folder)) as url:
        page = visit(url)
        watch(page, film)
        ask(page, "What colour was the circle?")
        page.locator("#another").click()
        watch(page, str(make_story(seed=8, duration_s=5).render(tmp_path / "short.mp4")))
    with running(build(tiny, folder), int(url.rpartition(":")[2])):
        page.goto(url)
        expect(page.locator("#list .name")).to_have_text(["short.mp4", "film.mp4"])
        page.locator("#list .open", has_text="film.mp4").click()
        is_view(page, "ready")
        assert page.locator(".answer .text").inner_text() == STORY.circle.colour
        assert ask(page, "Which shape came last of all?") == STORY.scenes[-1].shape
        page.wait_for_function("() => document.querySelector('#player').readyState > 0")  # it comes from the server
        page.locator(".stills button").nth(3).press("Enter")
        assert player_time(page) == pytest.approx(60 * 3 / 8, abs=0.3)

        page.locator("#list li.current .menu summary").click()
        page.locator(".actions button", has_text="Rename").filter(visible=True).click()
        page.locator(".below input").fill("The <i>film</i>")
        page.locator(".below input").press("Enter")
        expect(page.locator("#film-title")).to_have_text("The <i>film</i>")
        expect(page.locator("#list li.current .name")).to_have_text("The <i>film</i>")
        page.locator("#list li.current .menu summary").click()
        with page.expect_download() as export:
            page.locator(".actions a").filter(visible=True).click()
        assert export.value.suggested_filename.endswith("-memory.zip")

        for video in folder.glob("*/video"):  # the disk was tidied up
            video.unlink()
        page.reload()  # the address names the memory
        is_view(page, "ready")
        expect(page.locator("#stage-note")).to_have_text("The video is not kept here; its pictures are.")
        page.locator(".stills button").nth(5).click()
        assert page.locator("#still").get_attribute("src").endswith("/stills/16")

        page.locator("#list li.current .menu summary").click()
        page.locator(".actions button", has_text="Delete").filter(visible=True).click()
        assert page.evaluate(LOOK) == []
        page.locator(".below button", has_text="Delete").click()
        is_view(page, "empty")
        expect(page.locator("#list .name")).to_have_text(["short.mp4"])
        assert len(list(folder.glob("*/record.json"))) == 1


def test_a_mistake_is_a_sentence_next_to_its_field(served, visit, film):
    from playwright.sync_api import expect

    page = visit(served.url)
    page.locator("#question").fill("What?")
    page.locator("#question").press("Enter")
    assert error(page, "question") == "Choose a video first, or open a memory."
    assert page.locator("#question").input_value() == "What?"  # nothing is lost
    page.locator(".chip").first.click()
    assert error(page, "question") == "Choose a video first, or open a memory."
    for name, content, said in (
        ("empty.mp4", b"", "empty.mp4 is empty."), ("big.mp4", bytes(2**22 + 1), "big.mp4 has 4.0\u00a0MiB; at most"),
    ):  # fmt: skip
        page.locator("#file").set_input_files({"name": name, "mimeType": "video/mp4", "buffer": content})
        assert said in error(page, "file")
        is_view(page, "empty")
    page.locator("#file").set_input_files({"name": "text.mp4", "mimeType": "video/mp4", "buffer": b"no video" * 99})
    expect(page.locator("#stage-note")).to_contain_text("This browser cannot play this file")
    page.locator("#watch").click()
    assert (
        error(page, "file") == "This is not a video that this server reads: Invalid data found when processing input."
    )
    is_view(page, "chosen")
    page.locator("#question").press("Enter")
    assert error(page, "question").startswith("Press Watch first.")
    page.locator("#file").set_input_files(film)
    page.wait_for_function("() => document.querySelector('#player').readyState > 0")
    for field, text, said in (
        ("start", "later", "Write a time, such as 1:30 or 1:10:00."), ("start", "1:70", "Write a time"),
        ("start", "1:10:00", "The video is over at 1:00."), ("end", "0", "It must lie after 0:00."),
        ("fps", "many", "Write a number above 0, up to 60."), ("fps", "0", "Write a number"), ("fps", "99", "up to 60"),
    ):  # fmt: skip
        if not page.locator("#start").is_visible():
            page.locator("#more summary").click()
        page.locator(f"#{field}").fill(text)
        page.locator("#watch").click()
        assert said in error(page, field)
        assert page.locator(f"#{field}").get_attribute("aria-invalid") == "true"
        assert page.locator(".error:not(:empty)").count() == 1
        page.locator(f"#{field}").fill("")
    page.goto(f"{served.url}#memory={'0' * 32}")  # the same page goes on; then, one that begins there
    assert error(page, "list").startswith("There is no memory")
    assert error(visit(f"{served.url}#memory={'1' * 32}"), "list").startswith("There is no memory")


def test_a_server_that_is_gone_is_said_and_nothing_is_lost(tiny, visit, film, tmp_path):
    with running(build(tiny, tmp_path / "kept")) as url:
        page = visit(url)
        watch(page, film)
    page.locator("#question").fill("Why?")
    page.locator("#question").press("Enter")
    assert error(page, "question") == "The server does not answer. Is it still running?"
    assert page.locator("#question").input_value() == "Why?"


def test_an_answer_is_stopped_copied_and_exported(served, visit, film, tmp_path, monkeypatch):
    page = visit(served.url, 390, "dark")
    watch(page, film)
    said = ask(page, "What colour was the circle?")
    page.locator(".copy").click()
    assert page.evaluate("navigator.clipboard.readText()") == said
    with page.expect_download() as export:
        page.locator("#export-talk").click()
    talk = Path(export.value.path()).read_text(encoding="utf-8")
    assert talk == f"# film.mp4\n\n**What colour was the circle?**\n\n{said}\n"
    monkeypatch.setattr(served.engine, "_ends", set())  # it would talk on and on
    page.locator("#question").fill("Why?")
    page.locator("#question").press("Shift+Enter")
    page.locator("#question").press("a")
    assert page.locator("#question").input_value() == "Why?\na"
    page.locator("#question").press("Enter")
    page.locator("#question").fill("a question that waits")  # the box is of use meanwhile
    page.locator("#stop").click()
    page.locator(".notes", has_text="stopped").wait_for()
    assert page.locator("#question").input_value() == "a question that waits"
    monkeypatch.undo()
    page.locator("#forget").click()
    assert page.locator("#turns li").count() == 0
    assert page.locator(".chip").first.is_visible()


def test_all_of_it_can_be_used_by_keyboard(served, visit, film):
    page = visit(served.url)
    watch(page, film)
    page.locator("body").press("Tab")
    page.locator(".stills button").first.focus()
    for key, at in (("ArrowRight", 1), ("ArrowRight", 2), ("ArrowLeft", 1), ("End", 7), ("ArrowRight", 7), ("Home", 0)):
        page.keyboard.press(key)
        assert page.evaluate("[...document.querySelectorAll('.stills button')].indexOf(document.activeElement)") == at
    page.keyboard.press("End")
    page.keyboard.press("Enter")
    assert player_time(page) == pytest.approx(60 * 7 / 8, abs=0.3)
    reached = []
    for _ in range(14):
        page.keyboard.press("Tab")
        reached.append(page.evaluate("document.activeElement.id || document.activeElement.className"))
    assert {"question", "send", "chip", "open"} <= set(reached)


def test_times_are_read_and_written(served, visit):
    page = visit(served.url)
    call = "async ([name, ...given]) => (await import('/page/times.js'))[name](...given)"
    for seconds, said in ((0, "0:00"), (59.99, "0:59"), (70, "1:10"), (4200, "1:10:00"), (36_061, "10:01:01")):
        assert page.evaluate(call, ["clock", seconds]) == said
    for text, seconds in (("1:10:00", 4200), ("1:10", 70), (" 70 ", 70), ("90:00", 5400), ("0:01.5", 1.5), ("0", 0)):
        assert page.evaluate(call, ["parseTime", text]) == seconds
    for text in ("", "1:60", "1:60:00", "-1", "1:", "a", "1:2:3:4"):
        assert page.evaluate(call, ["parseTime", text]) != page.evaluate(call, ["parseTime", text])  # NaN
    for text, found in (
        ("What was at 1:10:00?", [4200]), ("between 0:05 and 1:12", [5, 72]), ("at 30 s, or 2.5 minutes", [30, 150]),
        ("after 1 hour", [3600]), ("100:00", [6000]), ("3 squares, 12:99, 1:2:3, 5 shapes", []), ("v1.30 s", []),
    ):  # fmt: skip
        assert [one["seconds"] for one in page.evaluate(call, ["timesIn", text])] == found, text
    for size, said in ((0, "0 bytes"), (140 * 2**10, "140 KiB"), (1.5 * 2**30, "1.5 GiB"), (160.4 * 2**20, "160 MiB")):
        assert page.evaluate(call, ["size", size]) == said.replace(" ", "\u00a0")


def test_a_page_with_keys_asks_for_one(tiny, visit, film, tmp_path):
    from playwright.sync_api import expect

    with running(build(tiny, tmp_path, keys=("open;sesame",))) as url:
        page = visit(url)
        page.locator("#key-field").fill("wrong")
        page.locator("#key-field").press("Enter")
        expect(page.locator("#key-error")).to_have_text("This is not a key of this page.")
        assert page.locator("#main").is_hidden()
        page.locator("#key-field").fill("open;sesame")
        page.locator("#key-field").press("Enter")
        watch(page, film)
        page.wait_for_function("() => [...document.querySelectorAll('.stills img')].every((one) => one.naturalWidth)")


def test_the_page_before_a_server_elsewhere(tiny, visit, tmp_path):
    from playwright.sync_api import expect

    with running(build_app(*tiny, Settings("video-ma2mba-tiny", tmp_path, keys=("its key",)))) as elsewhere:
        page_app = add_page(build_forwarding_app(Server(elsewhere, "its key"), (), 2**24))
        with running(page_app) as url:
            page = visit(url)
            page.locator("#example").click()
            page.locator("#watch").click()
            is_view(page, "ready")
            assert ask(page, "What colour was the circle?") == "red"
            assert page.locator(".stills img").count() == 8
            page.reload()
            is_view(page, "ready")
            expect(page.locator("#stage-note")).to_have_text("The video is not kept here; its pictures are.")
