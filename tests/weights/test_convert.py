"""What is converted computes what its source computes, by forward passes written from the sources' own layouts."""

import json

import pytest
import torch
from safetensors import safe_open

from video_ma2mba import VideoMa2mbaConfig, VideoMa2mbaForConditionalGeneration, VideoMa2mbaProcessor, cli
from video_ma2mba.weights.from_parts import read_parts

from . import checkpoints as made
from . import reference

# float32 sums in another order, a few layers deep, on values of order one to ten
CLOSE = {"rtol": 1e-4, "atol": 1e-4}
LLAVA_TOWER = "mm_model.vision_tower.vision_tower.vision_model."


def prepared(tensors, dtype):
    """As they are published: A_log, D and dt_bias stay float32."""
    keep = ("A_log", "mixer.D", "dt_bias", "position_ids")
    return {name: value if name.endswith(keep) else value.to(dtype) for name, value in tensors.items()}


def assert_computes_the_same(folder, weights, kind, tower_weights, tower_prefix, project):
    """Stage by stage: tower with pooling, projector, every layer, logits."""
    model = VideoMa2mbaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
    side = made.SIDES[kind] * made.TOWER["patch_size"]
    pixels = torch.randn(2, 3, side, side)
    per_frame = model.config.tokens_per_frame
    assert per_frame == ((made.SIDES[kind] + 1) // 2) ** 2
    video = [model.config.video_token_id] * (2 * per_frame)
    ids = torch.tensor([7, 0, 12, *video, 40, 41, 42, 200, 3])

    seen = {}
    stages = {"pooled": model.model.multi_modal_projector}
    stages["pooled"].register_forward_pre_hook(lambda module, args: seen.update(pooled=args[0]))
    for number, layer in enumerate(model.model.language_model.layers):
        layer.register_forward_hook(lambda module, args, out, number=number: seen.update({number: out[0][0]}))
    with torch.no_grad():
        features = model.get_video_features(pixels).pooler_output
        logits = model(ids[None], pixel_values_videos=pixels[None]).logits[0]

    expected = reference.tower(
        tower_weights, tower_prefix, pixels, num_layers=made.TOWER["num_hidden_layers"] - 1,
        num_heads=made.TOWER["num_attention_heads"], activation=made.ACTIVATION[kind], eps=made.EPS[kind],
    )  # fmt: skip
    expected = reference.pool(expected)
    torch.testing.assert_close(seen["pooled"].double(), expected, **CLOSE)
    expected = project(expected)
    torch.testing.assert_close(features.double(), expected, **CLOSE)
    table = next(value for name, value in weights.items() if name.startswith("backbone.embedding")).double()
    embeds = table[ids].clone()
    embeds[3 : 3 + len(video)] = expected.flatten(0, 1)
    layers, expected = reference.mamba2(weights, embeds, num_layers=made.LAYERS)
    for number, hidden in enumerate(layers):
        assert hidden.std() > 0.1
        torch.testing.assert_close(seen[number].double(), hidden, **CLOSE)
    assert expected.std() > 0.1
    torch.testing.assert_close(logits.double(), expected, **CLOSE)


@pytest.mark.parametrize("kind", ["clip", "siglip"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("suffix", "num_shards", "wrapper"), [("safetensors", 1, ""), ("safetensors", 3, "module.")])
def test_llava_mamba(kind, dtype, suffix, num_shards, wrapper, tokenizer_folder, tmp_path, capsys):
    torch.manual_seed(1)
    weights = prepared(made.llava_tensors(kind), dtype)
    wrapped = {wrapper + name: value for name, value in weights.items()}
    source = made.write_checkpoint(
        tmp_path / "source", made.llava_config(kind), wrapped, suffix=suffix, num_shards=num_shards
    )
    vision = tmp_path / "vision"
    vision.mkdir()
    (vision / "config.json").write_text(json.dumps(made.tower_config(kind, whole=False)))
    out = tmp_path / "out"
    command = ["convert", "llava-mamba", str(source), "--vision-model", str(vision), "-o", str(out)]
    assert cli.main([*command, "--tokenizer", str(tokenizer_folder), "--verify"]) == 0
    assert "the norm after the last layer" in capsys.readouterr().err

    def project(features):
        return reference.projector(weights, "mm_model.mm_projector.0", "mm_model.mm_projector.2", features)

    assert_computes_the_same(out, weights, kind, weights, LLAVA_TOWER, project)
    assert_dtypes(out, dtype)


@pytest.mark.parametrize("kind", ["clip", "siglip"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("language_format", "suffix", "num_shards", "whole"),
    [
        ("state-spaces", "bin", 1, True),
        ("state-spaces", "bin", 2, False),
        ("transformers", "safetensors", 1, True),
        ("transformers", "safetensors", 2, False),
    ],
)
def test_init(language_format, kind, dtype, suffix, num_shards, whole, tokenizer_folder, tmp_path):
    torch.manual_seed(2)
    original = language_format == "state-spaces"
    config = made.state_spaces_config() if original else made.transformers_mamba2_config()
    weights = prepared(made.mamba2_tensors("embedding" if original else "embeddings", head=original), dtype)
    language = made.write_checkpoint(tmp_path / "lm", config, weights, suffix=suffix, num_shards=num_shards)
    tower = made.whole_vision_tensors(kind) if whole else made.tower_tensors(kind, prefix="")
    tower = prepared(tower, dtype)
    vision = made.write_checkpoint(tmp_path / "vision", made.tower_config(kind, whole), tower, num_shards=num_shards)
    out = tmp_path / "out"
    command = ["convert", "init", "--language-model", str(language), "--vision-model", str(vision), "-o", str(out)]
    assert cli.main([*command, "--tokenizer", str(tokenizer_folder), "--verify"]) == 0

    model = VideoMa2mbaForConditionalGeneration.from_pretrained(out)
    fresh = {name: value for name, value in model.state_dict().items() if "multi_modal_projector" in name}
    weight = fresh["model.multi_modal_projector.linear_1.weight"].float()
    assert 0.4 < weight.std() * weight.shape[1] ** 0.5 < 0.8  # uniform within 1 / sqrt(inputs): 0.577
    assert not fresh["model.multi_modal_projector.linear_1.bias"].any()

    def project(features):
        first, second = (f"model.multi_modal_projector.linear_{i}" for i in (1, 2))
        return reference.projector(fresh, first, second, features)

    assert_computes_the_same(out, weights, kind, tower, "vision_model." if whole else "", project)
    assert_dtypes(out, dtype)


def assert_dtypes(folder, dtype):
    with safe_open(folder / "model.safetensors", "pt") as file:
        found = {name: file.get_tensor(name).dtype for name in file.keys()}  # noqa: SIM118 - no mapping
    assert "lm_head.weight" not in found  # tied
    for name, its_dtype in found.items():
        wide = name.endswith(("mixer.A_log", "mixer.D", "mixer.dt_bias"))
        assert its_dtype == (torch.float32 if wide else dtype), name


@pytest.fixture
def parts(tmp_path, tokenizer_folder):
    torch.manual_seed(3)
    language = made.write_checkpoint(tmp_path / "lm", made.state_spaces_config(), made.mamba2_tensors(), suffix="bin")
    vision = made.write_checkpoint(
        tmp_path / "vision", made.tower_config("siglip", whole=True), made.whole_vision_tensors("siglip")
    )
    sources = ["--language-model", str(language), "--vision-model", str(vision), "--tokenizer", str(tokenizer_folder)]
    return ["convert", "init", *sources]


def test_result_is_a_whole_folder(parts, tmp_path):
    """Config, code, processor: it loads where the package is not installed, and has what the tower was trained with."""
    out = tmp_path / "out"
    assert cli.main([*parts, "-o", str(out), "--dtype", "float16"]) == 0
    assert {"config.json", "generation_config.json", "model.safetensors", "processor_config.json", "tokenizer.json",
            "chat_template.jinja", "modeling_video_ma2mba.py", "processing_video_ma2mba.py"} <= {
        path.name for path in out.iterdir()
    }  # fmt: skip
    config = json.loads((out / "config.json").read_text())
    assert config["dtype"] == "float16"
    assert set(config["auto_map"]) >= {"AutoConfig", "AutoModelForImageTextToText"}
    assert config["image_mean"] == [0.5] * 3
    processor = VideoMa2mbaProcessor.from_pretrained(out)
    assert list(processor.video_processor.image_mean) == [0.5] * 3
    assert processor.video_processor.resize_mode == "squash"
    assert processor.tokens_per_frame == 9
    assert made.VOCAB - 20 <= processor.video_token_id < made.PADDED
    assert config["text_config"]["eos_token_id"] == processor.tokenizer.eos_token_id == 0
    assert config["text_config"]["pad_token_id"] == processor.tokenizer.pad_token_id != 0
    assert_dtypes(out, torch.float16)


def test_result_is_ready_to_be_shared(parts, tmp_path, capsys):
    out = tmp_path / "out"
    assert cli.main([*parts, "-o", str(out)]) == 0
    capsys.readouterr()
    (out / "notes.txt").write_text("of my own")
    assert cli.main(["share", str(out), "--repo", "me/mine", "--dry-run"]) == 0
    printed = capsys.readouterr()
    shared = {line.split()[1] for line in printed.out.splitlines()}
    assert shared == {path.name for path in out.iterdir()} - {"notes.txt"} | {"README.md"}  # which is written then
    assert "not uploaded: notes.txt" in printed.err


def test_shards_and_seed(parts, tmp_path):
    arguments = dict(zip(("language_model", "vision_model", "tokenizer"), parts[3::2], strict=True))
    read_parts(**arguments).write(tmp_path / "whole")
    read_parts(**arguments).write(tmp_path / "cut", shard_bytes=30_000)
    read_parts(**arguments, seed=1).write(tmp_path / "other")
    assert len(list((tmp_path / "cut").glob("model-*-of-*.safetensors"))) > 2
    whole, cut, other = (
        VideoMa2mbaForConditionalGeneration.from_pretrained(tmp_path / name).state_dict()
        for name in ("whole", "cut", "other")
    )
    assert all(torch.equal(value, cut[name]) for name, value in whole.items())
    differ = {name for name, value in whole.items() if not torch.equal(value, other[name])}
    assert differ == {f"model.multi_modal_projector.linear_{i}.weight" for i in (1, 2)}


def test_model_refuses_llava_mamba_by_naming_the_command(tmp_path):
    source = made.write_checkpoint(tmp_path / "source", made.llava_config("clip"), made.llava_tensors("clip"))
    with pytest.raises(ValueError, match=r"llava_mamba.*video-ma2mba convert llava-mamba"):
        VideoMa2mbaForConditionalGeneration.from_pretrained(source)


@pytest.mark.parametrize(("size", "billions"), [("0.7b", 0.7), ("1.8b", 1.8), ("3.1b", 3.1)])
def test_parameter_counts_are_those_published(size, billions):
    """Which count the head apart from the table it is tied to, and the tower's last layer, which is not used."""
    with torch.device("meta"):
        config = VideoMa2mbaConfig.from_preset(size, vision_feature_layer=-1, tie_word_embeddings=False)
        model = VideoMa2mbaForConditionalGeneration(config)
    assert round(model.num_parameters() / 1e9, 1) == billions
