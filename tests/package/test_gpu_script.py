"""`examples/gpu.py`: every step is one that exists, and a step that fails or hangs is written down."""

import importlib.util
import os
import sys
from pathlib import Path

import pytest

from video_ma2mba.cli import build_parser
from video_ma2mba.cli.bench import BENCHMARKS

PATH = Path(__file__).resolve().parents[2] / "examples" / "gpu.py"


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("gpu_script", PATH)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_step_is_a_benchmark_with_options_it_knows(script):
    for steps in (script.ON_CUDA, script.ON_CPU):
        for command, limit_s in steps.values():
            options = build_parser().parse_args(command)
            assert options.name in BENCHMARKS
            module = importlib.import_module(f"video_ma2mba.benchmark.{options.name}")
            parser = script.argparse.ArgumentParser(exit_on_error=False)
            module.add_arguments(parser)
            assert parser.parse_known_args(options.options)[1] == []
            assert limit_s > 0


def test_the_package_is_laid_out_without_installing(script, tmp_path):
    script.lay_out(tmp_path, None)
    code = "import video_ma2mba.modeling, video_ma2mba.processing; print(video_ma2mba.__file__)"
    step = script.run_step("import", [sys.executable, "-c", code], 120, {**os.environ, "PYTHONPATH": str(tmp_path)})
    assert step["ok"], step
    assert step["output"].startswith(str(tmp_path))


def test_a_step_that_fails_or_hangs_is_written_down(script):
    failing = script.run_step("fails", [sys.executable, "-c", "print(1 / 0)"], 60, dict(os.environ))
    assert not failing["ok"]
    assert "ZeroDivisionError" in failing["errors"]
    forever = "import threading; threading.Event().wait()"
    hanging = script.run_step("hangs", [sys.executable, "-c", forever], 1, dict(os.environ))
    assert not hanging["ok"]
    assert hanging["errors"] == "took more than 1 s"
    good = script.run_step("good", [sys.executable, "-c", "print('{\"a\": 1}')"], 60, dict(os.environ))
    assert good["ok"]
    assert good["result"] == {"a": 1}
