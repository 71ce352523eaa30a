"""`video-ma2mba ask`: its answers, its JSON, and what it says to bad input."""

import json
import re
import shutil
import subprocess
import sys
import wave
from itertools import islice
from pathlib import Path

import av
import pytest
import torch
from peft import get_peft_model
from safetensors.torch import load_file, save_file

from video_ma2mba import VideoMa2mbaForConditionalGeneration, VideoMemory, cli, loading
from video_ma2mba.data.synthetic import make_story
from video_ma2mba.training.lora import lora_config

QUESTION = "What colour was the circle?"


@pytest.fixture
def run(model_folder, capsys):
    """Run `ask` with the small model unless another is named; returns (exit code, stdout, stderr)."""

    def run_ask(*arguments: str):
        if "--model" not in arguments:
            arguments += ("--model", model_folder)
        code = cli.main(["ask", "--max-new-tokens", "6", *map(str, arguments)])
        return code, *capsys.readouterr()

    return run_ask


# --- answers ---


def test_answers_equal_generate_on_the_whole_input(run, model, processor, video):
    questions = [QUESTION, "Which shape came first of all?"]
    code, out, _ = run(video, *questions, "--json")
    assert code == 0
    answers = json.loads(out)["answers"]
    assert [one["question"] for one in answers] == questions
    for question, one in zip(questions, answers, strict=True):
        content = [{"type": "video", "path": video}, {"type": "text", "text": question}]
        inputs = processor.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=True
        )
        tokens = model.generate(**inputs, max_new_tokens=6)[0, inputs["input_ids"].shape[1] :]
        assert one["answer"] == processor.decode(tokens, skip_special_tokens=True).strip()
        assert one["tokens"] == len(tokens)


def test_a_memory_is_asked_like_the_video(run, model_folder, video, tmp_path, capsys):
    folder = tmp_path / "memory"
    assert cli.main(["watch", video, "-o", str(folder), "--model", model_folder]) == 0
    out, err = capsys.readouterr()
    assert out == ""
    assert "10 frames" in err
    of_video, of_memory = run(video, QUESTION, QUESTION + "?"), run(folder, QUESTION, QUESTION + "?")
    assert of_memory[:2] == of_video[:2]
    assert "Watching" not in of_memory[2]


def test_watch_refuses_a_place_that_is_not_there(model_folder, video, tmp_path, capsys):
    assert cli.main(["watch", video, "-o", str(tmp_path / "no" / "memory"), "--model", model_folder]) == 2
    assert "create the folder" in capsys.readouterr().err
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("five years")
    assert cli.main(["watch", video, "-o", str(tmp_path / "full"), "--model", model_folder]) == 2
    assert "something other than a video memory" in capsys.readouterr().err
    assert (tmp_path / "full" / "thesis.txt").read_text() == "five years"


def test_json_schema(run, video, model):
    code, out, _ = run(video, QUESTION, "--json", "--fps", "2", "--max-frames", "7", "--start", "2", "--end", "9.5")
    report = json.loads(out)
    assert code == 0
    assert set(report) == {
        "video", "model", "device", "dtype", "answers", "frames", "tokens", "seconds", "peak_bytes"
    }  # fmt: skip
    assert [set(one) for one in report["answers"]] == [{"question", "answer", "tokens", "seconds"}]
    assert (report["device"], report["dtype"], report["frames"]) == ("cpu", "float32", 7)
    assert report["tokens"]["watched"] > 7 * model.config.tokens_per_frame
    assert report["tokens"]["answered"] == report["answers"][0]["tokens"]
    seconds = report["seconds"]
    assert set(seconds) == {"decode_s", "encode_s", "answer_s", "total_s"}
    assert all(value > 0 for value in seconds.values())
    assert seconds["decode_s"] + seconds["encode_s"] + seconds["answer_s"] < seconds["total_s"]
    assert report["peak_bytes"] > 2**20


def test_repetition_ends_an_answer(run, video, monkeypatch):
    monkeypatch.setattr(torch, "argmax", lambda scores, dim: torch.full(scores.shape[:dim], 7))  # always the same word
    code, out, _ = run(video, QUESTION, "--json", "--max-new-tokens", "50")
    assert (code, json.loads(out)["answers"][0]["tokens"]) == (0, 6)  # one token more than the run of five


def test_bfloat16_answers(run, video):
    code, out, _ = run(video, QUESTION, "--dtype", "bfloat16", "--json")
    assert (code, json.loads(out)["dtype"]) == (0, "bfloat16")


