"""Adapters as things of their own: merged into a folder like any other, and shared with a card of ours."""

from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file

from video_ma2mba import VideoMa2mbaForConditionalGeneration, VideoMa2mbaProcessor, cli
from video_ma2mba.loading import TINY_MODEL
from video_ma2mba.training.lora import lora_config


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    """Adapters on the tiny model that change what it says."""
    model = get_peft_model(VideoMa2mbaForConditionalGeneration.from_pretrained(TINY_MODEL), lora_config(rank=4))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.05, generator=generator)
    folder = tmp_path_factory.mktemp("adapted") / "model"
    model.save_pretrained(folder)
    return folder


def test_merged_weights_are_those_of_base_and_adapters(adapter, tmp_path):
    assert cli.main(["merge", str(adapter), "-o", str(tmp_path / "merged")]) == 0
    merged, base = (load_file(Path(folder) / "model.safetensors") for folder in (tmp_path / "merged", TINY_MODEL))
    lora = load_file(adapter / "adapter_model.safetensors")
    changed = {name for name in merged if not torch.equal(merged[name], base[name])}
    assert merged.keys() == base.keys()
    assert len(changed) == len(lora) // 2
    for name in changed:
        inner = f"base_model.model.{name.removesuffix('.weight')}"
        product = lora[f"{inner}.lora_B.weight"].double() @ lora[f"{inner}.lora_A.weight"].double()
        expected = base[name].double() + product * 32 / 4  # alpha over rank
        torch.testing.assert_close(merged[name].double(), expected, rtol=1e-5, atol=1e-6)
    ids = torch.randint(2, 40, (1, 9), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        adapted = PeftModel.from_pretrained(VideoMa2mbaForConditionalGeneration.from_pretrained(TINY_MODEL), adapter)
        whole = VideoMa2mbaForConditionalGeneration.from_pretrained(tmp_path / "merged").eval()
        torch.testing.assert_close(whole(ids).logits, adapted.eval()(ids).logits, rtol=1e-4, atol=1e-4)
    VideoMa2mbaProcessor.from_pretrained(tmp_path / "merged")


def test_merge_writes_nothing_over_and_nothing_half(adapter, tmp_path, capsys):
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "a").touch()
    assert cli.main(["merge", str(adapter), "-o", str(tmp_path / "there")]) == 2
    assert "is there already" in capsys.readouterr().err
    assert cli.main(["merge", str(tmp_path / "there"), "-o", str(tmp_path / "out")]) == 2
    assert "there is no adapter_config.json" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["there"]


def test_a_folder_of_adapters_is_shared_with_a_card_of_ours(adapter, capsys):
    share = ["share", str(adapter), "--repo", "me/adapters", "--dry-run"]
    assert cli.main(share) == 2  # the base is a folder of this machine, which means nothing on the Hub
    assert "say its Hub id with --base-model" in capsys.readouterr().err
    assert cli.main([*share, "--base-model", "video-ma2mba/video-ma2mba-tiny"]) == 0
    out, err = capsys.readouterr()
    assert {line.split()[1] for line in out.splitlines()} == {
        "README.md", "adapter_config.json", "adapter_model.safetensors"
    }  # fmt: skip
    assert "nothing was uploaded" in err
    assert "says of a black frame" in err
    assert cli.main([*share[:-1], "--card-only", "--base-model", "video-ma2mba/video-ma2mba-tiny"]) == 0
    card = ModelCard.load(adapter / "README.md")
    assert (card.data.library_name, card.data.base_model) == ("peft", "video-ma2mba/video-ma2mba-tiny")
    assert "More Information Needed" not in card.text
    assert "pip install" in card.text
