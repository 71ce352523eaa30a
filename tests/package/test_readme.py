"""What the README prints is what works."""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from video_ma2mba import cli
from video_ma2mba.data.synthetic import make_story

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_python_example_runs_as_printed(tmp_path, monkeypatch, capsys):
    (example,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    (tmp_path / "model_cards").symlink_to(ROOT / "model_cards")  # the one thing that it takes from the clone
    monkeypatch.chdir(tmp_path)
    exec(compile(example, "README.md", "exec"), {})
    assert capsys.readouterr().out == make_story(seed=7, duration_s=60).circle.colour + "\n"


@pytest.mark.parametrize("line", re.findall(r"^video-ma2mba .*$", README, re.MULTILINE))
def test_command_lines_are_understood(line):
    command = shlex.split(line.partition(" | ")[0], comments=True)
    args = cli.build_parser().parse_args(command[1:])
    assert args.command == command[1]


def test_make_targets_exist():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = set(re.findall(r"\bmake ([a-z-]+)", README))
    assert {"demo", "test"} <= named <= targets


def test_tree_exists():
    tree = README.partition("## What is where")[2].partition("```\n")[2].partition("```")[0]
    paths, folders = [], []
    for line in tree.splitlines():
        depth = (len(line) - len(line.lstrip())) // 2
        folders[depth:] = [line.split()[0]]
        paths.append(ROOT.joinpath(*folders))
    assert len(paths) > 8
    assert [path for path in paths if not path.exists()] == []


def test_plan_is_what_the_command_prints(capsys):
    (command,) = re.findall(r"^video-ma2mba (plan .*)$", README, re.MULTILINE)
    assert cli.main(shlex.split(command)) == 0
    table = [line.rstrip() for line in capsys.readouterr().out.splitlines() if not line.startswith(" ")]
    table = table[: table.index(next(line for line in table if line.startswith("└"))) + 1]
    assert len(table) > 10
    assert "\n".join(table) in README


def test_fine_tuning_on_own_videos_runs_as_printed(tmp_path, capfd):
    lines = re.findall(r"^python (examples/finetune_own_videos.py .*?)(?:\s+#.*)?$", README, re.MULTILINE)
    assert len(lines) == 2
    for line in lines:
        script, *arguments = shlex.split(line)
        subprocess.run([sys.executable, ROOT / script, *arguments], cwd=tmp_path, check=True)
    truth = json.loads((tmp_path / "my_videos" / "questions.jsonl").read_text().splitlines()[0])
    assert capfd.readouterr().out.splitlines()[-1] == truth["answer"]
