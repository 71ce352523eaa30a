"""Many records and many workers: the same manifest, shards of machines, memory, streams."""

import json
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import pytest
from datasets.distributed import split_dataset_by_node

from video_ma2mba.cli import main
from video_ma2mba.data import frame_cache, media
from video_ma2mba.data.manifest import load_manifest
from video_ma2mba.data.prepare import prepare
from video_ma2mba.data.records import read_items
from video_ma2mba.processes import Share, deal, files_of, in_threads

from ..forked import run_killed
from .test_prepare import VIDEO, chat, text, write


@pytest.fixture
def many(tmp_path, media):
    """Twenty videos, of which two cannot be read, and three questions about each, two of them alike."""
    names = [f"{number}.mp4" for number in range(20)]
    root = media(*names)
    (root / "7.mp4").write_bytes(b"no video" * 100)
    (root / "13.mp4").write_bytes(b"")
    records = [
        {"id": str(number), "messages": chat({"type": "video", "path": names[number % 20]}, text(f"{number % 40}?"))}
        for number in range(60)
    ]
    return write(tmp_path / "a.jsonl", *records), root


@pytest.fixture
def opened(monkeypatch):
    """The names of the videos that were opened to look at them."""
    names, probe = [], media.probe_video
    monkeypatch.setattr(media, "probe_video", lambda path: (names.append(path.name), probe(path))[1])
    return names


def files_in(folder, *, without=()):
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name not in without
    }


@pytest.mark.parametrize("options", [{}, {"cache": "raw"}, {"parquet": True}], ids=["lines", "frames", "parquet"])
def test_several_workers_write_what_one_writes_byte_for_byte(tmp_path, many, processor, options):
    if "cache" in options:
        options = {"cache": {"processor": processor.video_processor, "fps": 1.0, "encoding": "raw"}}
    reports = [
        prepare(*many, tmp_path / str(num_workers), num_workers=num_workers, **options) for num_workers in (1, 2, 7)
    ]
    assert reports[0]["records"] == {"read": 60, "kept": 54, "left_out": {"unreadable medium": 6}}
    assert reports[0] == reports[1] == reports[2]
    one, two, seven = (files_in(tmp_path / name) for name in ("1", "2", "7"))
    assert one == two == seven
    assert len(one["left_out.jsonl"].splitlines()) == 6


def test_shards_look_at_each_medium_once_and_the_last_run_takes_them_over(tmp_path, many, processor, opened):
    cache = {"processor": processor.video_processor, "fps": 1.0, "encoding": "raw"}
    prepare(*many, tmp_path / "alone", cache=cache)
    opened.clear()
    out = tmp_path / "out"
    reports = [prepare(*many, out, cache=cache, share=Share(index, 3), num_workers=2) for index in range(3)]
    assert not (out / "manifest.jsonl").exists()
    assert sum(report["media"] for report in reports) == 20
    assert min(report["media"] for report in reports) > 2
    assert set(Counter(opened).values()) == {1}
    opened.clear()
    report = prepare(*many, out, cache=cache)
    assert opened == []
    assert report["cached_frames"] == 18 * 6
    ours = {f"media-{index}-of-3.jsonl" for index in (1, 2, 3)}
    assert files_in(out, without={"media.jsonl", *ours}) == files_in(tmp_path / "alone", without={"media.jsonl"})


def test_a_run_of_several_workers_that_was_killed_stores_each_video_once(tmp_path, many, model_folder, monkeypatch):
    source, root = many
    command = ["data", "prepare", str(source), "--media-root", str(root), "--workers", "2", "--model", model_folder]
    command += ["--cache-frames", "raw", "-o"]
    run_killed([*command, tmp_path / "killed"], "video_ma2mba.data.frame_cache:_encode", after=6)
    stored = [path.name for path in (tmp_path / "killed" / "frames").iterdir() if not path.name.startswith(".")]
    assert 4 <= len(stored) <= 6
    encode, encoded = frame_cache._encode, []
    monkeypatch.setattr(frame_cache, "_encode", lambda *args: (encoded.append(1), encode(*args))[1])
    assert main([*command, str(tmp_path / "killed")]) == 0
    assert len(encoded) == 18 - len(stored)
    assert main([*command, str(tmp_path / "whole")]) == 0
    ours = {"media.jsonl"}  # in which a kill leaves an empty line
    assert files_in(tmp_path / "killed", without=ours) == files_in(tmp_path / "whole", without=ours)


