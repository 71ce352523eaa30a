"""What `--help` says, command by command: a snapshot in `help/`, so that a change of words or options is seen.

UPDATE_HELP=1 pytest tests/package/test_help.py    # writes it anew
"""

import argparse
import os
import re
from pathlib import Path

import pytest

from video_ma2mba.cli import COMMANDS, bench, build_parser

HERE = Path(__file__).with_name("help")
TESTS = Path(__file__).resolve().parents[1]


def parsers(parser, name=""):
    """(name, parser) of a command and of all below it."""
    yield name, parser
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for word, below in action.choices.items():
                yield from parsers(below, f"{name} {word}".strip())


ALL = dict(parsers(build_parser()))
BENCHMARKS = [f"bench {name}" for name in bench.BENCHMARKS]  # whose parsers are made only when they are asked for


@pytest.mark.parametrize("name", [*ALL, *BENCHMARKS])
def test_help_is_the_snapshot(name, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setenv("NO_COLOR", "1")
    parser = ALL[name] if name in ALL else bench.parser_of(name.removeprefix("bench "))
    file, text = HERE / f"{name.replace(' ', '_') or 'video-ma2mba'}.txt", parser.format_help()
    if os.environ.get("UPDATE_HELP"):
        HERE.mkdir(exist_ok=True)
        file.write_text(text, encoding="utf-8")
    assert text == file.read_text(encoding="utf-8")


def test_there_is_no_snapshot_of_what_is_gone():
    names = {name.replace(" ", "_") or "video-ma2mba" for name in [*ALL, *BENCHMARKS]}
    assert {file.stem for file in HERE.iterdir()} == names
    assert set(COMMANDS) <= set(ALL)


@pytest.mark.parametrize("name", [name for name in ALL if name])
def test_everything_has_a_line_of_help(name):
    silent = {
        f"{name} {action.option_strings[-1] if action.option_strings else action.dest}"
        for action in ALL[name]._actions
        if not action.help and not isinstance(action, argparse._SubParsersAction)
    }
    assert silent == set()


def test_every_option_is_tried_somewhere():
    """By its name in a test, or in a page that a test runs: what it does, or how it is refused, is asserted there."""
    pages = [TESTS.parent / "README.md", *(TESTS.parent / "docs").glob("*.md")]
    files = [file for file in TESTS.rglob("*.py") if file != Path(__file__)]
    said = "\n".join(file.read_text(encoding="utf-8") for file in [*files, *pages])
    untried = {
        f"{name} {action.option_strings[-1]}"
        for name, parser in ALL.items()
        for action in parser._actions
        if action.option_strings
        and not any(re.search(rf"(?<![\w-]){option}(?![\w-])", said) for option in action.option_strings)
    }
    assert untried == set()
