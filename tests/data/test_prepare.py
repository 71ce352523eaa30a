"""What is left out, and why; runs that were interrupted; frames that are stored."""

import json
import os
from itertools import pairwise

import pytest
import torch

from video_ma2mba.cli import main
from video_ma2mba.data.collator import INFO, VideoChatCollator
from video_ma2mba.data.manifest import load_manifest
from video_ma2mba.data.prepare import prepare

from ..forked import run_killed

VIDEO = {"type": "video", "path": "good.mp4"}


def chat(*content, answer="Yes."):
    return [{"role": "user", "content": list(content)}, {"role": "assistant", "content": answer}]


def write(path, *records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def text(words):
    return {"type": "text", "text": words}


def test_every_kind_of_bad_sample_is_reported_and_the_counts_add_up(tmp_path, media):
    root = media("good.mp4", "other.mp4")
    (root / "corrupt.mp4").write_bytes(b"no video" * 100)
    (tmp_path / "secret.mp4").write_bytes((root / "good.mp4").read_bytes())
    (root / "link.mp4").symlink_to(tmp_path / "secret.mp4")
    good = {"id": "good", "messages": chat(VIDEO, text("A question?"))}
    bad = {
        "missing medium": {"messages": chat({"type": "video", "path": "gone.mp4"}, text("?"))},
        "unreadable medium": {"messages": chat({"type": "video", "path": "corrupt.mp4"}, text("?"))},
        "empty conversation": {"messages": []},
        "no assistant's turn": {"messages": chat(VIDEO, text("?"))[:1]},
        "placeholder mismatch": {"messages": chat(VIDEO, text("<video> What is this?"))},
        "turns do not alternate": {"messages": chat(VIDEO)[:1] + chat(text("?"))},
        "empty answer": {"messages": chat(VIDEO, text("?"), answer=" ")},
        "empty question": {"messages": chat()},
        "outside the media root": {"messages": chat({"type": "video", "path": "../secret.mp4"}, text("?"))},
        "malformed": {"messages": [{"role": "judge", "content": ""}]},
    }
    records = [good, *({"id": reason, **record} for reason, record in bad.items())]
    records += [good, {"id": "linked", "messages": chat({"type": "video", "path": "link.mp4"}, text("?"))}]
    report = prepare(write(tmp_path / "all.jsonl", *records), root, tmp_path / "out")

    expected = dict.fromkeys(bad, 1) | {"duplicate": 1, "outside the media root": 2}
    assert report["records"] == {"read": len(records), "kept": 1, "left_out": expected}
    assert report["samples"] == len(load_manifest(tmp_path / "out")) == 1
    by_id = {problem["id"]: problem for problem in report["problems"]}
    for number, reason in enumerate(bad, 2):
        assert by_id[reason]["reason"] == reason
        assert by_id[reason]["where"] == f"all.jsonl:{number}"
        assert by_id[reason]["message"]
    assert json.loads((tmp_path / "out" / "report.json").read_text()) == report


def test_an_absurd_duration_is_left_out(tmp_path, media):
    source = write(tmp_path / "a.jsonl", {"id": "x", "messages": chat(VIDEO, text("?"))})
    report = prepare(source, media("good.mp4"), tmp_path / "out", max_duration_s=5.0)
    assert report["records"]["left_out"] == {"absurd duration": 1}
    assert "6 s" in report["problems"][0]["message"]


def test_one_clip_under_two_paths_is_one_video(tmp_path, media):
    root = media("NextQA/1202/4011112222.mp4")
    (root / "academic").mkdir()
    (root / "academic" / "4011112222.mp4").write_bytes((root / "NextQA/1202/4011112222.mp4").read_bytes())
    paths = ("NextQA/1202/4011112222.mp4", "academic/4011112222.mp4")
    records = [
        {"id": str(i), "messages": chat({"type": "video", "path": path}, text(f"Question {i}?"))}
        for i, path in enumerate(paths)
    ]
    report = prepare(write(tmp_path / "a.jsonl", *records), root, tmp_path / "out")
    assert (report["samples"], report["turns"]) == (1, 2)


def test_parquet_and_streaming_give_the_same_rows(tmp_path, media):
    records = [{"id": str(i), "messages": chat(VIDEO, text(f"Question {i}?"))} for i in range(3)]
    records += [{"id": "image", "messages": chat({"type": "image", "path": "a.png"}, text("?"))}]
    source, root = write(tmp_path / "a.jsonl", *records), media("good.mp4", "a.png")
    rows = []
    for parquet in (False, True):
        prepare(source, root, tmp_path / "out", parquet=parquet)
        for streaming in (False, True):
            rows.append(list(load_manifest(tmp_path / "out", streaming)))
    assert rows[0]
    assert all(other == rows[0] for other in rows[1:])
    assert not (tmp_path / "out" / "manifest.jsonl").exists()  # an old form would shadow the new one


@pytest.mark.parametrize("encoding", ["raw", "jpeg"])
def test_stored_frames_stand_in_for_the_video(tmp_path, media, processor, encoding):
    clips = [{**VIDEO, "start_s": 0.5, "end_s": 3.0}, {**VIDEO, "start_s": 3.0, "end_s": 3.4}]
    messages = [turn for clip in clips for turn in chat(clip)] + chat(VIDEO, text("All?"))
    source, root = write(tmp_path / "a.jsonl", {"id": "x", "messages": messages}), media("good.mp4")
    prepare(source, root, tmp_path / "plain")
    cache = {"processor": processor.video_processor, "fps": 1.0, "encoding": encoding}
    report = prepare(source, root, tmp_path / "cached", cache=cache)
    assert report["cached_frames"] == 6
    plain, cached = (VideoChatCollator(processor)([load_manifest(tmp_path / name)[0]]) for name in ("plain", "cached"))
    assert plain["pixel_values_videos"].shape[1] == 2 + 1 + 6
    torch.testing.assert_close(plain["input_ids"], cached["input_ids"])
    difference = (plain["pixel_values_videos"].int() - cached["pixel_values_videos"].int()).abs().float().mean()
    assert difference == 0 if encoding == "raw" else 0 < difference < 6
    (root / "good.mp4").unlink()  # nothing is decoded any more
    again = VideoChatCollator(processor)([load_manifest(tmp_path / "cached")[0]])
    torch.testing.assert_close(again["pixel_values_videos"], cached["pixel_values_videos"])
    # and frames stored with other settings are not mistaken for these
    batch = VideoChatCollator(processor, fps=0.5, with_info=True)([load_manifest(tmp_path / "cached")[0]])
    assert "have fps 1.0, and 0.5 is wanted" in batch[INFO][0]["error"]
    for damaged in ("*.safetensors", "index.json"):  # which costs the sample, and not the run
        next((tmp_path / "cached" / "frames").rglob(damaged)).write_bytes(b"{")
        batch = VideoChatCollator(processor, with_info=True)([load_manifest(tmp_path / "cached")[0]])
        assert "damaged" in batch[INFO][0]["error"]


def test_a_video_that_does_not_decode_leaves_no_frames(tmp_path, media, processor, monkeypatch):
    source, root = write(tmp_path / "a.jsonl", {"id": "x", "messages": chat(VIDEO, text("?"))}), media("good.mp4")

    def open_video(*args, **kwargs):
        raise ValueError("broken in the middle")

    monkeypatch.setattr(processor.video_processor, "open_video", open_video)
    cache = {"processor": processor.video_processor, "fps": 1.0, "encoding": "raw"}
    report = prepare(source, root, tmp_path / "out", cache=cache)
    assert report["records"]["left_out"] == {"unreadable medium": 1}
    assert list((tmp_path / "out" / "frames").iterdir()) == []


@pytest.mark.parametrize(
    ("name", "content"), [("manifest.jsonl", '{"id": "x'), ("manifest.jsonl", '{"id": "x"}'), ("dataset.json", "{}")]
)
def test_a_damaged_manifest_is_refused(tmp_path, media, name, content):
    source = write(tmp_path / "a.jsonl", {"id": "x", "messages": chat(VIDEO, text("?"))})
    prepare(source, media("good.mp4"), tmp_path / "out")
    (tmp_path / "out" / name).write_text(content)
    with pytest.raises(ValueError, match="data prepare"):
        load_manifest(tmp_path / "out")


def test_clips_in_a_row_show_every_frame_once(tmp_path, media, processor):
    borders = [0.0, 1.3, 1.9, 4.0, 6.0]
    clips = [{**VIDEO, "start_s": a, "end_s": b} for a, b in pairwise(borders)]
    source = write(tmp_path / "a.jsonl", {"id": "x", "messages": [turn for clip in clips for turn in chat(clip)]})
    prepare(source, media("good.mp4"), tmp_path / "out")
    row = load_manifest(tmp_path / "out")[0]
    batch = VideoChatCollator(processor)([row])
    whole = processor.video_processor.load(tmp_path / "media" / "good.mp4", fps=1.0).frames
    frames = batch["pixel_values_videos"][0]
    assert len(frames) == 7  # 0 1 | the middle of a clip between two frames | 2 3 | 4 5
    torch.testing.assert_close(frames[[0, 1, 3, 4, 5, 6]], whole)


@pytest.mark.parametrize("num_workers", [1, 2])
def test_a_killed_run_goes_on_where_it_stood(tmp_path, media, num_workers):
    names = [f"{i}.mp4" for i in range(30)]
    root = media(*names)
    records = [{"id": n, "messages": chat({"type": "video", "path": n}, text("?"))} for n in names]
    source, out = write(tmp_path / "a.jsonl", *records), tmp_path / "out"
    command = ["data", "prepare", str(source), "--media-root", str(root), "-o", str(out)]
    command += ["--workers", str(num_workers)]
    run_killed(command, "video_ma2mba.data.media:probe_video", after=5)
    remembered = out / "media.jsonl"
    num_kept = len(remembered.read_text().strip().splitlines())
    assert num_kept == 5 if num_workers == 1 else num_kept <= 5  # of two, one may wait to be written
    assert not (out / "manifest.jsonl").exists()
    with remembered.open("a") as file:
        file.write('{"kind": "video", "path": "1.m')  # as a write that was cut off
    assert main(command) == 0
    assert sorted(load_manifest(out)["id"]) == sorted(names)
    known = [line for line in remembered.read_text().splitlines() if line.endswith("}")]
    assert len(known) == len(names)  # none was looked at twice


def test_the_command_says_what_it_did(tmp_path, media, capsys):
    source = write(tmp_path / "a.jsonl", {"id": "x", "messages": chat(VIDEO, text("?"))}, {"id": "y", "messages": []})
    root = media("good.mp4")
    assert main(["data", "prepare", str(source), "--media-root", str(root), "-o", str(tmp_path / "out")]) == 0
    printed = capsys.readouterr()
    assert "1 conversations, 1 questions" in printed.out
    assert "kept 1 of 2 records" in printed.out
    assert "left out, empty conversation: 1" in printed.err
    assert main(["data", "prepare", str(source), "--media-root", str(root / "no"), "-o", str(tmp_path / "o")]) == 2
    assert "there is no such folder" in capsys.readouterr().err


def test_the_command_stores_frames_that_training_then_reads(tmp_path, media, model_folder, processor, capsys):
    source, root = write(tmp_path / "a.jsonl", {"id": "x", "messages": chat(VIDEO, text("?"))}), media("good.mp4")
    command = ["data", "prepare", str(source), "--media-root", str(root), "-o", str(tmp_path / "out")]
    for _ in range(2):  # the second time they are there already
        assert main([*command, "--cache-frames", "raw", "--model", model_folder]) == 0
        assert json.loads((tmp_path / "out" / "report.json").read_text())["cached_frames"] == 6
    assert main([*command, "--cache-frames", "raw", "--model", model_folder, "--fps", "2"]) == 2  # nothing is kept
    (problem,) = json.loads((tmp_path / "out" / "report.json").read_text())["problems"]
    assert "have fps 1.0, and 2.0 is wanted" in problem["message"]
    assert main(command) == 0
    (root / "good.mp4").unlink()
    (row,) = load_manifest(tmp_path / "out")
    assert VideoChatCollator(processor)([row])["pixel_values_videos"].shape == (1, 6, 3, 28, 28)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--format", "webvids"], "--format webvids: known are llava, messages"),
        (["--max-hours", "0"], "--max-hours: must be a number from 1e-09"),
        (["--cache-frames", "raw", "--fps", "-1"], "--fps: must be a number from 1e-09 to 1000"),
        (["--workers", "0"], "--workers: must be a whole number from 1"),
        (["--rows-per-file", "5"], "--rows-per-file: for --parquet"),
    ],
)
def test_the_command_refuses_nonsense(tmp_path, media, capsys, options, message):
    source = write(tmp_path / "a.jsonl", {"id": "x", "messages": chat(VIDEO, text("?"))})
    command = ["data", "prepare", str(source), "--media-root", str(media("good.mp4")), "-o", str(tmp_path / "out")]
    assert main([*command, *options]) == 2
    assert message in capsys.readouterr().err