def test_ctrl_c_says_what_is_kept_and_does_not_wait_for_a_long_video(tmp_path, many, model_folder, capsys, monkeypatch):
    source, root = many
    write_frames, seen = frame_cache.write_frames, threading.Event()

    def endless(root, video, *args, stop, **kwargs):
        if video != "1.mp4":
            return write_frames(root, video, *args, stop=stop, **kwargs)
        seen.set()
        while not stop():
            time.sleep(0.01)
        raise KeyboardInterrupt

    monkeypatch.setattr("video_ma2mba.data.prepare.write_frames", endless)
    out = tmp_path / "out"
    monkeypatch.setattr("video_ma2mba.cli.data.progress_bars", lambda: interrupting("storing frames", seen))
    command = ["data", "prepare", str(source), "--media-root", str(root), "--workers", "2", "--model", model_folder]
    assert main([*command, "--cache-frames", "raw", "-o", str(out)]) == 130
    assert f"kept in {out}: the same command goes on" in capsys.readouterr().err
    assert not (out / "manifest.jsonl").exists()


class interrupting:  # noqa: N801
    """Progress bars that press Ctrl-C where the first of something is done and the second has begun."""

    def __init__(self, what, seen):
        self.what, self.seen = what, seen

    def __enter__(self):
        return self.show

    def __exit__(self, *args):
        pass

    def show(self, what, done, total):
        if what == self.what:
            assert self.seen.wait(60)
            raise KeyboardInterrupt


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss counts in other units")
def test_memory_does_not_grow_with_the_number_of_records(tmp_path, media):
    root = media("good.mp4")
    script = Path(__file__).with_name("many_records.py")
    command = [sys.executable, str(script), str(root), "4000", "20000"]
    few, many = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    # 16,000 more records are 20 MB of text, and were 100 MB of objects
    assert many - few < 24


@pytest.mark.usefixtures("ending_streams")
def test_a_stream_of_several_files_is_dealt_to_nodes_and_goes_on_where_it_stood(tmp_path, media):
    clips = [{**VIDEO, "start_s": number / 10, "end_s": 6.0} for number in range(25)]
    records = [{"id": str(number), "messages": chat(clip, text("?"))} for number, clip in enumerate(clips)]
    source, root, out = write(tmp_path / "a.jsonl", *records), media("good.mp4"), tmp_path / "out"
    prepare(source, root, out, parquet=True, rows_per_file=3)
    assert [file.name for file in files_of(out / "manifest.parquet")] == [
        f"manifest-{number}-of-9.parquet" for number in range(1, 10)
    ]
    ids = [str(number) for number in range(25)]
    assert load_manifest(out)["id"] == ids
    stream = load_manifest(out, streaming=True)
    assert stream.num_shards == 9
    dealt = [[row["id"] for row in split_dataset_by_node(stream, rank, 3)] for rank in range(3)]
    assert sorted(one for part in dealt for one in part) == sorted(ids)
    assert [len(part) for part in dealt] == [9, 9, 7]

    shuffled = stream.shuffle(seed=1, buffer_size=1)
    whole = [row["id"] for row in shuffled]
    rows = iter(shuffled)
    begun = [next(rows)["id"] for _ in range(10)]
    state = shuffled.state_dict()
    again = load_manifest(out, streaming=True).shuffle(seed=1, buffer_size=1)
    again.load_state_dict(state)
    assert begun + [row["id"] for row in again] == whole

    prepare(source, root, out)  # and one file is one again
    assert [path.name for path in out.glob("manifest*")] == ["manifest.jsonl"]
    assert load_manifest(out)["id"] == ids


def test_a_file_of_one_line_names_the_record(tmp_path, media):
    (tmp_path / "a.json").write_text(json.dumps([{"id": "x", "messages": chat(VIDEO, text("?"))}, {"id": "y"}, 3]))
    report = prepare(tmp_path / "a.json", media("good.mp4"), tmp_path / "out", name="messages")
    assert [problem["where"] for problem in report["problems"]] == ["a.json:1, entry 2", "a.json:1, entry 3"]


