"""Broken sources are refused by name, and nothing is left half-written."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from video_ma2mba import cli

from . import checkpoints as made


@pytest.fixture
def command(tmp_path, tokenizer_folder):
    """A conversion that works, of tmp_path/source to tmp_path/out/model."""
    torch.manual_seed(4)
    made.write_checkpoint(tmp_path / "source", made.llava_config("clip"), made.llava_tensors("clip"), num_shards=2)
    (tmp_path / "vision").mkdir()
    (tmp_path / "vision" / "config.json").write_text(json.dumps(made.tower_config("clip", whole=False)))
    (tmp_path / "out").mkdir()
    return [
        "convert", "llava-mamba", str(tmp_path / "source"), "--vision-model", str(tmp_path / "vision"),
        "--tokenizer", str(tokenizer_folder), "-o", str(tmp_path / "out" / "model"),
    ]  # fmt: skip


def assert_refused(command, capsys, tmp_path, *says):
    assert cli.main(command) == 2
    error = capsys.readouterr().err
    assert all(text in error for text in says), error
    assert "Traceback" not in error
    assert list((tmp_path / "out").iterdir()) == []


def change(tmp_path, edit):
    """Edit the tensors of the source, a dict, in place; it is then in one file."""
    source = tmp_path / "source"
    shards = sorted(source.glob("*.safetensors"))
    tensors = {name: value for shard in shards for name, value in load_file(shard).items()}
    edit(tensors)
    for file in (*shards, source / "model.safetensors.index.json"):
        file.unlink()
    save_file(tensors, source / "model.safetensors")


def change_config(tmp_path, **fields):
    """Set fields of the source's config; None removes one."""
    path = tmp_path / "source" / "config.json"
    config = {**json.loads(path.read_text()), **fields}
    path.write_text(json.dumps({name: value for name, value in config.items() if value is not None}))


def test_the_command_works_as_it_is(command, tmp_path, capsys):
    assert cli.main(command) == 0
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["model"]
    assert cli.main(command) == 2
    assert "is there already" in capsys.readouterr().err


def test_tokenizer_of_the_source_and_groups_beside_the_mixers_options(command, tokenizer_folder, tmp_path):
    for file in tokenizer_folder.iterdir():
        shutil.copy(file, tmp_path / "source")
    change_config(tmp_path, n_groups=1)
    place = command.index("--tokenizer")
    assert cli.main(command[:place] + command[place + 2 :]) == 0
    assert (tmp_path / "out" / "model" / "tokenizer.json").is_file()


def test_flipped_key(command, tmp_path, capsys):
    name = "backbone.layers.1.mixer.in_proj.weight"
    change(tmp_path, lambda tensors: tensors.update({name.replace("in_proj", "proj_in"): tensors.pop(name)}))
    assert_refused(command, capsys, tmp_path, "layers.1.mixer.proj_in.weight", "layers.1.mixer.in_proj.weight")


@pytest.mark.parametrize(
    "name",
    [
        "backbone.layers.2.mixer.D",
        "mm_model.mm_projector.2.bias",
        "mm_model.vision_tower.vision_tower.vision_model.pre_layrnorm.weight",
        "backbone.embedding.weight",
    ],
)
def test_missing_tensor(command, name, tmp_path, capsys):
    change(tmp_path, lambda tensors: tensors.pop(name))
    ours = {"mm_model.mm_projector.2.bias": "linear_2.bias"}.get(name, name.partition("_model.")[2] or name)
    tail = ours.rpartition("vision_model.")[2].removeprefix("backbone.")
    assert_refused(command, capsys, tmp_path, tail)


def test_left_over_tensor(command, tmp_path, capsys):
    change(tmp_path, lambda tensors: tensors.update({"mm_model.image_newline": torch.zeros(3)}))
    assert_refused(command, capsys, tmp_path, "mm_model.image_newline")


def test_layer_beyond_the_config(command, tmp_path, capsys):
    change_config(tmp_path, n_layer=made.LAYERS - 1)
    assert_refused(command, capsys, tmp_path, "backbone.layers.2.")


