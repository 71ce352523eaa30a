"""The command's frame: exit codes, tracebacks on request, benchmarks."""

import json
import re
import sys
from types import SimpleNamespace

import pytest

from video_ma2mba import cli
from video_ma2mba.cli import bench
from video_ma2mba.files import write_json
from video_ma2mba.loading import find_model


def fail_with(error):
    def run(args):
        raise error

    return run


def test_help_names_every_command(capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main(["--help"])
    assert stopped.value.code == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert all(module.HELP in printed for module in cli.COMMANDS.values())


@pytest.mark.parametrize(
    "arguments", [[], ["sing"], ["ask"], ["ask", "a.mp4", "Why?", "--device", "tpu"], ["bench", "nothing"]]
)
def test_misuse_exits_with_2(arguments, capsys):
    assert cli.main(arguments) == cli.EXIT_USER_ERROR
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert err.startswith("error: ")
    assert re.search(r"; see `video-ma2mba( ask| bench)? --help`\n$", err)


def test_a_bench_whose_output_is_a_folder_does_not_run(tmp_path, capsys):
    assert cli.main(["bench", "backends", "-o", str(tmp_path)]) == cli.EXIT_USER_ERROR
    said = f"cannot write {tmp_path}: it is a folder; name a file; see `video-ma2mba bench backends --help`"
    assert capsys.readouterr() == ("", f"error: argument -o/--output: {said}\n")


def test_an_empty_name_is_no_model():
    """As a recipe may have it."""
    with pytest.raises(ValueError, match="there is no such folder, and a Hub id looks like owner/name"):
        find_model("")


@pytest.mark.parametrize("bench", ["study stability", "memory", "memory-of-video"])
def test_a_picture_that_could_not_be_written_is_told_before_it_runs(bench, capsys):
    assert cli.main(["bench", *bench.split(), "--plot", "no/such.png"]) == cli.EXIT_USER_ERROR
    assert "argument --plot: cannot write no/such.png: create the folder no first" in capsys.readouterr().err


def test_a_measured_memory_refuses_what_is_for_counting(capsys):
    assert cli.main(["bench", "memory", "--device", "cpu", "--plot", "a.png", "--resume", "-o", "a.json"]) == 2
    assert "--plot, --resume: of what is counted; with --device cpu leave it out" in capsys.readouterr().err


def test_an_option_that_a_command_has_not(capsys):
    assert cli.main(["plan", "--model", "3.1b", "--hours", "2", "--foo"]) == cli.EXIT_USER_ERROR
    assert capsys.readouterr().err == "error: --foo: no such option; see `video-ma2mba plan --help`\n"


def test_a_closed_stdout_is_no_failure(monkeypatch):
    monkeypatch.setattr(cli.ask, "run", lambda args: None)
    monkeypatch.setattr(sys, "stdout", None)
    assert cli.main(["ask", "a.mp4", "Why?"]) == 0


@pytest.mark.parametrize("given", ["0", "-1", "1.5", "nan", "many", "1_000", "\u0663", "9" * 30])
def test_what_is_counted_is_at_least_one(given, capsys):
    assert cli.main(["bench", "decode", "--repeats", given]) == cli.EXIT_USER_ERROR
    assert (
        f"argument --repeats: must be a whole number from 1 to 999,999,999,999, got {given}; "
        in capsys.readouterr().err
    )


@pytest.mark.parametrize("given", ["0", "-1", "nan", "inf", "many", "1_0", "\u0663", "1e308", "1e-320"])
def test_what_is_measured_is_above_zero(given, capsys):
    assert cli.main(["bench", "decode", "--minutes", given]) == cli.EXIT_USER_ERROR
    assert f"argument --minutes: must be a number from 1e-09 to 1e+09, got {given}; " in capsys.readouterr().err


@pytest.mark.parametrize("error", [ValueError("not so"), OSError("not so")])
def test_user_error(error, monkeypatch, capsys):
    monkeypatch.setattr(cli.ask, "run", fail_with(error))
    assert cli.main(["ask", "a.mp4", "Why?"]) == cli.EXIT_USER_ERROR
    assert capsys.readouterr() == ("", "error: not so\n")


def test_traceback_on_request(monkeypatch):
    monkeypatch.setattr(cli.ask, "run", fail_with(ValueError("not so")))
    monkeypatch.setenv("VIDEO_MA2MBA_TRACEBACK", "1")
    with pytest.raises(ValueError, match="not so"):
        cli.main(["ask", "a.mp4", "Why?"])


def test_package_of_an_extra_that_is_not_there(monkeypatch, capsys):
    monkeypatch.setattr(cli.train, "run", fail_with(ModuleNotFoundError(name="datasets.arrow")))
    assert cli.main(["train", "finetune"]) == cli.EXIT_USER_ERROR
    assert "datasets: pip install 'video-ma2mba[train]'" in capsys.readouterr().err


def test_any_other_package_that_is_not_there_is_our_fault(monkeypatch):
    monkeypatch.setattr(cli.train, "run", fail_with(ModuleNotFoundError(name="torch")))
    with pytest.raises(ModuleNotFoundError):
        cli.main(["train", "finetune"])


def test_our_own_faults_keep_their_traceback(monkeypatch):
    monkeypatch.setattr(cli.ask, "run", fail_with(TypeError("a bug")))
    with pytest.raises(TypeError, match="a bug"):
        cli.main(["ask", "a.mp4", "Why?"])


@pytest.mark.parametrize(("kept", "said"), [("", "interrupted\n"), ("3 frames", "interrupted; 3 frames\n")])
def test_interrupt_is_a_line(kept, said, monkeypatch, capsys):
    monkeypatch.setattr(cli.ask, "run", fail_with(KeyboardInterrupt(*[kept] * bool(kept))))
    assert cli.main(["ask", "a.mp4", "Why?"]) == cli.EXIT_INTERRUPTED
    assert capsys.readouterr() == ("", said)


# --- bench ---


@pytest.fixture
def doubling(monkeypatch):
    """A benchmark in place of `scan` that doubles a number."""
    module = SimpleNamespace(
        __doc__="Double a number.",
        add_arguments=lambda parser: parser.add_argument("--number", type=int, default=1),
        run=lambda options: {"double": 2 * options.number},
    )
    monkeypatch.setitem(sys.modules, "video_ma2mba.benchmark.scan", module)


@pytest.mark.parametrize("name", bench.BENCHMARKS)
def test_benchmarks_are_there(name):
    module = bench.load(name)
    assert module.__doc__
    assert callable(module.add_arguments)
    assert callable(module.run)


def test_bench_prints_json(doubling, capsys):
    assert cli.main(["bench", "scan", "--number", "21"]) == 0
    assert json.loads(capsys.readouterr().out) == {"double": 42}


def test_bench_writes_a_file(doubling, tmp_path):
    path = tmp_path / "scan.json"
    path.write_text("what was there")
    assert cli.main(["bench", "scan", "-o", str(path)]) == 0
    assert json.loads(path.read_text()) == {"double": 2}
    assert list(tmp_path.iterdir()) == [path]


def test_bench_needs_the_folder(doubling, tmp_path, capsys):
    assert cli.main(["bench", "scan", "-o", str(tmp_path / "no" / "scan.json")]) == cli.EXIT_USER_ERROR
    assert str(tmp_path / "no") in capsys.readouterr().err


def test_failed_write_keeps_the_old_file(tmp_path):
    path = tmp_path / "scan.json"
    path.write_text("what was there")
    with pytest.raises(TypeError):
        write_json(path, {"not json": object()})
    assert path.read_text() == "what was there"
    assert list(tmp_path.iterdir()) == [path]
