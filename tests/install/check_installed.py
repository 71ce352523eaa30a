"""What an installed package must do with the repository out of sight. `make test-install` runs it, in an empty folder.

    python tests/install/check_installed.py           # asking, planning, watching
    python tests/install/check_installed.py --train   # the same and a training: where the extra [train] is installed

Every command is the installed console script in a terminal of its own, as a person starts it: nothing may wait for an
answer, and nothing but the command's own words may be printed.
"""

import json
import os
import pty
import re
import select
import subprocess
import sys
import time
from importlib.metadata import distribution, version
from pathlib import Path

import video_ma2mba
from video_ma2mba.data.synthetic import make_story

COMMAND = Path(sys.executable).with_name("video-ma2mba")
TIMEOUT_S = 300
ESCAPES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
# A line of a command is its answer, a sentence of ours, a table or a bar; these are other libraries'.
NOISE = re.compile(
    r"custom code|Failed to load|Loading weights|Warning|deprecat|\bW\d{4} |Traceback|You are using a model"
)


def in_terminal(*words: str, code: int = 0) -> str:
    """All that the command shows in a terminal, without colours; its exit code must be `code`."""
    leader, follower = pty.openpty()
    process = subprocess.Popen([COMMAND, *words], stdin=follower, stdout=follower, stderr=follower, close_fds=True)
    os.close(follower)
    shown, deadline = b"", time.monotonic() + TIMEOUT_S
    while time.monotonic() < deadline:
        if select.select([leader], [], [], 0.5)[0]:
            try:
                piece = os.read(leader, 65536)
            except OSError:  # the other end is closed: how a terminal says that it is over
                break
            shown += piece
        elif process.poll() is not None:
            break
    else:
        process.kill()
    os.close(leader)
    text = ESCAPES.sub("", shown.decode()).replace("\r\n", "\n")
    assert process.wait() == code, f"{words}: exit code {process.returncode}\n{text}"
    assert not NOISE.search(text), f"{words}: noise\n{text}"
    return text


def main(train: bool) -> None:
    home = Path(video_ma2mba.__file__).parent
    assert home.parent.name == "site-packages", f"{home} is not what pip installed"
    assert all((home / room / "__init__.py").is_file() for room in ("modeling", "processing"))
    assert "LICENSE" in {file.name for file in distribution("video-ma2mba").files or ()}
    assert (home / "training" / "recipes" / "stage2.yaml").is_file()
    assert (home / "py.typed").is_file()

    assert in_terminal("--version") == f"video-ma2mba {version('video-ma2mba')}\n"
    story = make_story(seed=7, duration_s=20)
    story.render("story.mp4")
    answer = in_terminal("ask", "story.mp4", "What colour was the circle?").splitlines()[-1]
    assert answer == story.circle.colour, answer
    in_terminal("watch", "story.mp4", "-o", "kept")
    answer = in_terminal("ask", "kept", "What colour was the circle?").splitlines()[-1]
    assert answer == story.circle.colour, answer
    assert "fits" in in_terminal("plan", "--model", "3.1b", "--hours", "1", "--gpu-memory", "80GiB")
    if train:
        check_training()
    else:
        refused = in_terminal("train", "3.1b-stage2", "--dry-run", code=2)
        assert "pip install 'video-ma2mba[train]'" in refused, refused
    print(f"video-ma2mba {version('video-ma2mba')} in {home} asks, watches, plans{' and trains' if train else ''}")


def check_training() -> None:
    """Own clips -> data -> a trained folder that can be shared, all by the console script."""
    Path("clips").mkdir()
    with Path("clips/questions.jsonl").open("w") as file:
        for seed in range(4):
            story = make_story(seed, 4)
            story.render(f"clips/{seed}.mp4")
            row = {"video": f"{seed}.mp4", "question": "Which colour?", "answer": story.circle.colour}
            file.write(json.dumps(row) + "\n")
    in_terminal("data", "prepare", "clips/questions.jsonl", "--media-root", "clips", "-o", "data")
    options = {"model": home_of_the_tiny_model(), "data": "data", "output": "run", "max_steps": 2}
    in_terminal("train", "finetune", *(word for key, value in options.items() for word in ("--set", f"{key}={value}")))
    assert (Path("run/model") / "modeling_video_ma2mba.py").is_file(), "the trained folder has no code"
    assert "modeling_video_ma2mba.py" in in_terminal("share", "run/model", "--repo", "me/x", "--dry-run")
    in_terminal("ask", "story.mp4", "Which colour?", "--model", "run/model")


def home_of_the_tiny_model() -> str:
    from video_ma2mba.loading import TINY_MODEL

    return str(TINY_MODEL)


if __name__ == "__main__":
    main("--train" in sys.argv[1:])