def test_a_video_that_breaks_while_its_frames_are_stored_is_left_out(tmp_path, media, processor):
    root = media("good.mp4", "bad.mp4")
    records = [{"id": n, "messages": chat({"type": "video", "path": f"{n}.mp4"}, text("?"))} for n in ("good", "bad")]
    source = write(tmp_path / "a.jsonl", *records)
    prepare(source, root, tmp_path / "out")  # both open, which is remembered
    looks = (root / "bad.mp4").stat()
    (root / "bad.mp4").write_bytes(bytes(looks.st_size))
    os.utime(root / "bad.mp4", ns=(looks.st_atime_ns, looks.st_mtime_ns))
    cache = {"processor": processor.video_processor, "fps": 1.0, "encoding": "raw"}
    report = prepare(source, root, tmp_path / "out", cache=cache)
    assert report["records"] == {"read": 2, "kept": 1, "left_out": {"unreadable medium": 1}}
    assert [row["id"] for row in load_manifest(tmp_path / "out")] == ["good"]


def test_what_is_no_prepared_folder_is_named(tmp_path, media):
    with pytest.raises(ValueError, match="no prepared data set"):
        load_manifest(tmp_path)
    source = write(tmp_path / "a.jsonl", {"id": "x", "messages": chat(VIDEO, text("?"))})
    prepare(source, media("good.mp4"), tmp_path / "out")
    (tmp_path / "out" / "manifest.jsonl").unlink()
    with pytest.raises(ValueError, match=r"neither manifest\.jsonl nor"):
        load_manifest(tmp_path / "out")
    with pytest.raises(ValueError, match="there is no such file or folder"):
        prepare(tmp_path / "nothing", tmp_path, tmp_path / "out")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"holds no .*\.jsonl"):
        prepare(tmp_path / "empty", tmp_path, tmp_path / "out")


