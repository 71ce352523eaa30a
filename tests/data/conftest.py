"""A media root with small videos and a picture under whatever names a test wants."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from video_ma2mba.data.manifest import clean_messages, load_manifest
from video_ma2mba.data.synthetic import make_story


@pytest.fixture(scope="session")
def clip(tmp_path_factory) -> Path:
    """Six seconds of a story."""
    return make_story(seed=1, duration_s=6).render(tmp_path_factory.mktemp("clip") / "clip.mp4")


@pytest.fixture
def media(tmp_path, clip) -> Callable[..., Path]:
    """Gives the media root; makes a video, or a picture, of every name given. Each video has a size of its own."""
    root = tmp_path / "media"
    root.mkdir()
    made = []

    def make(*names: str) -> Path:
        for name in names:
            path = root / name
            path.parent.mkdir(parents=True, exist_ok=True)
            if path.suffix in (".png", ".jpg"):
                from PIL import Image

                Image.new("RGB", (40, 30), (200, 10, 10)).save(path)
            else:
                shutil.copy(clip, path)
                made.append(name)
                with path.open("ab") as file:  # an MP4 ends with whatever boxes follow: this one is empty
                    file.write((8 + len(made)).to_bytes(4) + b"free" + bytes(len(made)))
        return root

    return make


@pytest.fixture
def rendered(processor) -> Callable[[Path], dict[str, str]]:
    """The conversations of a prepared folder, read back and rendered by the chat template, by their ids."""

    def render(folder: Path) -> dict[str, str]:
        rows = load_manifest(folder)
        return {row["id"]: processor.apply_chat_template(clean_messages(row["messages"])) for row in rows}

    return render
