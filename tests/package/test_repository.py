"""What holds for the repository as a whole: its files and its packages."""

import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
ROOMS = [ROOT / "modeling", ROOT / "processing", ROOT / "src"]
PYTHON_FILES = [path for folder in [*ROOMS, ROOT / "examples", ROOT / "tests"] for path in folder.rglob("*.py")]


def test_every_package_folder_is_installed():
    setuptools = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    homes = {ROOT / folder: name for name, folder in setuptools["package-dir"].items()}
    found = set()
    for init in (init for room in ROOMS for init in room.rglob("__init__.py")):
        home = next(home for home in homes if init.is_relative_to(home))
        found.add(".".join([homes[home], *init.parent.relative_to(home).parts]))
    assert found | {"video_ma2mba.tiny_model"} == set(setuptools["packages"])  # the model is files, and no code


def test_folders_with_code_are_packages():
    assert all((path.parent / "__init__.py").exists() for room in ROOMS for path in room.rglob("*.py"))


def test_files_stay_short():
    lengths = {path.relative_to(ROOT): len(path.read_text(encoding="utf-8").splitlines()) for path in PYTHON_FILES}
    assert {path: length for path, length in lengths.items() if length >= 500} == {}


def test_no_pickle_anywhere():
    for folder in [*ROOMS, ROOT / "examples", ROOT / "tests", ROOT / "model_cards"]:
        assert not [path for suffix in ("bin", "pt", "pth", "pkl", "ckpt") for path in folder.rglob(f"*.{suffix}")]
    importing = re.compile(r"^\s*(import|from)\s+(pickle|cPickle|dill|joblib|cloudpickle)\b", re.MULTILINE)
    users = [path for room in ROOMS for path in room.rglob("*.py") if importing.search(path.read_text("utf-8"))]
    assert not users
