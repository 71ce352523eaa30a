"""The pages of docs/ are run as they stand: each command, each block of Python; and the README's figures are a file's.

The commands of a page run in its order, in one folder laid out as a clone with the published files that the page names:
the same names, at a tiny size. The README and the quickstart are run by `make test-install`, by an installed package.
"""

import io
import json
import re
import runpy
import shlex
from pathlib import Path

import pytest

from tests.evaluation.conftest import write
from tests.tiny import byte_tokenizer
from tests.weights import checkpoints
from video_ma2mba import cli
from video_ma2mba.data.synthetic import make_story

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
# Pages that are run; what their commands need stands in the page itself.
PAGES = [f"docs/{name}.md" for name in ("memory", "training", "evaluation", "weights")]
TEXTS = {page: (ROOT / page).read_text(encoding="utf-8") for page in PAGES}
BLOCKS = {
    page: re.findall(r"^```(sh|python)\n(.*?)^```", text, re.MULTILINE | re.DOTALL) for page, text in TEXTS.items()
}
LINES = [line for page in PAGES for kind, block in BLOCKS[page] if kind == "sh" for line in block.splitlines() if line]
IN_TABLES = re.findall(r"^\|.*\| `(video-ma2mba .*)` \|$", README, re.MULTILINE)

# What cannot run in a test, and why.
EXCUSED = {
    "video-ma2mba convert llava-mamba interlive/video-ma2mba-1.3b -o converted --verify": "gigabytes with a tower that "
    "the authors name; `test_convert.py` converts small ones",
    "torchrun --nproc-per-node 8 -m video_ma2mba.cli train 3.1b-stage2 --set deepspeed=zero1": "needs eight GPUs",
    "video-ma2mba bench memory-of-video": "`test_bench_memory_of_video.py` runs it at a small size",
}
# What would take minutes is done with less of it.
LESS = {" 65536 2097152": " 65536"}


@pytest.fixture
def clone(tmp_path):
    """The folder in which a page is run."""
    for name in ("model_cards", "examples"):
        (tmp_path / name).symlink_to(ROOT / name)
    published(tmp_path)
    return tmp_path


def published(folder):
    """The files that the page names as their publishers have them."""
    story = make_story(seed=7, duration_s=6)
    for name in ("LLaVA-Video-178K/academic_source/a.mp4", "Video-MME/data/a.mp4", "LongVideoBench/videos/a.mp4"):
        (folder / name).parent.mkdir(parents=True)
        story.render(folder / name)
    turns = [{"from": "human", "value": "<image>\nWhat is this?"}, {"from": "gpt", "value": "A shape."}]
    row = {"id": "a", "data_source": "academic_source", "video": "a.mp4", "conversations": turns}
    write(folder / "LLaVA-Video-178K" / "a_oe_v0_1_qa_processed.json", [row])
    row = {"videoID": "a", "question_id": "1", "duration": "short", "domain": "Art", "question": "Which?"}
    write(folder / "Video-MME" / "test.jsonl", [{**row, "answer": "A", "options": ["A. red", "B. blue"]}])
    row = {"video_id": "a", "video_path": "a.mp4", "subtitle_path": "a.json", "question": "Which?", "id": "a_0"}
    row |= {"candidates": ["red", "blue"], "correct_choice": 0, "duration": 6.0, "duration_group": 15}
    write(folder / "LongVideoBench" / "lvb_val.json", [{**row, "question_category": "S2E", "topic_category": "KS"}])
    made = checkpoints
    for name, config, tensors in (
        ("state-spaces/mamba2-2.7b", made.state_spaces_config(), made.mamba2_tensors()),
        ("openai/clip-vit-large-patch14-336", made.tower_config("clip", True), made.whole_vision_tensors("clip")),
    ):
        made.write_checkpoint(folder / name, config, tensors)
    byte_tokenizer().save_pretrained(folder / "EleutherAI" / "gpt-neox-20b")  # whose name the commands know


def run(line, monkeypatch):
    """One line of a block, in this process, which spares its imports."""
    for much, little in LESS.items():
        line = line.replace(much, little)
    words = shlex.split(line)
    assert words[0] == "video-ma2mba"
    monkeypatch.setattr("sys.stdin", io.StringIO("What colour was the circle?\n/quit\n"))
    assert cli.main(words[1:]) == 0, line


