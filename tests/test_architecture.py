"""The house: which room may import which, and what the two rooms that travel to the Hub must look like."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "src" / "video_ma2mba"
HUB_ROOMS = {name: sorted((ROOT / name).glob("*.py")) for name in ("modeling", "processing")}
TOOLS = sorted(PACKAGE.rglob("*.py"))


def imports(path):
    """(module, its level of dots) of every import in a file, wherever it stands."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((alias.name, 0) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module or "", node.level


def resolved(path):
    """The modules of the package that a tool imports, from `video_ma2mba` on."""
    here = ("video_ma2mba", *path.relative_to(PACKAGE).with_suffix("").parts)
    for module, level in imports(path):
        if level:
            yield ".".join((*here[: len(here) - level], *(part for part in module.split(".") if part)))
        elif module.split(".")[0] == "video_ma2mba":
            yield module


@pytest.mark.parametrize("room", HUB_ROOMS)
def test_a_hub_room_imports_only_its_own_files_and_published_packages(room):
    names = {path.stem for path in HUB_ROOMS[room]}
    for path in HUB_ROOMS[room]:
        for module, level in imports(path):
            assert level <= 1, f"{path.name} reaches out of its room"
            assert level == 0 or module == "" or module in names, f"{path.name} imports .{module}, which is not here"
            assert module.split(".")[0] not in ("video_ma2mba", "modeling", "processing"), path.name


def test_the_hub_rooms_are_flat_and_no_file_name_is_in_both():
    for room, files in HUB_ROOMS.items():
        assert [path for path in (ROOT / room).iterdir() if path.is_dir() and path.name != "__pycache__"] == []
        assert files
    one, other = ({path.name for path in files} - {"__init__.py"} for files in HUB_ROOMS.values())
    assert one & other == set()


def test_nothing_but_the_command_line_imports_the_command_line():
    importers = {
        str(path.relative_to(PACKAGE))
        for path in TOOLS
        for module in resolved(path)
        if module.startswith("video_ma2mba.cli") and path.parent.name != "cli"
    }
    assert importers == set()


def test_the_plan_needs_no_torch():
    modules = {module.split(".")[0] for module, level in imports(ROOT / "modeling" / "checkpoint_plan.py") if not level}
    assert not modules & {"torch", "transformers"}


def test_examples_use_the_public_package():
    for path in (ROOT / "examples").glob("*.py"):
        for module, level in imports(path):
            assert level == 0, path.name
            assert not module.startswith("video_ma2mba.cli"), path.name
