"""`examples/gpu.py`: every step is one that exists, and a step that fails or hangs is written down."""

import importlib.util
import json
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
    for parts in (script.ON_CUDA, script.ON_CPU):
        for command, limit_s in (step for part in parts for step in part.values()):
            assert limit_s > 0
            if command[0] == "pytest":
                assert all((PATH.parents[1] / folder).is_dir() for folder in command[1:])
                continue
            options = build_parser().parse_args(command)
            assert options.name in BENCHMARKS
            module = importlib.import_module(f"video_ma2mba.benchmark.{options.name}")
            parser = script.argparse.ArgumentParser(exit_on_error=False)
            module.add_arguments(parser)
            assert parser.parse_known_args(options.options)[1] == []


def test_parts_end_within_nine_minutes_and_all_within_twenty_five(script):
    limits = [sum(limit_s for _, limit_s in part.values()) for part in script.ON_CUDA]
    assert len(limits) == 3
    assert max(limits) <= script.PART_S <= 9 * 60
    assert sum(limits) <= 25 * 60
    assert [list(part) for part in script.ON_CUDA] != [list(part) for part in script.ON_CPU]
    assert {name for part in script.ON_CPU for name in part} <= {name for part in script.ON_CUDA for name in part}


def test_a_part_goes_on_where_it_stood_and_keeps_what_a_step_had(script, tmp_path, monkeypatch):
    output, ran = tmp_path / "gpu.json", []

    def step(name, command, limit_s, environment, kept):
        ran.append(name)
        return {"command": "", "ok": name != "bad", "seconds": 1.0}

    monkeypatch.setattr(script, "run_step", step)
    report = {"device": "cpu", "steps": {"done": {"ok": True, "seconds": 1.0}}}
    part = {"done": (["bench", "x"], 9), "bad": (["bench", "y"], 9), "next": (["bench", "z"], 9)}
    script.run_part(part, report, output, {})
    assert ran == ["bad", "next"]
    assert json.loads(output.read_text()) == report
    assert "| bad | FAILED | 1 |" in output.with_suffix(".md").read_text()
    script.run_part(part, report, output, {})
    assert ran == ["bad", "next", "bad"]
    script.run_part({"late": part["bad"]}, report, output, {}, part_s=0)
    assert "late" not in report["steps"]


def test_what_a_step_kept_survives_its_time_limit(script, tmp_path):
    kept = tmp_path / "kept.json"
    code = f"import pathlib, threading; pathlib.Path({str(kept)!r}).write_text('{{}}'); threading.Event().wait()"
    step = script.run_step("hangs", [sys.executable, "-c", code], 2, dict(os.environ), kept)
    assert not step["ok"]
    assert step["result"] == {}


def test_the_table_has_the_papers_figures_beside_ours(script):
    row = {
        "tokens": 2**16, "method": "per layer", "planned_activations_bytes": 10**9, "planned_bytes": 3 * 10**9,
        "peak_bytes": 3_300_000_000, "tokens_per_s": 9000.0,
    }  # fmt: skip
    gone = {**row, "method": "off", "tokens": 2**14, "out_of_memory": True, "peak_bytes": None, "tokens_per_s": None}
    result = {"rows": [row, gone], "machine": {"device": "a GPU"}}
    tests = {"ok": True, "seconds": 1.0}
    text = script.as_table({"steps": {"tests": tests, "train_long": {"ok": True, "seconds": 9.0, "result": result}}})
    assert "| 65536 | per layer | 1.3 | 1 | 69.3 | +10.0% | 9,000 | 8,450 |" in text
    assert "| 16384 | off | out of memory | 1 | 42.6 |" in text


@pytest.mark.parametrize(
    ("tests", "said"),
    [
        (None, ["**No figures: the tests have not run."]),
        ({"ok": False, "seconds": 1.0, "output": "1 failed"}, ["**No figures: tests failed.", "```\n1 failed\n```"]),
        ({"ok": True, "seconds": 1.0}, []),
    ],
)
def test_figures_after_a_red_test_are_refused(tests, said, script):
    watch = {"ok": True, "seconds": 1.0, "result": {"rows": [{"vision_chunk_size": 8, "frames_per_s": 9.0}]}}
    text = script.as_table({"steps": {**({"tests": tests} if tests else {}), "watch": watch}})
    assert all(words in text for words in said)
    assert ("## watch" in text) == (not said) == ("No figures" not in text)
    assert "| watch | well |" in text


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
