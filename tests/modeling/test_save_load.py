"""Configurations and checkpoints: round trips, what is refused, and a folder loaded without the package."""

import json
import os
import subprocess
import sys

import pytest
import torch
from safetensors import safe_open
from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText, CLIPVisionConfig, Mamba2Config

from video_ma2mba import VideoMa2mbaConfig, VideoMa2mbaForConditionalGeneration, VideoMa2mbaModel

from ..tiny import tiny_config, tiny_model

VIDEO, IMAGE = 47, 46
IDS = torch.tensor([[5, *[VIDEO] * 8, 6, 7]])


def frames(count=2):
    return torch.randn(1, count, 3, 16, 16, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("checkpoint")
    tiny_model().save_pretrained(path)
    return path


@pytest.mark.parametrize("auto", [False, True])
def test_round_trip_of_the_model(folder, auto):
    model = tiny_model()
    loaded = (AutoModelForImageTextToText if auto else VideoMa2mbaForConditionalGeneration).from_pretrained(folder)
    assert type(loaded) is VideoMa2mbaForConditionalGeneration
    assert not loaded.training
    for (name, mine), (other, theirs) in zip(loaded.state_dict().items(), model.state_dict().items(), strict=True):
        assert name == other
        assert torch.equal(mine, theirs), name
    assert loaded.lm_head.weight is loaded.model.language_model.embeddings.weight
    with torch.no_grad():
        inputs = {"input_ids": IDS, "pixel_values_videos": frames()}
        assert torch.equal(loaded(**inputs).logits, model(**inputs).logits)


def test_base_model_loads_from_the_whole(folder):
    base = AutoModel.from_pretrained(folder)
    assert type(base) is VideoMa2mbaModel
    assert torch.equal(base.language_model.embeddings.weight, tiny_model().model.language_model.embeddings.weight)


def test_tied_weight_is_saved_once_in_safetensors_alone(folder):
    assert not [path for path in folder.iterdir() if path.suffix in (".bin", ".pt", ".pth", ".pkl")]
    with safe_open(folder / "model.safetensors", "pt") as file:
        names = set(file.keys())
    assert "lm_head.weight" not in names
    assert names == {name for name, _ in tiny_model().named_parameters()} | {
        name for name in tiny_model().state_dict() if name.endswith("position_ids") and name in names
    }


def test_weights_missing_from_a_checkpoint_are_initialised(tmp_path):
    """A projector that a checkpoint lacks starts as in a fresh model: finite, not zero, in the usual range."""
    model = tiny_model()
    state = {name: value for name, value in model.state_dict().items() if "multi_modal_projector" not in name}
    del state["lm_head.weight"]
    for name in ("model.language_model.layers.0.mixer.in_proj.weight", "model.language_model.norm_f.weight"):
        del state[name]
    model.save_pretrained(tmp_path, state_dict=state)
    loaded = VideoMa2mbaForConditionalGeneration.from_pretrained(tmp_path)
    assert (loaded.model.language_model.norm_f.weight == 1).all()
    for linear in (loaded.model.multi_modal_projector.linear_1, loaded.model.language_model.layers[0].mixer.in_proj):
        bound = linear.in_features**-0.5
        assert 0.3 * bound < linear.weight.std() < bound
        assert linear.weight.abs().max() <= 4 * bound


def test_round_trip_of_the_configuration(tmp_path):
    config = tiny_config(vision_feature_layer=-1, prefill_chunk_size=77, loss_chunk_size=5, vision_chunk_size=3)
    config.save_pretrained(tmp_path)
    for loaded in (VideoMa2mbaConfig.from_pretrained(tmp_path), AutoConfig.from_pretrained(tmp_path)):
        assert type(loaded) is VideoMa2mbaConfig
        before, after = config.to_dict(), loaded.to_dict()
        before.pop("_name_or_path", None), after.pop("_name_or_path", None)
        assert after == before
        assert isinstance(loaded.text_config, Mamba2Config)
        assert isinstance(loaded.vision_config, CLIPVisionConfig)
        assert loaded.prefill_chunk_size == 77


def test_sub_configurations_may_be_dicts():
    text, vision = tiny_config().text_config.to_dict(), tiny_config().vision_config.to_dict()
    text_before, vision_before = dict(text), dict(vision)
    config = VideoMa2mbaConfig(text_config=text, vision_config=vision, image_token_id=46, video_token_id=47)
    assert config.text_config.hidden_size == 32
    assert config.tokens_per_frame == 4
    assert (text, vision) == (text_before, vision_before)  # the caller's dicts are as they were
    for wrong in ({"hidden_size": 8}, {"model_type": "mamba7"}):
        with pytest.raises(ValueError, match="model_type"):
            VideoMa2mbaConfig(text_config=wrong)
    with pytest.raises(ValueError, match="a sub-config must be a configuration"):
        VideoMa2mbaConfig(text_config="mamba2")


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"vision_feature_layer": -9}, "vision_feature_layer=-9"),
        ({"vision_feature_layer": 4}, "vision_feature_layer=4"),
        ({"image_token_id": 47}, "must differ"),
        ({"video_token_id": 48}, "outside the vocabulary"),
        ({"image_token_id": -1}, "outside the vocabulary"),
        ({"spatial_pool_stride": 0}, "spatial_pool_stride=0"),
        ({"prefill_chunk_size": 0}, "prefill_chunk_size=0"),
        ({"vision_chunk_size": -1}, "vision_chunk_size=-1"),
        ({"loss_chunk_size": 0}, "loss_chunk_size=0"),
        ({"eval_logits_bytes": -1}, "eval_logits_bytes=-1"),
        ({"spatial_pool_mode": "nearest-ish"}, "spatial_pool_mode"),
        ({"vision_feature_select_strategy": "cls"}, "vision_feature_select_strategy"),
        ({"vision_feature_select_strategy": "full"}, "class token"),
        ({"prefill_chunk_size": "many"}, "prefill_chunk_size"),
    ],
)
def test_nonsense_in_a_configuration_is_named(wrong, says):
    with pytest.raises(Exception, match=says) as caught:
        tiny_config(**wrong)
    assert isinstance(caught.value.__cause__ or caught.value, (ValueError, TypeError))