def test_wrong_shape(command, tmp_path, capsys):
    name = "backbone.layers.0.mixer.conv1d.bias"
    change(tmp_path, lambda tensors: tensors.update({name: torch.zeros(7)}))
    assert_refused(command, capsys, tmp_path, name, "(7,)", "(80,)")


def test_head_that_is_not_the_tied_table(command, tmp_path, capsys):
    change(tmp_path, lambda t: t.update({"lm_head.weight": t["backbone.embedding.weight"] + 1}))
    assert_refused(command, capsys, tmp_path, "lm_head.weight", "tied")


def test_head_of_its_own(command, tmp_path):
    change_config(tmp_path, tie_embeddings=False)
    head = torch.randn(made.PADDED, made.WIDTH)
    change(tmp_path, lambda tensors: tensors.update({"lm_head.weight": head}))
    assert cli.main(command) == 0
    assert torch.equal(load_file(tmp_path / "out" / "model" / "model.safetensors")["lm_head.weight"], head)


@pytest.mark.parametrize("keep", [0, 5, 300, -1])
def test_truncated_shard(command, keep, tmp_path, capsys):
    shard = tmp_path / "source" / "model-00002-of-00002.safetensors"
    shard.write_bytes(shard.read_bytes()[:keep])
    assert_refused(command, capsys, tmp_path, shard.name, "truncated")


def test_missing_shard(command, tmp_path, capsys):
    (tmp_path / "source" / "model-00002-of-00002.safetensors").unlink()
    assert_refused(command, capsys, tmp_path, "model-00002-of-00002.safetensors")


def test_index_that_points_elsewhere(command, tmp_path, capsys):
    path = tmp_path / "source" / "model.safetensors.index.json"
    path.write_text(path.read_text().replace('"model-00002', '"../model-00002'))
    assert_refused(command, capsys, tmp_path, "outside its folder", "../model-00002")


def test_index_that_lies(command, tmp_path, capsys):
    path = tmp_path / "source" / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"]["backbone.norm_g.weight"] = index["weight_map"].pop("backbone.norm_f.weight")
    path.write_text(json.dumps(index))
    assert_refused(command, capsys, tmp_path, "disagree", "backbone.norm_f.weight")


