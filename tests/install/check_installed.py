"""What an installed package must do with the repository out of sight. `make test-install` runs it, in an empty folder.

    python tests/install/check_installed.py           # the README and its quickstart, as printed
    python tests/install/check_installed.py --train   # fine-tuning of the quickstart, with the extra [train]

Every command is a line of those pages, run by a shell in a terminal of its own, as a person starts it: nothing may wait
for an answer, and nothing but the command's own words may be printed.
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

ROOT = Path(__file__).resolve().parents[2]
TIMEOUT_S = 600
ESCAPES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
BAR = re.compile(r"^(Watching|checking|opening|storing|Merging)\b.* (\d+)/(\d+|\?)")
TYPED = "What colour was the circle?\n/help\n/quit\n"
# What is not run here, and why; a command of a page is named by its beginning.
EXCUSED = {
    "make ": "in a clone: CI runs them",
    "pip install": "`make test-install` has run them",
    "MAMBA_SKIP_CUDA_BUILD": "`make test-kernels` runs it",
    "CAUSAL_CONV1D_FORCE_BUILD": "needs nvcc",
    "video-ma2mba ui": "an extra of its own; `test_ui.py` serves that page and uses it in a browser",
    "video-ma2mba serve": "an extra of its own; `tests/serving` starts it",
}
# All that a command may say on stderr beside its bars, line by line. A command that is not here says nothing.
OF_TRAINING = [
    r"global batch .*",
    r"(chosen, .*|warning: .*|note: .*|held out.*|step .*|stopped at step .*|.*it/s.*|.*\d+%.*|\s.*)",
]
NOTES = {
    "video-ma2mba watch story.mp4": [r"(story-memory|talk): 60 frames up to 0:59, 6\d tokens, .* of states"],
    "video-ma2mba train": OF_TRAINING,
    "python examples/finetune_own_videos.py my_videos": OF_TRAINING,
}
TRAINING = ("python examples/", "video-ma2mba data", "video-ma2mba train", "video-ma2mba ask my_videos")


def commands(page: str) -> list[str]:
    """The lines of the shell blocks of a page, less their comments."""
    blocks = re.findall(r"^```sh\n(.*?)^```", (ROOT / page).read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    lines = [line.partition("    #")[0].strip() for block in blocks for line in block.splitlines()]
    return [line for line in lines if line and not line.startswith(tuple(EXCUSED))]


def in_terminal(line: str, code: int = 0) -> tuple[str, str]:
    """What a line shows in a terminal, on stdout and on stderr, without colours; its exit code must be `code`."""
    (out, out_end), (err, err_end) = pty.openpty(), pty.openpty()
    env = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "TERM": "xterm",
        "COLUMNS": "110",
    }
    env.pop("PYTHONPATH", None)
    line = line.replace("examples/", f"{ROOT / 'examples'}/")
    process = subprocess.Popen(
        ["bash", "-c", line], stdin=out_end, stdout=out_end, stderr=err_end, env=env, close_fds=True
    )
    os.close(out_end), os.close(err_end)
    if " chat " in line:
        os.write(out, TYPED.encode())
    shown, deadline = {out: b"", err: b""}, time.monotonic() + TIMEOUT_S
    open_ends = {out, err}
    while open_ends and time.monotonic() < deadline:
        for end in select.select(list(open_ends), [], [], 0.5)[0]:
            try:
                piece = os.read(end, 65536)
            except OSError:  # the other end is closed: how a terminal says that it is over
                piece = b""
            shown[end] += piece
            if not piece:
                open_ends.discard(end)
    if open_ends:
        process.kill()
    os.close(out), os.close(err)
    said = [ESCAPES.sub("", shown[end].decode()).replace("\r\n", "\n") for end in (out, err)]
    assert process.wait() == code, f"{line}: exit code {process.returncode}\n{said[0]}{said[1]}"
    return said[0], said[1]


def walk(line: str) -> str:
    """Run a line of a page as it stands; what it printed. Bars must end full, and nothing else be said than `NOTES`."""
    out, err = in_terminal(line)
    bars, rest = {}, []
    for said in re.split(r"[\r\n]+", err):
        if bar := BAR.match(said.strip()):
            bars[bar[1]] = bar[2], bar[3]
        elif said.strip():
            rest.append(said.rstrip())
    unfinished = {name: shown for name, shown in bars.items() if shown[0] != shown[1]}
    assert not unfinished, f"{line}: bars end at {unfinished}\n{err}"
    notes = next((patterns for start, patterns in NOTES.items() if line.startswith(start)), [])
    strange = [said for said in rest if not any(re.fullmatch(pattern, said) for pattern in notes)]
    assert not strange, f"{line}: said on stderr\n" + "\n".join(strange)
    print(f"$ {line}\n{out}", end="", flush=True)
    return out


def check_package() -> None:
    home = Path(video_ma2mba.__file__).parent
    assert home.parent.name == "site-packages", f"{home} is not what pip installed"
    assert all((home / room / "__init__.py").is_file() for room in ("modeling", "processing"))
    assert "LICENSE" in {file.name for file in distribution("video-ma2mba").files or ()}
    assert (home / "training" / "recipes" / "stage2.yaml").is_file()
    assert (home / "py.typed").is_file()
    assert in_terminal("video-ma2mba --version") == (f"video-ma2mba {version('video-ma2mba')}\n", "")


def check_pages() -> None:
    """The README and the quickstart from top to bottom, and the Python of the README."""
    story = make_story(seed=7, duration_s=60)
    for line in commands("README.md") + commands("docs/quickstart.md"):
        if line.startswith(TRAINING):
            continue
        out = walk(line)
        if line.startswith("video-ma2mba ask") and "What colour" in line:
            assert out.splitlines()[0] == story.circle.colour, out
        if " chat " in line:
            assert story.circle.colour in out.split("> /help")[0], out
            assert "/save FOLDER" in out, out
    assert "fits" in out or Path("talk/video_memory.json").is_file()
    for folder in ("story-memory", "talk"):
        assert (Path(folder) / "video_memory.json").is_file(), folder
    blocks = re.findall(r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL)
    Path("readme.py").write_text("\n".join(blocks), encoding="utf-8")
    out, _ = in_terminal("python readme.py")
    assert out.splitlines()[-1] == story.circle.colour, out
    assert Path("story-memory-too/video_memory.json").is_file()
    refused = in_terminal("video-ma2mba train 3.1b-stage2 --dry-run", code=2)[1]
    assert "pip install 'video-ma2mba[train]'" in refused, refused


def check_training() -> None:
    """Own clips -> data -> adapters -> an answer, and a whole model that can be shared, with its card."""
    for line in commands("docs/quickstart.md"):
        if line.startswith(TRAINING):
            out = walk(line)
    first = Path("my_videos/questions.jsonl").read_text(encoding="utf-8").splitlines()[0]
    assert first in (ROOT / "docs" / "quickstart.md").read_text(encoding="utf-8")
    assert out.splitlines()[-1] == json.loads(first)["answer"], out  # of the fine-tuned model
    assert Path("my_run/model/adapter_config.json").is_file()
    assert Path("my_run/train_report.json").is_file()
    walk("video-ma2mba train finetune --set model=tiny --set data=my_data --set output=whole --set max_steps=2")
    assert Path("whole/model/modeling_video_ma2mba.py").is_file(), "the trained folder has no code"
    before = sorted(os.listdir("whole/model"))
    out, err = in_terminal("video-ma2mba share whole/model --repo me/x --dry-run")
    assert "modeling_video_ma2mba.py" in out
    assert "nothing was uploaded and nothing written" in err, err
    assert sorted(os.listdir("whole/model")) == before
    in_terminal("video-ma2mba share whole/model --repo me/x --card-only")  # `check_card.py` does as the card says


def main(train: bool) -> None:
    check_package()
    if train:
        check_training()
    else:
        check_pages()
    print(f"video-ma2mba {version('video-ma2mba')}: the pages {'that train ' if train else ''}hold as printed")


if __name__ == "__main__":
    main("--train" in sys.argv[1:])
