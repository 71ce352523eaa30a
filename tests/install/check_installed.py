"""What an installed package must do with the repository out of sight. `make test-install` runs it, in an empty folder.

python tests/install/check_installed.py MODEL    # MODEL: a copy of model_cards/video-ma2mba-tiny
"""

import subprocess
import sys
from importlib.metadata import distribution, version
from pathlib import Path

import video_ma2mba
from video_ma2mba.data.synthetic import make_story
from video_ma2mba.loading import TINY_MODEL

COMMAND = Path(sys.executable).with_name("video-ma2mba")


def printed(*words: str) -> str:
    return subprocess.run([COMMAND, *words], check=True, stdout=subprocess.PIPE, text=True).stdout


def main(model: str) -> None:
    home = Path(video_ma2mba.__file__).parent
    assert home.parent.name == "site-packages", f"{home} is not what pip installed"
    assert not TINY_MODEL.exists(), "the repository can still be seen"
    assert all((home / room / "__init__.py").is_file() for room in ("modeling", "processing"))
    assert "LICENSE" in {file.name for file in distribution("video-ma2mba").files or ()}

    story = make_story(seed=7, duration_s=20)
    story.render("story.mp4")
    answer = printed("ask", "story.mp4", "What colour was the circle?", "--model", model)
    assert answer == f"{story.circle.colour}\n", answer
    assert "fits" in printed("plan", "--model", "3.1b", "--hours", "1", "--gpu-memory", "80GiB")
    refused = subprocess.run([COMMAND, "train", "3.1b-stage2", "--dry-run"], capture_output=True, text=True)
    assert "pip install 'video-ma2mba[train]'" in refused.stderr, refused.stderr
    assert (home / "training" / "recipes" / "stage2.yaml").is_file()
    print(f"video-ma2mba {version('video-ma2mba')} in {home} answers and plans")


if __name__ == "__main__":
    main(sys.argv[1])