class Evil:
    """Unpickling it creates a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


@pytest.mark.parametrize("zipped", [True, False])
def test_pickle_with_code(command, zipped, tmp_path, capsys):
    for file in (tmp_path / "source").glob("model*"):
        file.unlink()
    tensors = {**made.llava_tensors("clip"), "backbone.norm_f.weight": Evil(tmp_path / "pwned")}
    torch.save(tensors, tmp_path / "source" / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)
    assert_refused(command, capsys, tmp_path, "pytorch_model.bin", "could run code")
    assert not (tmp_path / "pwned").exists()


@pytest.mark.parametrize("zipped", [True, False])
def test_plain_pickle_is_read(command, zipped, tmp_path):
    """Also in the layout of before torch 1.6, which cannot be mapped."""
    for file in (tmp_path / "source").glob("model*"):
        file.unlink()
    torch.save(
        made.llava_tensors("clip"), tmp_path / "source" / "pytorch_model.bin", _use_new_zipfile_serialization=zipped
    )
    assert cli.main(command) == 0


@pytest.mark.parametrize("zipped", [True, False])
def test_truncated_pickle(command, zipped, tmp_path, capsys):
    for file in (tmp_path / "source").glob("model*"):
        file.unlink()
    path = tmp_path / "source" / "pytorch_model.bin"
    torch.save(made.llava_tensors("clip"), path, _use_new_zipfile_serialization=zipped)
    path.write_bytes(path.read_bytes()[:-5000])
    assert_refused(command, capsys, tmp_path, path.name, "truncated")


@pytest.mark.parametrize(
    "field",
    ["d_model", "n_layer", "vocab_size", "ssm_cfg", "model_type", "mm_vision_tower", "mm_projector_type",
     "mm_vision_select_layer", "mm_spatial_pool_mode"],
)  # fmt: skip
def test_config_without_a_field(command, field, tmp_path, capsys):
    change_config(tmp_path, **{field: None})
    assert_refused(command, capsys, tmp_path, field, "config.json")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("mm_projector_type", "mlp3x_gelu"),
        ("mm_spatial_pool_mode", "max"),
        ("mm_patch_merge_type", "spatial_unpad"),
        ("mm_use_im_start_end", True),
        ("mm_vision_select_feature", "cls_patch"),
        ("mm_hidden_size", 25),
        ("attn_layer_idx", [1]),
        ("rms_norm", False),
        ("ssm_cfg", {"layer": "Mamba1"}),
        ("ssm_cfg", {"layer": "Mamba2", "d_ssm": 5}),
        ("vocab_size", 200),
    ],
)
def test_config_that_describes_another_model(command, field, value, tmp_path, capsys):
    change_config(tmp_path, **{field: value})
    assert_refused(command, capsys, tmp_path, field)


def test_model_of_another_type(command, tmp_path, capsys):
    change_config(tmp_path, model_type="llava")
    assert_refused(command, capsys, tmp_path, "'llava'", "'llava_mamba'")


def test_tower_that_nobody_knows(command, tmp_path, capsys):
    assert_refused(command[:3] + command[5:], capsys, tmp_path, "somebody/tiny-clip", "--vision-model")


def test_tokenizer_that_does_not_fit(command, tokenizer_folder, tmp_path, capsys):
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast.from_pretrained(tokenizer_folder)
    tokenizer.add_tokens([f"word{i}" for i in range(50)])
    tokenizer.save_pretrained(tmp_path / "large")
    command[command.index("--tokenizer") + 1] = str(tmp_path / "large")
    assert_refused(command, capsys, tmp_path, "--tokenizer", "288")


def test_heads_of_the_frame_selector_are_left_out(command, tmp_path, capsys):
    heads = {name: torch.zeros(2) for name in ("key_head.weight", "value_embedding.weight", "logit_scale")}
    change(tmp_path, lambda tensors: tensors.update(heads))
    assert cli.main(command) == 0
    assert "left out 3: a head of the frame selector" in capsys.readouterr().err


@pytest.mark.parametrize("source", ["nobody/nothing", "no/such/folder", "nowhere"])
def test_source_that_is_not_there(command, source, tmp_path, capsys):
    why = "the Hub" if source == "nobody/nothing" else "check the name"
    assert_refused(["convert", "llava-mamba", source, *command[3:]], capsys, tmp_path, f"{source}: ", why)


def test_config_that_is_no_json(command, tmp_path, capsys):
    (tmp_path / "source" / "config.json").write_text("{")
    assert_refused(command, capsys, tmp_path, "config.json", "JSON")


def test_failed_verification_leaves_nothing(command, tmp_path, capsys):
    name = "backbone.norm_f.weight"
    change(tmp_path, lambda tensors: tensors.update({name: torch.full((made.WIDTH,), torch.inf)}))
    assert_refused([*command, "--verify"], capsys, tmp_path, "finite")


def test_interrupted_conversion_leaves_nothing(command, tmp_path, monkeypatch):
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("video_ma2mba.weights.conversion.save_file", interrupt)
    assert cli.main(command) == 130
    assert list((tmp_path / "out").iterdir()) == []


def test_damaged_tokenizer(command, tokenizer_folder, tmp_path, capsys):
    damaged = shutil.copytree(tokenizer_folder, tmp_path / "damaged")
    file = damaged / "tokenizer.json"
    file.write_text(file.read_text().replace('"id": 0', '"id": -1', 1))
    command[command.index("--tokenizer") + 1] = str(damaged)
    assert_refused(command, capsys, tmp_path, str(damaged), "damaged")


def test_what_a_killed_conversion_left_is_removed(command, tmp_path):
    (tmp_path / "out" / ".model.partial").mkdir()
    (tmp_path / "out" / ".model.partial" / "model-00007-of-00009.safetensors").write_bytes(b"half")
    assert cli.main(command) == 0
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["model"]
    assert not list((tmp_path / "out" / "model").glob("model-*"))


@pytest.mark.parametrize(
    ("field", "value"), [("d_model", "x"), ("n_layer", {}), ("ssm_cfg", 3), ("mm_spatial_pool_stride", "x")]
)
def test_config_with_a_value_of_another_kind(command, field, value, tmp_path, capsys):
    change_config(tmp_path, **{field: value})
    assert_refused(command, capsys, tmp_path, str(tmp_path / "source"), "damaged")
