"""Shards and their merge, needles dealt to processes, starts that fail, processes that wait for each other."""

import json
import threading
import time
from collections import Counter

import pytest
import torch
from torch.distributed import HashStore

from video_ma2mba import VideoMemory, processes
from video_ma2mba.cli import main
from video_ma2mba.evaluation import niah
from video_ma2mba.processes import Ranks, Share, launched

from .conftest import write
from .test_tasks import mme


@pytest.fixture
def benchmark(tmp_path, clips):
    """Five videos, of which the last does not exist, and three questions about each."""
    root = tmp_path / "benchmark"
    clips(root, *(f"data/{name}.mp4" for name in "abcd"))
    write(root / "test.jsonl", [mme(f"{name}{i}", name, "short", "ABCD"[i]) for i in range(3) for name in "abcde"])
    return root


@pytest.fixture
def command(benchmark, model_folder):
    return ["eval", model_folder, "--task", "videomme", "--data", str(benchmark)]


@pytest.fixture
def watched(monkeypatch):
    """The names of the videos that were watched; "c.mp4" opens and cannot be read."""
    names, watch = [], VideoMemory.watch

    def count(self, path, *args, **kwargs):
        names.append(path.name)
        if path.name == "c.mp4":
            raise ValueError("no frame of it could be read")
        return watch(self, path, *args, **kwargs)

    monkeypatch.setattr(VideoMemory, "watch", count)
    return names


def report_of(folder):
    report = json.loads((folder / "report.json").read_text())
    answers = [json.loads(line) for line in (folder / "answers.jsonl").read_text().splitlines()]
    for entry in (report, *answers):
        del entry["watch_s"], entry["answer_s"]
    return report, answers


def test_shards_come_to_the_report_of_one_process(command, tmp_path, watched, capsys):
    whole, out, away = tmp_path / "whole", tmp_path / "out", tmp_path / "away"
    assert main([*command, "-o", str(whole)]) == 0
    watched.clear()
    assert main([*command, "-o", str(out), "--shard", "1/3"]) == 0
    assert main(["eval", "merge", str(out)]) == 2
    assert "videos are not done yet" in capsys.readouterr().err
    assert main([*command, "-o", str(away), "--shard", "2/3"]) == 0  # on a machine with a disk of its own
    assert main([*command, "-o", str(out), "--shard", "3/3"]) == 0
    assert main([*command, "-o", str(out), "--shard", "3/3"]) == 2
    assert "holds a run already" in capsys.readouterr().err
    assert Counter(watched) == Counter(["a.mp4", "b.mp4", "c.mp4", "d.mp4"])
    assert main(["eval", "merge", str(out), str(away)]) == 0
    assert report_of(out) == report_of(whole)
    assert report_of(out)[0]["problems"] == {"missing medium": 3, "unreadable medium": 3}
    assert "accuracy, all" in capsys.readouterr().out


def test_shards_of_different_runs_are_not_merged(command, tmp_path, capsys):
    assert main([*command, "-o", str(tmp_path / "out"), "--shard", "1/2"]) == 0
    assert main([*command, "-o", str(tmp_path / "out"), "--shard", "2/2", "--frames", "2"]) == 0
    assert main(["eval", "merge", str(tmp_path / "out")]) == 2
    assert "are not of one run" in capsys.readouterr().err
    assert main(["eval", "merge", str(tmp_path)]) == 2
    assert "there is no folder shard-I-of-N" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["eval", "MODEL", "more", "--task", "videomme"], "one model at a time: what is more?"),
        (["eval", "compare", "a", "b", "--limit", "3"], "--limit: for runs, and these are over"),
        (["eval", "merge", "out", "--media-root", "x"], "--media-root: for runs, and these are over"),
        (["eval", "MODEL"], "--task must be given; there are own, videomme"),
        (["eval", "MODEL", "--task", "niah", "--shard", "1/2"], "give each machine --minutes and -o of its own"),
    ],
)
def test_what_does_not_go_together(model_folder, capsys, arguments, said):
    assert main([model_folder if one == "MODEL" else one for one in arguments]) == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    "broken", [["--media-root", "gone"], ["--adapter", "gone"], ["--device", "cuda"], ["--data", "gone"]]
)
def test_a_start_that_fails_leaves_no_folder(command, tmp_path, monkeypatch, broken):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main([*command, "-o", str(tmp_path / "a" / "b"), *broken]) == 2
    assert not (tmp_path / "a").exists()
    (tmp_path / "mine").mkdir()
    assert main([*command, "-o", str(tmp_path / "mine"), *broken]) == 2
    assert list((tmp_path / "mine").iterdir()) == []


