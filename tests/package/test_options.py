"""Options of commands, one by one: each does what its line of help says, or is refused with a reason."""

import json
import shlex

import pytest

from video_ma2mba import VideoMemory, cli

QUESTION = "What colour was the circle?"


def refused(command, capsys):
    """The error of a command that cannot be followed: one line."""
    assert cli.main([str(word) for word in command]) == cli.EXIT_USER_ERROR
    said = capsys.readouterr().err.splitlines()
    assert said[-1].startswith("error: "), said
    return said[-1]


# --- watching: of a video of ten seconds ---


@pytest.mark.parametrize(
    ("options", "field", "value"),
    [
        ("", "frames", 10),
        ("--fps 2", "frames", 20),
        ("--max-frames 3", "frames", 3),
        ("--start 4", "frames", 6),
        ("--end 4", "frames", 4),
        ("--max-duration 3", "frames", 3),
        ("--start 4 --max-duration 3", "frames", 3),
        ("--dtype bfloat16", "dtype", "bfloat16"),
        ("--device cpu", "device", "cpu"),
    ],
)
def test_of_ask(options, field, value, model_folder, video, capsys):
    command = ["ask", video, QUESTION, "--model", model_folder, "--json", "--max-new-tokens", "1"]
    assert cli.main([*command, *options.split()]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report[field] == value
    assert report["tokens"]["answered"] == 1


@pytest.mark.parametrize("option", ["--fps 0", "--max-frames 0", "--start -1", "--end 0", "--max-duration 0"])
def test_of_ask_refused(option, model_folder, video, capsys):
    assert refused(["ask", video, QUESTION, "--model", model_folder, *option.split()], capsys)


def test_a_rate_above_the_videos_own_is_said(model_folder, video, capsys):
    command = ["ask", video, QUESTION, "--model", model_folder, "--max-new-tokens", "1"]
    assert cli.main([*command, "--fps", "1000", "--end", "0.1"]) == 0
    assert "note: --fps 1000 is above the video's own " in capsys.readouterr().err
    assert cli.main([*command, "--fps", "2"]) == 0
    assert "--fps" not in capsys.readouterr().err


def test_of_watch(model, processor, model_folder, video, tmp_path, capsys):
    command = ["watch", video, "--model", model_folder, "--output", str(tmp_path / "kept")]
    assert cli.main([*command, "--max-duration", "6", "--snapshots", "2", "4"]) == 0
    kept = VideoMemory.from_pretrained(tmp_path / "kept", model, processor)
    assert (kept.num_frames, kept.snapshot_times_s) == (6, [2.0, 4.0])
    assert "no interrupted call" in refused([*command, "--resume"], capsys)
    assert cli.main([*command, "--restart", "--end", "3"]) == 0
    assert VideoMemory.from_pretrained(tmp_path / "kept", model, processor).num_frames == 3


def test_the_tiny_model_by_its_name(tmp_path, monkeypatch, video, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["ask", video, QUESTION, "--model", "tiny"]) == 0
    assert capsys.readouterr().out.strip()
    (tmp_path / "tiny").mkdir()  # a folder of that name is what is meant
    assert "has no config.json" in refused(["ask", video, QUESTION, "--model", "tiny"], capsys)


# --- serve ---


def test_of_serve(model_folder, tmp_path, monkeypatch):
    pytest.importorskip("fastapi")
    (tmp_path / "media").mkdir()
    (tmp_path / "keys").write_text("secret\n")
    seen = {}
    monkeypatch.setattr("video_ma2mba.serving.app.build_app", lambda model, processor, settings: settings)
    monkeypatch.setattr(
        "video_ma2mba.serving.app.serve", lambda app, host, port, announce: seen.update(app=app, place=(host, port))
    )
    options = (
        f"--memories {tmp_path / 'kept'} --host 0.0.0.0 --port 0 --api-key-file {tmp_path / 'keys'} --allow-media "
        f"{tmp_path / 'media'} --allow-urls --allow-private-urls --max-upload 3MB --max-duration 60 --slots 2 "
        "--max-waiting 3 --timeout 4 --dtype float32 --device cpu"
    )
    assert cli.main(["serve", model_folder, *shlex.split(options)]) == 0
    settings = seen["app"]
    assert seen["place"] == ("0.0.0.0", 0)
    assert (settings.memories, settings.keys) == (tmp_path / "kept", ("secret",))
    assert (settings.num_slots, settings.max_waiting, settings.timeout_s) == (2, 3, 4.0)
    rules = settings.rules
    assert [rules.folders, rules.urls, rules.private_urls] == [(tmp_path / "media",), True, True]
    assert (rules.max_bytes, rules.max_duration_s) == (3 * 10**6, 60.0)


@pytest.mark.parametrize(
    "option",
    ["--slots 0", "--max-waiting 0", "--timeout 0", "--max-duration 0", "--host 0.0.0.0", "--engine-options x"],
)
def test_of_serve_refused(option, model_folder, capsys):
    assert option.split()[0] in refused(["serve", model_folder, *option.split()], capsys)


# --- convert ---


def test_of_convert_refused(tmp_path, capsys):
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "a").touch()
    command = ["convert", "init", "--language-model", "./no", "--vision-model", "./no", "--seed", "1", "-o"]
    assert "./no" in refused([*command, tmp_path / "new"], capsys)
    command = ["convert", "llava-mamba", "./no", "--vision-model", "./no", "-o"]
    assert "./no" in refused([*command, tmp_path / "new"], capsys)


# --- data prepare ---


@pytest.mark.parametrize(
    "option", ["--fps 2", "--model tiny", "--rows-per-file 3", "--workers 0", "--max-hours 0", "--format none"]
)
def test_of_data_prepare_refused(option, tmp_path, capsys):
    (tmp_path / "questions.jsonl").write_text(json.dumps({"video": "a.mp4", "question": "?", "answer": "!"}))
    command = ["data", "prepare", tmp_path / "questions.jsonl", "--media-root", tmp_path, "-o", tmp_path / "out"]
    assert option.split()[0] in refused([*command, *option.split()], capsys)


# --- eval ---


def test_the_judge_of_eval(tmp_path, monkeypatch):
    monkeypatch.setattr("video_ma2mba.evaluation.judge.ChatJudge", lambda url, model, replies: (url, model))
    options = ["eval", "tiny", "--task", "activitynetqa", "--judge", "http://127.0.0.1:9/v1", "--judge-model", "wise"]
    judge = cli.evaluate._judge(cli.build_parser().parse_args(options), tmp_path)
    assert judge == ("http://127.0.0.1:9/v1", "wise")


# --- plan ---


def test_gpus_that_share_a_video(capsys):
    held = []
    for ranks in ("1", "2"):
        command = ["plan", "--model", "0.7b", "--hours", "1", "--gpu-memory", "80GiB", "--sequence-parallel", ranks]
        assert cli.main([*command, "--json"]) == 0
        held.append(json.loads(capsys.readouterr().out)["rows"][0]["pixels_bytes"])
    assert held[1] == held[0] / 2
