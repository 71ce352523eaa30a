"""`bench device` at a tiny size on the CPU: what is counted there, and what only a GPU has."""

import json

import pytest

from video_ma2mba.cli import main
from video_ma2mba.modeling.checkpoint_costs import LAUNCHES


def run(capsys, *arguments):
    assert main(["bench", "device", *arguments]) == 0
    return json.loads(capsys.readouterr().out)


def test_launches_are_told_beside_those_planned_for(capsys):
    one, some = run(capsys, "launches", "--tokens", "64")["rows"]
    assert one == {"tokens": 1, "forward": one["forward"]}
    assert some["with_recompute"] == some["forward"] + some["forward_backward"]
    assert some["planned"] == LAUNCHES


def test_what_a_machine_has_not_is_said_and_the_rest_is_measured(capsys):
    report = run(capsys, "decode", "--new-tokens", "2")
    assert [row["way"] for row in report["rows"]] == ["step by step"]
    assert report["rows"][0]["tokens_per_s"] > 0
    assert set(report["failures"]) == {"captured graph", "mamba_ssm"}


def test_watching_and_offload(capsys):
    rows = run(capsys, "watch", "--frames", "4")["rows"]
    assert all(row["frames_per_s"] > 0 for row in rows)
    (row,) = run(capsys, "offload", "--tokens", "64", "--repeats", "1")["rows"]
    assert row["step_s_p20"] <= row["step_s"] <= row["step_s_p80"]
    assert row["ratio"] == pytest.approx(row["offload_step_s"] / row["step_s"])


def test_nonsense_is_refused(capsys):
    assert main(["bench", "device", "watch", "--frames", "0"]) == 2
    assert "--frames: must be a whole number from 1" in capsys.readouterr().err
