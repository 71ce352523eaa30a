"""Evaluation by several processes: each video watched once, the report of one process, processes that die."""

import json
import os
import socket
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest

from video_ma2mba.cli import main
from video_ma2mba.data.synthetic import make_story

WATCHED = Path(__file__).with_name("watched.py")
LENGTHS_S = (4, 9, 5, 14, 6, 7)
NOBODY = ("0", "-1")  # dies


@pytest.fixture(scope="module")
def benchmark(tmp_path_factory):
    """Videos of several lengths, with as many questions as their number; one that opens and cannot be read."""
    root, rows = tmp_path_factory.mktemp("benchmark"), []
    for number, length_s in enumerate(LENGTHS_S):
        make_story(seed=number, duration_s=length_s).render(root / f"{number}.mp4")
        for question in range(number + 1):
            options = [f"{letter}. {letter.lower()}" for letter in "ABCD"]
            row = {"videoID": str(number), "question_id": f"{number}-{question}", "question": f"What {question}?"}
            rows.append({**row, "options": options, "answer": "ABCD"[question % 4], "duration": "short"})
    (root / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[::-1]))
    return root


@pytest.fixture(scope="module")
def command(benchmark, model_folder):
    return ["eval", model_folder, "--task", "videomme", "--data", str(benchmark), "-o"]


def report_of(folder):
    """The report and the answers, without the seconds they took."""
    report = json.loads((folder / "report.json").read_text())
    answers = [json.loads(line) for line in (folder / "answers.jsonl").read_text().splitlines()]
    for entry in (report, *answers):
        del entry["watch_s"], entry["answer_s"]
    return report, answers, (folder / "report.md").read_text()


@pytest.fixture(scope="module")
def alone(command, tmp_path_factory):
    """What one process comes to."""
    folder = tmp_path_factory.mktemp("alone") / "out"
    assert main([*command, str(folder)]) == 0
    return report_of(folder)


def torchrun(num, *arguments):
    run = [sys.executable, "-P", "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", num, *arguments]
    return subprocess.run(list(map(str, run)), capture_output=True, text=True, timeout=300)


def launch(num, log, arguments, dies=NOBODY):
    return torchrun(num, WATCHED, log, *dies, *arguments)


def watched_in(log):
    return [line.split() for line in log.read_text().splitlines()]


def test_two_processes_give_the_report_of_one_and_watch_each_video_once(command, alone, tmp_path):
    log, out = tmp_path / "log", tmp_path / "out"
    done = launch(2, log, [*command, out])
    assert done.returncode == 0, done.stderr
    assert report_of(out) == alone
    assert done.stdout.count("accuracy, all") == 1
    assert sorted(name for _, name in watched_in(log)) == sorted(f"{n}.mp4" for n in range(len(LENGTHS_S)))
    frames = Counter()
    for rank, name in watched_in(log):
        frames[rank] += LENGTHS_S[int(name[0])]
    assert abs(frames["0"] - frames["1"]) <= min(LENGTHS_S)  # dealt by length
    assert sorted(path.name for path in out.iterdir()) == [
        "answers.jsonl", "media.jsonl", "questions.jsonl", "report.json", "report.md", "report.png", "settings.json"
    ]  # fmt: skip


def test_the_command_under_torchrun_and_by_shards_gives_the_report_of_one(command, alone, tmp_path):
    done = torchrun(2, "-m", "video_ma2mba.cli", *command, tmp_path / "two")
    assert done.returncode == 0, done.stderr
    assert report_of(tmp_path / "two") == alone
    for shard in ("1/2", "2/2"):
        assert main([*command, str(tmp_path / "shards"), "--shard", shard]) == 0
    assert main(["eval", "merge", str(tmp_path / "shards")]) == 0
    assert report_of(tmp_path / "shards") == alone


@pytest.mark.parametrize("rank", ["0", "1"])
def test_a_process_that_is_killed_ends_all_and_another_number_of_them_goes_on(command, alone, tmp_path, rank):
    log, out = tmp_path / "log", tmp_path / "out"
    start = time.monotonic()
    done = launch(2, log, [*command, out], dies=("1", rank))
    assert done.returncode != 0
    assert time.monotonic() - start < 120
    assert not (out / "report.json").exists()
    before = [name for _, name in watched_in(log)]
    assert before
    done = launch(3, log, [*command, out, "--resume"])
    assert done.returncode == 0, done.stderr
    assert report_of(out) == alone
    again = Counter(name for _, name in watched_in(log))
    # but those whose process was ended between watching and answering
    assert sum(again.values()) <= len(LENGTHS_S) + 1
    assert len(again) == len(LENGTHS_S)


def test_without_a_launcher_that_ends_all_a_silent_process_is_noticed(command, tmp_path):
    """Two processes that were started by hand, as `srun` does it: nobody ends the first when the second dies."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "SILENT_AFTER_S": "5"}
    ranks = [
        subprocess.Popen(
            [sys.executable, str(WATCHED), str(tmp_path / "log"), "0", "1", *command, str(tmp_path / "out")],
            env={**os.environ, **environment, "RANK": str(rank)}, stderr=subprocess.PIPE, text=True,
        )
        for rank in range(2)
    ]  # fmt: skip
    try:
        said = [rank.communicate(timeout=120)[1] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert ranks[1].returncode == -9
    assert ranks[0].returncode == 2
    assert "process 2 of 2 gave no sign of life for 5 s" in said[0]