def test_ctrl_c_says_what_is_kept(command, tmp_path, monkeypatch, capsys):
    watch = VideoMemory.watch

    def interrupted(self, path, *args, **kwargs):
        if path.name == "b.mp4":
            raise KeyboardInterrupt
        return watch(self, path, *args, **kwargs)

    monkeypatch.setattr(VideoMemory, "watch", interrupted)
    out = tmp_path / "out"
    assert main([*command, "-o", str(out)]) == 130
    assert f"kept in {out}: the same command with --resume goes on" in capsys.readouterr().err
    assert len((out / "answers.jsonl").read_text().splitlines()) == 3
    monkeypatch.undo()
    assert main([*command, "-o", str(out), "--resume"]) == 0


def test_output_among_the_data_is_not_read_as_data(command, benchmark, capsys):
    for number in range(2):
        assert main([*command, "-o", str(benchmark / f"run{number}")]) == 0
        report = json.loads((benchmark / f"run{number}" / "report.json").read_text())
        assert report["problems"] == {"missing medium": 3}


def together(do, count=2):
    """`do(ranks)` in as many threads; their results, or errors."""
    store, results = HashStore(), [None] * count

    def run(index):
        try:
            results[index] = do(Ranks(Share(index, count), store))
        except Exception as error:
            results[index] = error

    threads = [threading.Thread(target=run, args=(index,)) for index in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def test_needles_are_dealt_and_each_is_looked_for_once(model, processor, tmp_path, monkeypatch):
    haystack = torch.randint(0, 255, (24, 3, 28, 28), dtype=torch.uint8)
    needles = niah.synthetic_needles(processor)[:3]
    haystacks = [lambda num_frames: haystack[:num_frames], lambda num_frames: haystack[-num_frames:]]
    arguments = (model, processor, haystacks, needles, [10, 20], [1.0, 0.0, 0.5])
    (tmp_path / "alone").mkdir()
    alone = niah.find_needles(*arguments, tmp_path / "alone")
    asked, ask = [], niah._ask
    monkeypatch.setattr(niah, "_ask", lambda *args: (asked.append(1), ask(*args))[1])
    shown = []
    first, second = together(
        lambda ranks: niah.find_needles(*arguments, tmp_path, lambda *done: shown.append(done), ranks)
    )
    assert first == alone
    assert second == []
    assert len(asked) == 18
    assert shown[0] == (0, 18)
    assert shown[-1] == (18, 18)
    assert [path.name for path in tmp_path.glob("cells*")] == ["cells.jsonl"]


def test_who_waits_hears_of_failures_and_of_silence(monkeypatch):
    def first_fails(ranks):
        ranks.fail() if ranks.is_first else ranks.after_first("data")

    assert "process 1 of 2 ended with an error" in str(together(first_fails)[1])
    monkeypatch.setattr(processes, "SILENT_AFTER_S", 0.5)

    def second_is_silent(ranks):
        ranks.give_sign()
        if ranks.is_first:
            ranks.finish()

    start = time.monotonic()
    assert "process 2 of 2 gave no sign of life for 0 s" in str(together(second_is_silent)[0])
    assert time.monotonic() - start >= 0.5

    def second_is_slow(ranks):
        for _ in range(0 if ranks.is_first else 8):
            ranks.give_sign()
            time.sleep(0.2)
        ranks.finish()
        return ranks.add(1)

    assert sorted(together(second_is_slow)) == [1, 2]


def test_one_process_is_the_first_of_one_and_waits_for_nobody():
    with launched() as ranks:
        ranks.after_first("data")
        ranks.finish()
        assert (ranks.is_first, ranks.share, ranks.add(2), ranks.add(3)) == (True, Share(), 2, 5)
