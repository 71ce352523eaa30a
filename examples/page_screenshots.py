"""Take the pictures of the page that docs/page.md shows: it is served, used and photographed, at three widths.

    python examples/page_screenshots.py --output docs/pictures

Needs Chromium, and the extras `ui` and `dev`. The videos are synthetic, so that the tiny model knows what they show.
"""

import argparse
import io
import itertools
import re
import shutil
import subprocess
import sys
import tempfile
from contextlib import contextmanager
from pathlib import Path

from PIL import Image
from playwright.sync_api import expect, sync_playwright

from video_ma2mba.data.synthetic import make_story

FLAGS = ["no-sandbox", "disable-gpu", "disable-background-networking", "disable-component-update", "disable-sync"]
NUM_STRONG, NUM_OTHERS = 100, 80  # colours of a picture: it is small enough for a repository then


@contextmanager
def served(memories: Path):
    """The page of a folder of memories, by its command; gives its address."""
    command = [sys.executable, "-m", "video_ma2mba.cli", "ui", "--port", "0", "--memories", str(memories)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        yield process.stdout.readline().strip()
    finally:
        process.terminate()
        process.communicate()


def photograph(page, path: Path) -> None:
    page.wait_for_timeout(500)
    page.mouse.move(0, 0)
    picture = Image.open(io.BytesIO(page.screenshot(full_page=True))).convert("RGB")
    picture.quantize(palette=palette_of(picture), dither=Image.Dither.NONE).save(path, optimize=True)
    print(f"{path}: {picture.width} x {picture.height}, {path.stat().st_size} bytes")


def palette_of(picture: Image.Image) -> Image.Image:
    """The colours that are frequent here and strong, as they are, and some for all that is grey or noise."""
    counts = sorted(picture.getcolors(picture.width * picture.height), reverse=True)
    strong = [colour for _, colour in counts if max(colour) - min(colour) > 50][:NUM_STRONG]
    others = picture.quantize(NUM_OTHERS, dither=Image.Dither.NONE).getpalette()[: 3 * NUM_OTHERS]
    palette = Image.new("P", (1, 1))
    palette.putpalette([*(part for colour in strong for part in colour), *others])
    return palette


def is_view(page, name: str) -> None:
    expect(page.locator("body")).to_have_attribute("data-view", name, timeout=120_000)


def ask(page, question: str) -> None:
    before = page.locator(".answer .copy").count()
    page.locator("#question").fill(question)
    page.locator("#question").press("Enter")
    expect(page.locator(".answer .copy")).to_have_count(before + 1)


def take_all(open_page, output: Path, films: dict[str, Path]) -> None:
    """All pictures: of each thing that can be seen, and of the talk at every width, light and dark."""
    page = open_page(1280, 800, "light")
    photograph(page, output / "page-begin-1280-light.png")
    page.locator("#example").click()
    page.locator("#watch").click()
    is_view(page, "ready")
    for (width, height), scheme in itertools.product([(390, 844), (1280, 800), (1600, 900)], ["light", "dark"]):
        page = open_page(width, height, scheme)
        page.locator(".open", has_text="example.mp4").click()
        is_view(page, "ready")
        for question in ("What colour was the circle?", "What was shown at 0:20?", "Did a red square ever appear?"):
            ask(page, question)
        page.locator(".question .time").click()
        photograph(page, output / f"page-talk-{width}-{scheme}.png")

    page = open_page(1600, 900, "dark")
    page.locator("#file").set_input_files(films["Long.mp4"])
    page.locator("#more summary").click()
    page.locator("#fps").fill("0.5")
    page.locator("#watch").click()
    expect(page.locator("#progress")).to_have_text(re.compile(" a second .* left"), timeout=120_000)
    ask(page, "Did a yellow cross ever appear?")
    photograph(page, output / "page-watching-1600-dark.png")
    is_view(page, "ready")
    ask(page, "Did a white cross appear at 1:10:00?")
    photograph(page, output / "page-hours-1600-dark.png")

    page = open_page(390, 844, "dark")
    page.locator("#file").set_input_files(films["Notes.mp4"])
    page.locator("#more summary").click()
    page.locator("#start").fill("1:10:00")
    page.wait_for_function("() => document.querySelector('#player').readyState > 0")
    page.locator("#watch").click()
    photograph(page, output / "page-mistake-390-dark.png")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, required=True, metavar="DIR")
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder, served(Path(folder) / "memories") as url, sync_playwright() as tools:
        films = {
            "Long.mp4": make_story(seed=20, duration_s=4800, size=96, source_fps=1).render(Path(folder) / "Long.mp4"),
            "Notes.mp4": make_story(seed=32, duration_s=60, size=192).render(Path(folder) / "Notes.mp4"),
        }
        browser = tools.chromium.launch(executable_path=shutil.which("chromium"), args=[f"--{flag}" for flag in FLAGS])

        def open_page(width: int, height: int, scheme: str):
            context = browser.new_context(viewport={"width": width, "height": height}, color_scheme=scheme)
            page = context.new_page()
            page.set_default_timeout(60_000)
            page.goto(url)
            expect(page.locator("#drop")).to_be_visible()
            return page

        take_all(open_page, args.output, films)
        browser.close()


if __name__ == "__main__":
    main()