def test_unknown_preset_names_the_known():
    with pytest.raises(ValueError, match=r"no preset '7b'.*0\.7b, 1\.8b, 3\.1b"):
        VideoMa2mbaConfig.from_preset("7b")


def test_presets_take_overrides():
    config = VideoMa2mbaConfig.from_preset("0.7b", prefill_chunk_size=11)
    assert config.prefill_chunk_size == 11
    assert config.text_config.hidden_size == 1024


@pytest.mark.parametrize(
    ("inputs", "says"),
    [
        ({"input_ids": IDS, "pixel_values_videos": frames(3)}, "placeholders"),
        ({"input_ids": IDS, "pixel_values_videos": frames(1)}, "placeholders"),
        ({"input_ids": IDS[:, :-3], "pixel_values_videos": frames(2)}, "placeholders"),
        ({"input_ids": torch.tensor([[5, 6]]), "pixel_values_videos": frames(1)}, "placeholders"),
        ({"input_ids": IDS.expand(2, -1), "pixel_values_videos": frames(2)}, "placeholders"),
        ({"input_ids": IDS, "pixel_values": frames(2)}, "placeholders"),
        ({"input_ids": IDS, "pixel_values_videos": frames(2)[0]}, "shape"),
        ({"input_ids": IDS, "pixel_values_videos": frames(2)[:, :, :1]}, "shape"),
        ({"input_ids": IDS}, "pixel_values_videos"),
        ({"inputs_embeds": torch.zeros(1, 4, 32), "pixel_values_videos": frames(2)}, "need input_ids"),
        ({"input_ids": IDS, "inputs_embeds": torch.zeros(1, 4, 32)}, "either input_ids or inputs_embeds"),
        ({}, "either input_ids or inputs_embeds"),
        ({"input_ids": IDS[:, -2:], "prefill_chunk_size": 0}, "prefill_chunk_size"),
    ],
)
def test_inputs_that_do_not_fit_are_named(inputs, says):
    with pytest.raises(ValueError, match=says):
        tiny_model()(**inputs)


def test_embeddings_can_be_replaced():
    model = tiny_model()
    table = torch.nn.Embedding(48, 32)
    model.set_input_embeddings(table)
    assert model.get_input_embeddings() is model.model.language_model.embeddings is table


def test_resized_embeddings_stay_tied_and_work():
    model = tiny_model()
    model.resize_token_embeddings(56)
    assert model.lm_head.weight is model.model.language_model.embeddings.weight
    assert model.config.text_config.vocab_size == 56
    with torch.no_grad():
        assert model(torch.tensor([[50, 55]])).logits.shape == (1, 2, 56)


WITHOUT_PACKAGE = """
import json, sys, torch
sys.modules["video_ma2mba"] = None  # importing it raises ImportError
from transformers import AutoModelForImageTextToText
torch.set_num_threads(1)
model = AutoModelForImageTextToText.from_pretrained(sys.argv[1], trust_remote_code=True)
assert type(model).__module__.startswith("transformers_modules."), type(model).__module__
inputs = json.loads(sys.argv[2])
pixels = torch.randn(1, 2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
out = model.generate(torch.tensor(inputs), pixel_values_videos=pixels, max_new_tokens=5, do_sample=False)
model.save_pretrained(sys.argv[3])
print(json.dumps(out.tolist()))
"""


def test_saved_folder_works_where_the_package_is_not_installed(folder, tmp_path):
    """Offline, with the code that lies beside the weights; and what that process saves carries the code on."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(tmp_path / "modules")}
    arguments = [str(folder), json.dumps(IDS.tolist()), str(tmp_path / "again")]
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_PACKAGE, *arguments],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    expected = tiny_model().generate(IDS, pixel_values_videos=frames(), max_new_tokens=5, do_sample=False)
    assert json.loads(done.stdout.splitlines()[-1]) == expected.tolist()
    assert {p.name for p in folder.glob("*.py")} <= {p.name for p in (tmp_path / "again").glob("*.py")}
    assert (folder / "modeling_video_ma2mba.py").is_file()


def test_code_is_left_out_where_the_class_is_not_for_the_hub(tmp_path, monkeypatch):
    monkeypatch.setattr(VideoMa2mbaForConditionalGeneration, "_auto_class", None)
    monkeypatch.setattr(VideoMa2mbaConfig, "_auto_class", None)
    tiny_model().save_pretrained(tmp_path)
    assert not list(tmp_path.glob("*.py"))
    assert "auto_map" not in json.loads((tmp_path / "config.json").read_text())
