"""Frames mean the same at every door, and a file that is no good is called the same by all of them."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from video_ma2mba import VideoMemory
from video_ma2mba.cli import main
from video_ma2mba.data.frame_cache import cache_folder, read_frames_between, write_frames

from ..processing.videos import write_clip


def seen_by(model, processor, how, frames):
    """(frames, 3, side, side): what the model is shown by `watch` or `push_frames`."""
    seen = []

    class Watching(VideoMemory):
        def _absorb(self, pixels, timestamps_s):
            seen.append(pixels)
            super()._absorb(pixels, timestamps_s)

    getattr(Watching(model, processor), how)(frames)
    return torch.cat(seen)


def asked(processor, **entry):
    """The same, by a content entry of a chat."""
    chat = [{"role": "user", "content": [{"type": "video", **entry}, {"type": "text", "text": "?"}]}]
    return processor.apply_chat_template(chat, tokenize=True, return_tensors="pt")["pixel_values_videos"][0]


@pytest.mark.parametrize("container", [("mp4", "libx264"), ("mkv", "libx264"), ("ts", "mpeg2video"), ("avi", "mpeg4")])
def test_every_door_gives_the_same_frames_of_a_file(tmp_path, container, model, processor):
    suffix, codec = container
    path, late = tmp_path / f"clip.{suffix}", 61 if suffix != "avi" else 0
    write_clip(path, range(75), codec, b_frames=2, first=late, sound_s=4, sound="mp2")
    loaded = processor.video_processor.load(path)
    assert loaded.timestamps_s == pytest.approx([0, 1, 2], abs=1e-3)
    write_frames(tmp_path, path.name, tmp_path / "cache", processor.video_processor, 1.0, "raw")
    for frames in (
        seen_by(model, processor, "watch", path),
        seen_by(model, processor, "watch", path.read_bytes()),
        seen_by(model, processor, "push_frames", loaded.frames),
        asked(processor, path=str(path)),
        read_frames_between(cache_folder(tmp_path / "cache", path.name), 0, 3),
    ):
        torch.testing.assert_close(frames, loaded.frames, rtol=0, atol=0)


@pytest.mark.filterwarnings("error")
def test_every_form_of_frames_is_the_same_at_every_door(model, processor):
    frames = np.random.default_rng(0).integers(0, 256, (3, 24, 32, 3), dtype=np.uint8)
    wanted = processor.video_processor.load(frames).frames
    forms = [
        frames, frames[..., ::-1].copy()[..., ::-1], list(frames), torch.from_numpy(frames),
        frames.transpose(0, 3, 1, 2), [Image.fromarray(frame) for frame in frames],
        [torch.from_numpy(frame).permute(2, 0, 1) for frame in frames],
    ]  # fmt: skip
    for form in forms:
        for got in (
            seen_by(model, processor, "push_frames", form),
            seen_by(model, processor, "watch", form),
            seen_by(model, processor, "watch", iter(form)),
            asked(processor, video=form),
        ):
            torch.testing.assert_close(got, wanted, rtol=0, atol=0)
    memory = VideoMemory(model, processor)
    for call in (memory.push_frames, memory.watch, processor.video_processor.load):
        with pytest.raises(ValueError, match="must be uint8"):
            call(frames / 255)
        with pytest.raises(ValueError, match="must have pixels"):
            call(np.zeros((2, 0, 8, 3), np.uint8))


@pytest.mark.parametrize(
    "content", [b"", b"no video at all" * 9, b"\0\0\0\x18ftypisom" + bytes(99), b"\x89PNG\r\n\x1a\n" + bytes(99)]
)
def test_the_same_line_about_the_same_bad_file(tmp_path, content, model, processor, model_folder, capsys):
    path = tmp_path / "bad.mp4"
    path.write_bytes(content)
    said = []
    for read in (processor.video_processor.load, VideoMemory(model, processor).watch):
        with pytest.raises(ValueError, match=r"bad\.mp4") as caught:
            read(path)
        said.append(str(caught.value))
    for command in (["ask", str(path), "What?"], ["watch", str(path), "-o", f"{tmp_path}/memory"]):
        assert main([*command, "--model", model_folder]) == 2
        said.append(capsys.readouterr().err.strip().removeprefix("error: "))
    row = {"video": "bad.mp4", "question": "What?", "answer": "A cross"}
    (tmp_path / "records.jsonl").write_text(json.dumps(row) + "\n")
    main(["data", "prepare", f"{tmp_path}/records.jsonl", "--media-root", str(tmp_path), "-o", f"{tmp_path}/data"])
    said.append(json.loads((tmp_path / "data" / "report.json").read_text())["problems"][0]["message"])
    row = {"videoID": "bad", "question_id": "1", "question": "Which?", "answer": "A", "duration": "short"}
    row |= {"options": ["A. red", "B. blue"], "domain": "Art"}
    (tmp_path / "bench").mkdir()
    (tmp_path / "bench" / "test.jsonl").write_text(json.dumps(row) + "\n")
    command = ["eval", model_folder, "--task", "videomme", "--data", f"{tmp_path}/bench", "--media-root", str(tmp_path)]
    assert main([*command, "-o", f"{tmp_path}/eval"]) == 2
    assert said[0] in capsys.readouterr().err
    assert len(set(said)) == 1, said
    assert "\n" not in said[0]