def test_pipe_gets_answers_alone(model_folder, video):
    command = [sys.executable, "-m", "video_ma2mba.cli", "ask", video, QUESTION, QUESTION]
    command += ["--model", model_folder, "--max-new-tokens", "1"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    first, second = done.stdout.split("\n")[:2]
    assert first == second
    assert done.stdout == f"{first}\n{second}\n"
    assert re.search(r"frames.* 10/10", done.stderr)


# --- the model ---


def test_tiny_model_is_the_default(monkeypatch, model_folder):
    monkeypatch.setattr(loading, "TINY_MODEL", Path(model_folder))
    assert loading.find_model(None) == model_folder


def test_what_the_tiny_model_knows_is_said_of_a_video_that_is_none_of_its_own(tmp_path, capsys):
    story = make_story(seed=1, duration_s=4).render(tmp_path / "story.mp4")
    assert cli.main(["ask", str(story), QUESTION]) == 0
    assert "coloured shapes" not in capsys.readouterr().err
    with av.open(str(tmp_path / "grey.mp4"), "w") as container:
        stream = container.add_stream("mpeg4", rate=1)
        stream.width = stream.height = 64
        for _ in range(3):
            container.mux(stream.encode(av.VideoFrame(64, 64, "yuv420p")))
        container.mux(stream.encode(None))
    assert cli.main(["ask", str(tmp_path / "grey.mp4"), QUESTION]) == 0
    assert capsys.readouterr().err.count("coloured shapes") == 1


def test_hub_id_is_left_to_the_hub():
    assert loading.find_model("owner/some-model.v2") == "owner/some-model.v2"


@pytest.mark.parametrize("left_out", ["config.json", "processor_config.json"])
def test_incomplete_model_folder(run, video, model_folder, tmp_path, left_out):
    for file in Path(model_folder).iterdir():
        if file.name != left_out:
            (tmp_path / file.name).symlink_to(file)
    assert_refused(run(video, QUESTION, "--model", tmp_path), str(tmp_path), left_out, "save_pretrained")


def test_model_of_another_kind(run, video, tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    (tmp_path / "processor_config.json").write_text("{}")
    assert_refused(run(video, QUESTION, "--model", tmp_path), str(tmp_path), "'llama'", "video_ma2mba")


@pytest.mark.parametrize("name", ["./missing", "missing", "no-such-owner/missing"])
def test_missing_model(run, video, name):
    assert_refused(run(video, QUESTION, "--model", name), name, "no such folder")


def test_no_cuda(run, video, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert_refused(run(video, QUESTION, "--device", "cuda"), "--device cuda", "--device cpu")


# --- the video ---


def assert_refused(result, *said: str):
    code, out, err = result
    assert code == cli.EXIT_USER_ERROR
    assert out == ""
    assert "Traceback" not in err
    message = err[err.index("error: ") :]
    assert all(words in message for words in said), message


def test_missing_video(run, tmp_path):
    assert_refused(run(tmp_path / "no.mp4", QUESTION), str(tmp_path / "no.mp4"), "no such file")


def test_folder_as_video(run, tmp_path):
    assert_refused(run(tmp_path, QUESTION), str(tmp_path), "folder")


def test_empty_video(run, tmp_path):
    path = tmp_path / "empty.mp4"
    path.touch()
    assert_refused(run(path, QUESTION), str(path), "empty")


def test_text_named_mp4(run, tmp_path):
    path = tmp_path / "text.mp4"
    path.write_text("To whom it may concern. " * 50)
    assert_refused(run(path, QUESTION), str(path), "not a video")


def test_audio_only(run, tmp_path):
    path = tmp_path / "sound.wav"
    with wave.open(str(path), "wb") as sound:
        sound.setparams((1, 2, 8000, 0, "NONE", ""))
        sound.writeframes(bytes(16000))
    assert_refused(run(path, QUESTION), str(path), "audio")


def test_truncated_without_index(run, video, tmp_path):
    path = tmp_path / "cut.mp4"
    path.write_bytes(Path(video).read_bytes()[:-2000])
    assert_refused(run(path, QUESTION), str(path), "cut off")


def test_truncated_is_watched_as_far_as_it_goes(run, tmp_path):
    whole, path = make_story(seed=5, duration_s=20).render(tmp_path / "whole.mp4"), tmp_path / "cut.mp4"
    # The index moves to the front, as in files made for streaming, so that a cut leaves it whole.
    with av.open(str(whole)) as source, av.open(str(path), "w", options={"movflags": "faststart"}) as target:
        stream = target.add_stream_from_template(source.streams.video[0])
        for packet in islice(source.demux(video=0), 80):
            packet.stream = stream
            target.mux(packet)
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 6 // 10])
    code, out, err = run(path, QUESTION, "--json")
    assert code == 0
    assert 0 < json.loads(out)["frames"] < 20
    assert "warning: " in err
    assert str(path) in err
    assert "missing" in err


@pytest.mark.parametrize("fps", ["0", "-1", "nan", "inf"])
def test_bad_fps(run, video, fps):
    assert_refused(run(video, QUESTION, "--fps", fps), "--fps", "from 1e-09 to 1000")


def test_a_rate_above_the_videos_own_is_said(run, video):
    code, out, err = run(video, QUESTION, "--fps", "100", "--end", "0.2")
    assert code == 0
    assert "--fps 100 is above the video's own" in err
    assert "above" not in out
    assert "above" not in run(video, QUESTION, "--fps", "2", "--end", "1")[2]


def test_start_beyond_the_end(run, video):
    assert_refused(run(video, QUESTION, "--start", "10"), video, "beyond the end", "10.0")


def test_end_before_start(run, video):
    assert_refused(run(video, QUESTION, "--start", "5", "--end", "4"), "--end 4", "after --start 5")


def test_no_frames_wanted(run, video):
    assert_refused(run(video, QUESTION, "--max-frames", "0"), "--max-frames", "from 1 to")


def test_empty_question(run, video):
    assert_refused(run(video, QUESTION, "  "), "question 2", "empty")


def rename(path, name):
    """One character of a tensor's name is wrong."""
    tensors = load_file(path)
    tensors[f"{name}x"] = tensors.pop(name)
    save_file(tensors, path, metadata={"format": "pt"})


def test_a_weight_that_is_missing_is_not_made_up(run, model_folder, video, tmp_path):
    folder, name = shutil.copytree(model_folder, tmp_path / "model"), "model.language_model.layers.1.mixer.D"
    rename(folder / "model.safetensors", name)
    assert_refused(run(video, QUESTION, "--model", folder), str(folder), f"lack {name}")


@pytest.mark.parametrize(
    ("file", "setting"),
    [
        ("processor_config.json", "patch_size"),
        ("processor_config.json", "media_separator"),
        ("tokenizer_config.json", "model_max_length"),
        ("generation_config.json", "eos_token_id"),
    ],
)
def test_a_setting_of_another_kind(run, model_folder, video, tmp_path, file, setting):
    path = shutil.copytree(model_folder, tmp_path / "model") / file
    path.write_text(json.dumps({**json.loads(path.read_text()), setting: ["x"]}))
    assert_refused(run(video, QUESTION, "--model", path.parent), str(path.parent), "damaged")


@pytest.mark.parametrize("damage", ["cut", "weights", "config", "size", "json"])
def test_damaged_adapters(run, model_folder, video, tmp_path, damage):
    folder = tmp_path / "adapter"
    model = VideoMa2mbaForConditionalGeneration.from_pretrained(model_folder)
    get_peft_model(model, lora_config(rank=2)).save_pretrained(folder)
    assert run(video, QUESTION, "--adapter", folder)[0] == 0
    weights, config = folder / "adapter_model.safetensors", folder / "adapter_config.json"
    if damage == "cut":
        weights.write_bytes(weights.read_bytes()[:-100])
    elif damage == "weights":
        rename(weights, next(iter(load_file(weights))))
    else:
        old, new = {"config": ("|out_proj", "|out_prok"), "size": ('"r": 2', '"r": 3'), "json": ("{", "")}[damage]
        config.write_text(config.read_text().replace(old, new))
    said = {"weights": "disagree", "config": "disagree", "size": "do not fit"}.get(damage, "damaged")
    assert_refused(run(video, QUESTION, "--adapter", folder), f"--adapter {folder}", said)


def test_adapters_that_are_not_there(run, video, tmp_path):
    assert_refused(run(video, QUESTION, "--adapter", tmp_path), "there is no adapter_config.json", "finetune-lora")


def test_a_model_folder_without_weights(run, video, model_folder, tmp_path):
    for file in Path(model_folder).iterdir():
        if file.suffix != ".safetensors":
            (tmp_path / file.name).symlink_to(file)
    assert_refused(run(video, QUESTION, "--model", tmp_path), "model.safetensors", str(tmp_path))


def test_options_that_do_not_apply_are_refused(run, video, model, processor, model_folder, tmp_path, capsys):
    memory = VideoMemory(model, processor)
    memory.watch(video)
    memory.save_pretrained(tmp_path / "kept")
    for option in (("--fps", "2"), ("--start", "5"), ("--end", "6"), ("--max-frames", "3")):
        assert_refused(run(tmp_path / "kept", QUESTION, *option), option[0], "is a memory")
    assert cli.main(["chat", str(tmp_path / "kept"), "--model", model_folder, "--snapshots", "1"]) == 2
    assert "--snapshots: " in capsys.readouterr().err
    assert run(tmp_path / "kept", QUESTION)[0] == 0


def test_a_second_video_is_no_question(run, video):
    assert_refused(run(video, video, QUESTION), "question 1 is the path of a file")
