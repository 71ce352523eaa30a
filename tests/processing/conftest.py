"""Tiny videos, and a tiny tokenizer with the merge trap of GPT-NeoX."""

from collections.abc import Sequence
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from video_ma2mba.processing import VideoMa2mbaProcessor, VideoMa2mbaVideoProcessor

from .videos import write_video


@pytest.fixture(scope="session")
def video(tmp_path_factory) -> Path:
    """Four seconds at 10 FPS, 64 x 32, one keyframe."""
    return write_video(tmp_path_factory.mktemp("video") / "plain clip.mp4", 40)


@pytest.fixture(scope="session")
def short_video(tmp_path_factory) -> Path:
    """Two seconds."""
    return write_video(tmp_path_factory.mktemp("video") / "short.mp4", 20)


MERGES = [("|", ">"), ("|>", "("), ("|>", '"'), ("Ċ", "Ċ")]


def make_tokenizer(
    special_tokens: Sequence[str] = ("<|endoftext|>", "<|padding|>"), **kwargs
) -> PreTrainedTokenizerFast:
    """A byte-level BPE that fuses `|>` with an opening bracket or quote after it, as GPT-NeoX does.

    Ids: the special tokens, the 256 byte characters in sorted order, then the merges in order.
    """
    tokens = [*special_tokens, *sorted(pre_tokenizers.ByteLevel.alphabet()), *(left + right for left, right in MERGES)]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=MERGES))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(special_tokens))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **{"eos_token": "<|endoftext|>", **kwargs})


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    return make_tokenizer()


@pytest.fixture
def processor(tokenizer) -> VideoMa2mbaProcessor:
    """Frames of 28 pixels: 2 x 2 patches, pooled to one token per frame."""
    return VideoMa2mbaProcessor(tokenizer, VideoMa2mbaVideoProcessor(size=28))
