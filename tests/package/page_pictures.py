"""Takes the pictures of the page that docs/page.md shows, into docs/pictures: the page is served, used, photographed.

    pytest tests/package/page_pictures.py

The videos are synthetic, so that the tiny model knows what they show.
"""

import io
import itertools
import re
from pathlib import Path

import pytest
from PIL import Image

from tests.package.test_ui import SCHEMES, WIDTHS, ask, build, chromium, is_view, tiny, visit  # noqa: F401 - fixtures
from tests.serving.conftest import running
from video_ma2mba.data.synthetic import make_story
from video_ma2mba.serving.media import MediaRules

OUTPUT = Path(__file__).resolve().parents[2] / "docs" / "pictures"
NUM_STRONG, NUM_OTHERS = 100, 80  # colours of a picture: it is small enough for a repository then


@pytest.fixture
def url(tiny, tmp_path):  # noqa: F811
    with running(build(tiny, tmp_path / "memories", rules=MediaRules())) as url:
        yield url


def photograph(page, name):
    page.wait_for_timeout(500)
    page.mouse.move(0, 0)
    picture = Image.open(io.BytesIO(page.screenshot(full_page=True))).convert("RGB")
    picture.quantize(palette=palette_of(picture), dither=Image.Dither.NONE).save(OUTPUT / f"{name}.png", optimize=True)


def palette_of(picture):
    """The colours that are frequent here and strong, as they are, and some for all that is grey or noise."""
    counts = sorted(picture.getcolors(picture.width * picture.height), reverse=True)
    strong = [colour for _, colour in counts if max(colour) - min(colour) > 50][:NUM_STRONG]
    others = picture.quantize(NUM_OTHERS, dither=Image.Dither.NONE).getpalette()[: 3 * NUM_OTHERS]
    palette = Image.new("P", (1, 1))
    palette.putpalette([*(part for colour in strong for part in colour), *others])
    return palette


def test_talks_at_every_width(url, visit):  # noqa: F811
    page = visit(url)
    page.locator("#drop").wait_for()
    photograph(page, "page-begin-1280-light")
    page.locator("#example").click()
    page.locator("#watch").click()
    is_view(page, "ready")
    for width, scheme in itertools.product(WIDTHS, SCHEMES):
        page = visit(url, width, scheme)
        page.locator(".open", has_text="example.mp4").click()
        is_view(page, "ready")
        for question in ("What colour was the circle?", "What was shown at 0:20?", "Did a red square ever appear?"):
            ask(page, question)
        page.locator(".question .time").click()
        photograph(page, f"page-talk-{width}-{scheme}")


def test_a_video_that_is_being_watched_and_an_hour_later(url, visit, tmp_path):  # noqa: F811
    from playwright.sync_api import expect

    film = make_story(seed=20, duration_s=4800, size=96, source_fps=1).render(tmp_path / "Long.mp4")
    page = visit(url, 1600, "dark")
    page.locator("#file").set_input_files(film)
    page.locator("#more summary").click()
    page.locator("#fps").fill("0.5")
    page.locator("#watch").click()
    expect(page.locator("#progress")).to_have_text(re.compile(" a second .* left"))
    ask(page, "Did a yellow cross ever appear?")
    photograph(page, "page-watching-1600-dark")
    is_view(page, "ready")
    ask(page, "Did a white cross appear at 1:10:00?")
    photograph(page, "page-hours-1600-dark")


def test_a_mistake_beside_its_field(url, visit, tmp_path):  # noqa: F811
    page = visit(url, 390, "dark")
    page.locator("#file").set_input_files(make_story(seed=32, duration_s=60, size=192).render(tmp_path / "Notes.mp4"))
    page.locator("#more summary").click()
    page.locator("#start").fill("1:10:00")
    page.wait_for_function("() => document.querySelector('#player').readyState > 0")
    page.locator("#watch").click()
    photograph(page, "page-mistake-390-dark")
