"""The house: which room may import which, and what the two rooms that travel to the Hub must look like."""

import ast
import inspect
import re
from dataclasses import is_dataclass
from graphlib import TopologicalSorter
from pathlib import Path

import pytest
from transformers import PreTrainedConfig

import video_ma2mba
from video_ma2mba import modeling

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "src" / "video_ma2mba"
HUB_ROOMS = {name: sorted((ROOT / name).glob("*.py")) for name in ("modeling", "processing")}
TOOLS = sorted(PACKAGE.rglob("*.py"))
PARTS = {path: ("video_ma2mba", *path.relative_to(PACKAGE).with_suffix("").parts) for path in TOOLS}
PARTS |= {path: ("video_ma2mba", room, path.stem) for room, paths in HUB_ROOMS.items() for path in paths}


def imports(path):
    """(module, its level of dots) of every import in a file, wherever it stands."""
    for module, level, _ in imported_names(path):
        yield module, level


def imported_names(path):
    """(module, its level of dots, the name taken from it or None) of every import in a file, wherever it stands."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((alias.name, 0, None) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from ((node.module or "", node.level, alias.name) for alias in node.names)


def resolved(path):
    """(module, name taken from it or None) of what a file imports from the package, from `video_ma2mba` on."""
    here = PARTS[path]
    for module, level, name in imported_names(path):
        if level:
            yield ".".join((*here[: len(here) - level], *(part for part in module.split(".") if part))), name
        elif module.split(".")[0] == "video_ma2mba":
            yield module, name


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


def test_the_map_of_modeling_is_whole_and_the_primitive_has_the_loops_it_names():
    modules = {path.stem: path for path in HUB_ROOMS["modeling"] if path.stem != "__init__"}
    assert set(modules) <= set(re.findall(r"\w+", modeling.__doc__))
    users = {name for name, path in modules.items() if ("run_layers", 1, "run_layers") in imported_names(path)}
    assert users == {"mamba2", "checkpointing"}


def test_the_paths_that_contributing_names_lead_there():
    page = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| [^`|]+ \| `(\S+\.py)` \| (.+) \|$", page, re.MULTILINE)
    assert len(rows) == 5
    for file, places in rows:
        for name, elsewhere in re.findall(r"`([\w.]+)`(?: in `(\S+)`)?", places):
            text = (ROOT / (elsewhere or file)).read_text(encoding="utf-8")
            for part in name.split("."):
                assert re.search(rf"^ *(class|def) {part}\b", text, re.MULTILINE), (file, name)


def test_nothing_but_the_command_line_imports_the_command_line():
    importers = {
        str(path.relative_to(PACKAGE))
        for path in TOOLS
        for module, name in resolved(path)
        if f"{module}.{name}".startswith("video_ma2mba.cli") and path.parent.name != "cli"
    }
    assert importers == set()


def test_no_module_imports_itself_by_way_of_others():
    """Wherever an import stands: at the top, in a function, or for types alone."""
    names = {path: ".".join(parts).removesuffix(".__init__") for path, parts in PARTS.items()}
    known = set(names.values())
    graph = {
        names[path]: {f"{module}.{name}" if f"{module}.{name}" in known else module for module, name in resolved(path)}
        for path in PARTS
    }
    assert set().union(*graph.values()) <= known
    tuple(TopologicalSorter(graph).static_order())  # CycleError names the circle


def test_examples_use_the_public_package():
    for path in (ROOT / "examples").glob("*.py"):
        for module, level in imports(path):
            assert level == 0, path.name
            assert not module.startswith("video_ma2mba.cli"), path.name


def public_callables():
    """(name, function, class or None) of what the public names offer beyond the classes of others they build on."""
    for name in video_ma2mba.__all__:
        thing = getattr(video_ma2mba, name)
        if inspect.isfunction(thing):
            yield name, thing, None
            continue
        others = [base for base in thing.__mro__ if not base.__module__.startswith("video_ma2mba.")]
        for method, function in inspect.getmembers(thing, inspect.isroutine):
            inherited = any(hasattr(base, method) for base in others) and method not in ("__init__", "forward")
            if method == "__init__" or not (inherited or method.startswith("_")):
                yield f"{name}.{method}", function, thing


DOCUMENTED = {
    name: f"{inspect.getdoc(function)}\n{owner and owner.__doc__}" for name, function, owner in public_callables()
}


@pytest.mark.parametrize(("name", "function", "owner"), [pytest.param(*one, id=one[0]) for one in public_callables()])
def test_public_names_are_documented(name, function, owner):
    """Every argument is named, there or where the docstring refers to, and whoever raises says so."""
    assert inspect.getdoc(function) if owner is None else owner.__doc__
    said = DOCUMENTED[name]
    near = f"{owner and owner.__name__}."
    said += "".join(
        DOCUMENTED.get(other) or DOCUMENTED.get(near + other, "") for other in re.findall(r"`([\w.]+)`", said)
    )
    arguments = set(inspect.signature(function).parameters) - {"self", "cls", "args", "kwargs"}
    if owner is not None and issubclass(owner, PreTrainedConfig):
        arguments &= set(owner.__annotations__)  # the others are those of every configuration
    assert {argument for argument in arguments if not re.search(rf"\b{argument}\b", said)} == set()
    written = inspect.getsource(function) if inspect.isfunction(function) and not is_dataclass(owner) else ""
    assert "Raises:" in said or not re.search(r"^ +raise \w", written, re.MULTILINE)