@pytest.mark.parametrize("page", PAGES)
def test_a_page_runs_from_top_to_bottom(page, clone, monkeypatch, capfd):
    monkeypatch.chdir(clone)
    names, colour, said = {}, make_story(seed=7, duration_s=60).circle.colour, ""
    for kind, block in BLOCKS[page]:
        if kind == "python":
            exec(compile(block, page, "exec"), names)
            continue
        for line in (line.partition("    #")[0].strip() for line in block.splitlines()):
            if line and line not in EXCUSED:
                run(line, monkeypatch)
                said = capfd.readouterr().out
    if page == "docs/memory.md":
        assert colour in said  # the last of its lines begins a chat


def test_what_is_excused_stands_in_a_page():
    assert set(EXCUSED) <= {line.partition("    #")[0].strip() for line in LINES} | set(IN_TABLES)


def test_links_and_figures_of_the_pages_exist():
    pages = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")]
    for page in pages:
        text = page.read_text(encoding="utf-8")
        for link in re.findall(r"\]\(([^)\s]+)\)", text):
            path, _, anchor = link.partition("#")
            if link.startswith("http"):
                continue
            target = page.parent / path if path else page
            assert target.exists(), f"{page.name}: {link}"
            if anchor and target.suffix == ".md":
                titles = re.findall(r"^#+ (.*)", target.read_text(encoding="utf-8"), re.MULTILINE)
                assert anchor in {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}, link
    assert len(README.splitlines()) <= 200


def test_the_paths_of_the_guide_for_contributors_exist():
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    said = re.findall(r"`((?:src|modeling|processing|tests|docs)/[\w/.]+)`", text)
    assert [path for path in said if not (ROOT / path).exists()] == []


def test_the_page_of_recipe_keys_is_what_the_code_says(capsys):
    runpy.run_path(str(ROOT / "docs" / "recipe_keys.py"), run_name="__main__")
    assert capsys.readouterr().out == (ROOT / "docs" / "recipe_keys.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("command", [command for command in IN_TABLES if command not in EXCUSED])
def test_commands_of_figures_run(command, monkeypatch, capsys):
    run(command.replace("\\|", "|"), monkeypatch)
    assert capsys.readouterr().out


def test_figures_are_those_of_the_files():
    rows = json.loads((ROOT / "examples/memory/counted.json").read_text())["rows"]
    held = {(row["model"], row["method"], row["tokens"]): row["device_bytes"] for row in rows}
    for tokens in (2**16, 2**21):
        assert f"{held['3.1b', 'sequence_major + offload', tokens] / 2**30:.1f} GiB" == "9.8 GiB"
        assert f"{tokens:,}" in README
    kept = json.loads((ROOT / "examples/video_memory/memory_of_video.json").read_text())["rows"][-1]
    assert kept["minutes"] == 60
    assert f"{kept['memory_bytes'] / 2**10:.0f} KiB; an attention model of equal size " in README
    assert f"an attention model of equal size {kept['attention_bytes'] / 2**20:.1f} MiB" in README


def test_make_targets_exist():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = set(re.findall(r"\bmake ([a-z-]+)", README))
    assert {"demo", "test"} <= named <= targets


def test_what_is_where_exists():
    paths = re.findall(r"^\| `([^`]+)` \|", README.partition("## What is where")[2], re.MULTILINE)
    assert len(paths) > 8
    assert [path for path in paths if not (ROOT / path).exists()] == []


def test_the_plan_is_what_the_command_prints(capsys):
    (command,) = (line for line in LINES if line.startswith("video-ma2mba plan") and "--compare" in line)
    assert cli.main(shlex.split(command)[1:]) == 0
    table = [line.rstrip() for line in capsys.readouterr().out.splitlines() if not line.startswith(" ")]
    table = table[: table.index(next(line for line in table if line.startswith("└"))) + 1]
    assert len(table) > 10
    assert "\n".join(table) in TEXTS["docs/training.md"]
    hours = re.search(r"longest that fits .*", "\n".join(table))[0]
    assert re.findall(r"[\d.]+(?= h)", hours)[2:] == ["0.25", "1.91", "4.23", "41.53"]
