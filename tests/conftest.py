"""Settings for the whole suite, made before anything imports torch or transformers; and a small untrained model."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # two xdist workers on two cores: more threads only fight
os.environ["HF_HUB_OFFLINE"] = "1"  # no test may reach for the network


import pytest
import torch

from video_ma2mba import VideoMa2mbaForConditionalGeneration, VideoMa2mbaProcessor, VideoMa2mbaVideoProcessor
from video_ma2mba.data.synthetic import make_story

from .tiny import byte_tokenizer, tiny_config


@pytest.fixture(autouse=True)
def seeded():
    """Random tensors are the same in any order of the tests; memory that nobody has written yet is NaN."""
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True, warn_only=True)  # torch.empty fills with NaN, or the largest integer


@pytest.fixture
def ending_streams(monkeypatch):
    """A pass over streamed Parquet ends at once: datasets waits five seconds for threads that may outlive it."""
    monkeypatch.setattr("datasets.config.SLEEP_TIME_ON_THREADS_SHUTDOWN", 0.1)


@pytest.fixture(scope="session")
def processor() -> VideoMa2mbaProcessor:
    return VideoMa2mbaProcessor(byte_tokenizer(), VideoMa2mbaVideoProcessor(size=28), patch_size=14)


@pytest.fixture(scope="session")
def model(processor) -> VideoMa2mbaForConditionalGeneration:
    torch.manual_seed(0)
    config = tiny_config(
        text={"vocab_size": len(processor.tokenizer), "pad_token_id": processor.tokenizer.pad_token_id},
        vision={"image_size": 28, "patch_size": 14},
        video_token_id=processor.video_token_id,
        image_token_id=processor.image_token_id,
        vision_chunk_size=4,
    )
    return VideoMa2mbaForConditionalGeneration(config).eval()


@pytest.fixture(scope="session")
def model_folder(model, processor, tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("model")
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def video(tmp_path_factory) -> str:
    return str(make_story(seed=3, duration_s=10).render(tmp_path_factory.mktemp("video") / "story.mp4"))