def test_open_questions_and_repeated_ones_are_left_out(tmp_path, media):
    open_end = [*chat(VIDEO, text("First?")), {"role": "user", "content": [text("Second?")]}]
    shown = [{"role": "user", "content": [text("?")]}, {"role": "assistant", "content": [VIDEO, text("There.")]}]
    records = [
        {"id": "open", "messages": open_end},
        {"id": "again", "messages": chat(VIDEO, text("First?"), answer="No.")},
        {"id": "shown", "messages": shown},
    ]
    source = tmp_path / "a.jsonl"
    source.write_text("\n\n".join(map(json.dumps, records)))  # blank lines are no records
    report = prepare(source, media("good.mp4"), tmp_path / "out")
    assert report["records"] == {"read": 3, "kept": 2, "left_out": {"placeholder mismatch": 1}}
    (row,) = load_manifest(tmp_path / "out")
    assert [message["role"] for message in row["messages"]] == ["user", "assistant"]


def test_the_command_notes_scenes_that_are_not_there(tmp_path, media, capsys):
    clips = [{**VIDEO, "start_s": 0.0, "end_s": 2.0}, {**VIDEO, "start_s": 8.0, "end_s": 9.0}]
    messages = [turn for clip in clips for turn in chat(clip)]
    source, root = write(tmp_path / "a.jsonl", {"id": "x", "messages": messages}), media("good.mp4")
    assert main(["data", "prepare", str(source), "--media-root", str(root), "-o", str(tmp_path / "out")]) == 0
    assert "note, scenes beyond the end of their video: 1" in capsys.readouterr().err


