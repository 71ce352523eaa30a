"""The common tests of the installed transformers, from its source package; they are fetched and never kept here.

The source package holds `tests/test_*_common.py` and the mixins, but not all that these import: an empty module stands
in for each such part. What would be tested there (generation above all) is asked in `tests/modeling`.
"""

import importlib.util
import subprocess
import sys
import tarfile
import tempfile
import types
from pathlib import Path

import transformers

PACKAGE = "transformers_tests"  # under this name they are imported
FOLDER = Path(__file__).resolve().parents[2] / "build" / "transformers-source"
MEDIA: dict[str, str] = {}
REMEDY = "fetch it by hand into {}: pip download --no-deps --no-binary :all: transformers=={}"


def fetch() -> Path:
    """The folder `tests` of the installed version's source package, downloaded where it is not yet there."""
    name = f"transformers-{transformers.__version__}"
    tests = FOLDER / name / "tests"
    if tests.is_dir():
        return tests
    FOLDER.mkdir(parents=True, exist_ok=True)
    archive = FOLDER / f"{name}.tar.gz"
    if not archive.is_file():
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", ":all:"]
        done = subprocess.run([*command, "--dest", FOLDER, f"transformers=={transformers.__version__}"])
        if done.returncode:
            raise RuntimeError(
                f"the source package of {name} cannot be downloaded; " + REMEDY.format(FOLDER, transformers.__version__)
            )
    with tempfile.TemporaryDirectory(dir=FOLDER) as partial, tarfile.open(archive) as file:
        wanted = [member for member in file.getmembers() if member.name.startswith(f"{name}/tests/")]
        file.extractall(partial, wanted, filter="data")
        (Path(partial) / name).rename(FOLDER / name)  # whole, or not there
    return tests


def install(media: dict[str, str] | None = None) -> None:
    """Make the tests importable as `transformers_tests`.

    Args:
        media: The kinds "image" and "video" -> a local file, in place of the files that the tests would download.
    """
    MEDIA.update(media or {})  # also where another file of this folder has made them importable before
    if PACKAGE in sys.modules:
        return
    tests = fetch()
    (tests / "__init__.py").touch()
    spec = importlib.util.spec_from_file_location(
        PACKAGE, tests / "__init__.py", submodule_search_locations=[str(tests)]
    )
    assert spec is not None
    sys.modules[PACKAGE] = importlib.util.module_from_spec(spec)

    def local(url: str) -> str:
        return MEDIA.get("image" if url.endswith((".png", ".jpg")) else "video", url)

    stand_in(f"{PACKAGE}.generation")
    stand_in(f"{PACKAGE}.generation.test_utils", GenerationTesterMixin=type("GenerationTesterMixin", (), {}))
    stand_in(f"{PACKAGE}.exporters")
    stand_in(f"{PACKAGE}.exporters.test_export", ExportTesterMixin=type("ExportTesterMixin", (), {}))
    stand_in(f"{PACKAGE}.utils")
    stand_in(f"{PACKAGE}.utils.test_configuration_utils", config_common_kwargs={})
    stand_in("fetch_hub_objects_for_ci", url_to_local_path=local)


def stand_in(name: str, **contents: object) -> None:
    """An importable module that holds no more than the contents."""
    module = sys.modules[name] = types.ModuleType(name)
    module.__path__ = []
    vars(module).update(contents)


if __name__ == "__main__":  # once before several processes want it
    print(fetch())
