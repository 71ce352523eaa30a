"""Settings for the whole suite, made before anything imports torch or transformers; and a small untrained model."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # two xdist workers on two cores: more threads only fight
os.environ["HF_HUB_OFFLINE"] = "1"  # no test may reach for the network


import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import CLIPVisionConfig, Mamba2Config, PreTrainedTokenizerFast

from video_ma2mba import (
    VideoMa2mbaConfig,
    VideoMa2mbaForConditionalGeneration,
    VideoMa2mbaProcessor,
    VideoMa2mbaVideoProcessor,
)
from video_ma2mba.data.synthetic import make_story


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte, and the end of a turn."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({piece: i for i, piece in enumerate(["<|endoftext|>", *alphabet])}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>")


@pytest.fixture(scope="session")
def processor() -> VideoMa2mbaProcessor:
    return VideoMa2mbaProcessor(byte_tokenizer(), VideoMa2mbaVideoProcessor(size=28), patch_size=14)


@pytest.fixture(scope="session")
def model(processor) -> VideoMa2mbaForConditionalGeneration:
    torch.manual_seed(0)
    config = VideoMa2mbaConfig(
        text_config=Mamba2Config(
            hidden_size=32,
            num_hidden_layers=2,
            num_heads=4,
            head_dim=16,
            state_size=16,
            n_groups=1,
            chunk_size=16,
            vocab_size=len(processor.tokenizer),
            tie_word_embeddings=True,
            bos_token_id=0,
            eos_token_id=0,
            pad_token_id=processor.tokenizer.pad_token_id,
        ),
        vision_config=CLIPVisionConfig(
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=28,
            patch_size=14,
        ),
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