@pytest.mark.parametrize("indent", [None, 1])
def test_a_json_list_is_read_piece_by_piece(tmp_path, monkeypatch, indent):
    """Wherever a piece ends: in the middle of a number, of an escape, between a key and its colon."""
    values = [{"a": -12.5e3, "text": 'quo"te \\ \u00e9\U0001f600'}, 12345, "x" * 50, [], {}, True, None, [1, [2]]]
    for value in (values, {f"key {number}": value for number, value in enumerate(values)}):
        file = tmp_path / "a.json"
        file.write_text(json.dumps(value, indent=indent))
        expected = value if isinstance(value, list) else [{"key": k, "value": v} for k, v in value.items()]
        for size in (1, 2, 3, 7, 1 << 16):
            monkeypatch.setattr("video_ma2mba.data.records._CHARACTERS", size)
            items = list(read_items(file))
            assert [item.value for item in items] == expected
            lines = file.read_text().splitlines()
            for item in items:
                place = item.where.removeprefix("a.json:").partition(",")[0]
                assert 1 <= int(place) <= len(lines)


def test_what_was_written_among_the_data_is_not_read_as_data(tmp_path, media):
    root = media("good.mp4")
    write(root / "a.jsonl", {"id": "x", "messages": chat(VIDEO, text("?"))})
    for _ in range(2):
        report = prepare(root, root, root / "prepared")
        assert report["records"] == {"read": 1, "kept": 1, "left_out": {}}
    report = prepare(root, root, root / "other")
    assert report["sources"] == [{"file": "a.jsonl", "format": "messages"}]
    with pytest.raises(ValueError, match="choose another output"):
        prepare(root, root, root)


def test_nothing_kept_is_an_error(tmp_path, media, capsys):
    source = write(tmp_path / "a.jsonl", {"id": "x", "messages": chat({"type": "video", "path": "no.mp4"}, text("?"))})
    assert main(["data", "prepare", str(source), "--media-root", str(media()), "-o", str(tmp_path / "out")]) == 2
    assert (
        "not one of 1 records can be used; the first: 'no.mp4' is not under the media root" in capsys.readouterr().err
    )


def test_under_a_launcher_it_is_refused_by_name(tmp_path, media, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    source = write(tmp_path / "a.jsonl", {"id": "x", "messages": chat(VIDEO, text("?"))})
    assert main(["data", "prepare", str(source), "--media-root", str(media()), "-o", str(tmp_path / "out")]) == 2
    assert "start it without torchrun, with --workers N" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_half_a_character_is_left_out(tmp_path, media):
    source = tmp_path / "a.jsonl"
    write(source, {"id": "x", "messages": chat(VIDEO, text("A \ud83d?"))}, {"id": "y", "messages": chat(VIDEO)})
    report = prepare(source, media("good.mp4"), tmp_path / "out")
    assert report["records"] == {"read": 2, "kept": 1, "left_out": {"malformed": 1}}
    assert "half of a character" in report["problems"][0]["message"]


def test_work_is_dealt_by_what_it_costs():
    costs = {"a": 1.0, "b": 9.0, "c": 5.0, "d": 4.0, "e": 1.0}
    assert deal(costs, 2) == [["a", "b"], ["c", "d", "e"]]
    assert deal(costs, 1) == [list(costs)]
    assert deal({}, 2) == [[], []]
    assert sorted(one for index in range(7) for one in Share(index, 7).of(costs)) == sorted(costs)
    assert Share.parse("2/4") == Share(1, 4)
    for wrong in ("0/4", "5/4", "4", "a/b", "-1/2"):
        with pytest.raises(ValueError, match="i from 1 to n"):
            Share.parse(wrong)


def test_threads_give_results_in_order_and_an_error_ends_them():
    assert list(in_threads(lambda x: x * x, range(50), 3)) == [(x, x * x) for x in range(50)]
    done = []

    def fail(x):
        done.append(x)
        if x == 5:
            raise ValueError("five")

    with pytest.raises(ValueError, match="five"):
        list(in_threads(fail, range(1000), 2))
    assert len(done) < 50