def test_every_bar_ends_where_all_is_done(tmp_path, media):
    """The last that is said of each piece of work: as much done as there is."""
    root = media("good.mp4", "other.mp4")
    records = [{"id": str(i), "messages": chat({"type": "video", "path": name}, text(f"{i}?"))}
               for i, name in enumerate(["good.mp4", "other.mp4", "good.mp4", "gone.mp4"])]  # fmt: skip
    last = {}
    prepare(
        write(tmp_path / "all.jsonl", *records), root, tmp_path / "out",
        progress=lambda what, done, total: last.update({what: (done, total)}),
    )  # fmt: skip
    assert last == {"opening media of all.jsonl": (2, 2), "checking all.jsonl": (4, 4)}


def test_what_an_unfinished_training_left_among_the_data_is_not_read(tmp_path, media):
    root = media("good.mp4")
    write(root / "questions.jsonl", {"video": "good.mp4", "question": "What?", "answer": "a"})
    for name, files in {"run": ["held_out_history.json", "checkpoints/checkpoint-1/trainer_state.json"],
                        "compared": ["comparison.json", "comparison.md"]}.items():  # fmt: skip
        for file in files:
            (root / name / file).parent.mkdir(parents=True, exist_ok=True)
            (root / name / file).write_text("{}")
    report = prepare(root, root, tmp_path / "out")
    assert [source["file"] for source in report["sources"]] == ["questions.jsonl"]
