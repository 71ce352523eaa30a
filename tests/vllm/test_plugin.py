"""The plugin in vLLM's CPU build: tokens of `generate`, states kept where a video ends, memory that is bounded."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.tiny import byte_tokenizer, tiny_config
from tests.vllm.conftest import BLOCK, answers, expected, request, talk
from video_ma2mba import VideoMa2mbaForConditionalGeneration, VideoMa2mbaProcessor, VideoMa2mbaVideoProcessor
from video_ma2mba.data.synthetic import make_story
from video_ma2mba.serving import vllm_videos


def text(words):
    return {"type": "text", "text": words}


def contents(stories):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (48, 64, 3), dtype=np.uint8))
    one, two, three = ({"type": "video", "path": path} for path in stories)
    picture = {"type": "image", "image": image}
    return {
        "an image": [picture, text("What is it?")],
        "a video": [one, text("Why?")],
        "two videos": [one, two, text("Which?")],
        "a video of two items": [three, text("When was it? " * 4)],
        "text between": [one, text("and"), picture, text("(A) or (B)?")],
        "no medium": [text("Hello?")],
        "text first": [text("Look:"), two, text("What?")],
        "the same again": [one, text("Where was it?")],
    }


def test_a_batch_of_different_lengths_has_the_tokens_of_generate(llm, model, processor, stories):
    """Eight prompts, read in chunks at ragged places; then again, with what the first time left in the prefix cache."""
    asked = list(contents(stories).values())
    assert len(asked) == 8
    truth = [expected(model, processor, content) for content in asked]
    for turn in range(2):
        given = answers(llm, [request(processor, content) for content in asked])
        for content, (prompt, ids), answer in zip(asked, truth, given, strict=True):
            assert list(answer.prompt_token_ids) == prompt, content
            assert list(answer.outputs[0].token_ids) == ids, (turn, content)
            if turn and len(prompt) > 2 * BLOCK:
                assert answer.num_cached_tokens > 0


def test_another_question_about_a_video_reads_none_of_its_frames(llm, model, processor, tmp_path):
    """Ten minutes, cut so that the frames end with a block; vLLM keeps states at the ends of blocks alone."""
    frames = 600 * model.config.tokens_per_frame

    def end_of_video(system):
        first, *_ = processor.pieces(talk([{"type": "video"}, text("?")], system))
        return len(first) + frames

    system = next(words for words in ("y" * n for n in range(1, 99)) if end_of_video(words) % BLOCK == 0)
    path = str(make_story(seed=9, duration_s=600).render(tmp_path / "long.mp4"))
    for turn, words in enumerate(("Why?", "What came before?")):
        content = [{"type": "video", "path": path}, text(words)]
        (answer,) = answers(llm, [request(processor, content, system)])
        prompt, ids = expected(model, processor, content, system)
        assert list(answer.prompt_token_ids) == prompt
        assert list(answer.outputs[0].token_ids) == ids
        assert answer.num_cached_tokens == (end_of_video(system) if turn else 0)


def test_a_video_is_sampled_by_fps_alone(llm, model, processor, stories):
    content = [{"type": "video", "path": stories[0]}, text("Why?")]
    for fps in (None, 2.0, 0.5):
        (answer,) = answers(llm, [request(processor, content, fps=fps)])
        frames = len(VideoMa2mbaVideoProcessor(size=56).load(stories[0], fps=fps or 1.0).frames)
        assert answer.prompt_token_ids.count(processor.video_token_id) == frames * model.config.tokens_per_frame
    data = b"x" * 10
    array, metadata = vllm_videos.Undecoded.load_bytes(data, fps=2.0)
    assert array.tobytes() == data
    assert metadata == {"fps": 2.0}
    for wrong in ({"num_frames": 8}, {"max_duration": 3}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            vllm_videos.Undecoded.load_bytes(data, **wrong)


MEASURED = """
import sys
from tests.vllm import conftest
from vllm import LLM
from video_ma2mba import VideoMa2mbaProcessor
from video_ma2mba.planning.measured import restart_peak, peak_bytes
import torch

if __name__ == "__main__":
    folder, *videos = sys.argv[1:]
    processor = VideoMa2mbaProcessor.from_pretrained(folder)
    llm = LLM(folder, enforce_eager=True, dtype="float32", enable_prefix_caching=True, block_size=16,
              max_model_len=40_000, max_num_batched_tokens=512, max_num_seqs=1)
    for video in videos:
        restart_peak(torch.device("cpu"))
        content = [{"type": "video", "path": video}, {"type": "text", "text": "Why?"}]
        conftest.answers(llm, [conftest.request(processor, content)])
        print("peak", peak_bytes(torch.device("cpu")))
"""


def test_two_hours_take_the_memory_of_ten_minutes(tmp_path):
    """As pixels, two hours of the frames of this tiny tower would be 600 MB, half of what the process is without."""
    processor = VideoMa2mbaProcessor(byte_tokenizer(), VideoMa2mbaVideoProcessor(size=168), patch_size=42)
    config = tiny_config(
        text={"vocab_size": len(processor.tokenizer), "pad_token_id": processor.tokenizer.pad_token_id},
        vision={"image_size": 168, "patch_size": 42},
        video_token_id=processor.video_token_id, image_token_id=processor.image_token_id, vision_chunk_size=8,
    )  # fmt: skip
    for part in (VideoMa2mbaForConditionalGeneration(config), processor):
        part.save_pretrained(tmp_path / "model")
    videos = [make_story(seed=1, duration_s=60 * m).render(tmp_path / f"{m}.mp4") for m in (10, 120)]
    script = tmp_path / "measured.py"
    script.write_text(MEASURED)
    root = str(Path(__file__).resolve().parents[2])
    done = subprocess.run(
        [sys.executable, str(script), str(tmp_path / "model"), *map(str, videos)], cwd=root, capture_output=True,
        text=True, env={**os.environ, "PYTHONPATH": root, "TMPDIR": str(tmp_path)},
    )  # fmt: skip
    peaks = [int(line.split()[1]) for line in done.stdout.splitlines() if line.startswith("peak ")]
    assert len(peaks) == 2, done.stderr[-3000:]
    print(*(f"{peak / 1e6:.0f} MB" for peak in peaks))
    assert peaks[1] <= 1.1 * peaks[0]
