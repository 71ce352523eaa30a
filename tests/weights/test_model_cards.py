"""The folders of the paper's sizes: each is what its preset says, and its card is what the command renders."""

from pathlib import Path

import pytest

from video_ma2mba import VideoMa2mbaConfig, VideoMa2mbaProcessor
from video_ma2mba.weights.model_card import check_card, render_card

CARDS = Path(__file__).resolve().parents[2] / "model_cards"
BACKBONES = {"0.7b": "370m", "1.8b": "1.3b", "3.1b": "2.7b"}


@pytest.mark.parametrize("size", BACKBONES)
def test_folder_is_its_preset(size):
    folder = CARDS / f"video-ma2mba-{size}"
    config = VideoMa2mbaConfig.from_pretrained(folder)
    ignored = {"_name_or_path", "architectures", "dtype", "transformers_version"}
    found, preset = config.to_dict(), VideoMa2mbaConfig.from_preset(size).to_dict()
    for name in ignored:
        found.pop(name, None), preset.pop(name, None)
    assert found == preset
    processor = VideoMa2mbaProcessor.from_pretrained(folder)
    assert (processor.image_token_id, processor.video_token_id) == (config.image_token_id, config.video_token_id)
    assert processor.tokens_per_frame == config.tokens_per_frame == 144
    assert list(processor.video_processor.image_mean) == list(config.image_mean)
    assert len(processor.tokenizer) == 50279  # GPT-NeoX's own and the two placeholders


@pytest.mark.parametrize("size", BACKBONES)
def test_card_is_what_is_rendered(size):
    folder = CARDS / f"video-ma2mba-{size}"
    check_card((folder / "README.md").read_text(encoding="utf-8"), folder / "README.md")
    bases = [f"state-spaces/mamba2-{BACKBONES[size]}", "openai/clip-vit-large-patch14-336"]
    card = render_card(folder, f"video-ma2mba/video-ma2mba-{size}", base_models=bases)
    assert (folder / "README.md").read_text(encoding="utf-8") == str(card) + "\n"
