"""`convert init`: parts that are not what they should be are refused by name; and what is taken from beside them."""

import json
import shutil
from pathlib import Path

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file, save_file

from video_ma2mba import VideoMa2mbaConfig, VideoMa2mbaForConditionalGeneration, cli
from video_ma2mba.weights import conversion, parts

from . import checkpoints as made


@pytest.fixture
def language(tmp_path):
    return made.write_checkpoint(tmp_path / "lm", made.transformers_mamba2_config(), made.mamba2_tensors("embeddings"))


@pytest.fixture
def vision(tmp_path):
    return made.write_checkpoint(
        tmp_path / "vision", made.tower_config("clip", whole=False), made.tower_tensors("clip", prefix="")
    )


@pytest.fixture
def command(tmp_path, language, vision, tokenizer_folder):
    out = str(tmp_path / "out")
    sources = ["--language-model", str(language), "--vision-model", str(vision), "--tokenizer", str(tokenizer_folder)]
    return ["convert", "init", *sources, "-o", out]


def assert_refused(command, capsys, *says):
    assert cli.main(command) == 2
    error = capsys.readouterr().err
    assert all(text in error for text in says), error
    assert not Path(command[-1]).exists()


def write(folder, name, value):
    (folder / name).write_text(value if isinstance(value, str) else json.dumps(value))


def test_a_language_model_of_another_kind(command, language, capsys):
    write(language, "config.json", {**made.transformers_mamba2_config(), "model_type": "llama"})
    assert_refused(command, capsys, str(language), "'llama', not a Mamba-2 language model")


def test_a_tower_of_another_kind(command, vision, capsys):
    write(vision, "config.json", {"model_type": "vit"})
    assert_refused(command, capsys, str(vision), "'vit'; a tower must be CLIP or SigLIP")


def test_a_language_model_without_its_table(command, language, capsys):
    tensors = load_file(language / "model.safetensors")
    del tensors["backbone.embeddings.weight"]
    save_file(tensors, language / "model.safetensors")
    assert_refused(command, capsys, "there is no backbone.embedding.weight")


def test_two_tensors_that_are_one(command, language, capsys):
    tensors = load_file(language / "model.safetensors")
    tensors["backbone.embedding.weight"] = tensors["backbone.embeddings.weight"].clone()
    save_file(tensors, language / "model.safetensors")
    assert_refused(command, capsys, "are both model.language_model.embeddings.weight")


def test_two_shards_that_hold_one_tensor(command, language, capsys):
    tensors = load_file(language / "model.safetensors")
    (language / "model.safetensors").unlink()
    for name in ("a.safetensors", "b.safetensors"):
        save_file(tensors, language / name)
    index = {name: f"{'ab'[number % 2]}.safetensors" for number, name in enumerate(tensors)}
    write(language, "model.safetensors.index.json", {"weight_map": index})
    assert_refused(command, capsys, "b.safetensors: holds", "which a.safetensors holds too")


@pytest.mark.parametrize(
    ("index", "says"), [({"weights": {}}, "has no weight_map"), ([], "holds a list, not an object"), ("{", "not valid")]
)
def test_an_index_that_is_none(command, language, capsys, index, says):
    write(language, "model.safetensors.index.json", index)
    assert_refused(command, capsys, "model.safetensors.index.json", says)


@pytest.mark.parametrize(
    ("value", "says"), [([1, 2], "holds a list, not a dict of tensors"), ({"a": 3}, "a is a int, not a tensor")]
)
def test_a_bin_file_of_something_else(command, language, capsys, value, says):
    (language / "model.safetensors").unlink()
    torch.save(value, language / "pytorch_model.bin")
    assert_refused(command, capsys, "pytorch_model.bin", says)


def test_a_tokenizer_that_is_none(command, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    command[command.index("--tokenizer") + 1] = str(tmp_path / "empty")
    assert_refused(command, capsys, "there is no tokenizer.json; name a tokenizer with --tokenizer")


def test_a_place_that_is_not_there(command, tmp_path, capsys):
    command[-1] = str(tmp_path / "no" / "out")
    assert_refused(command, capsys, "create the folder")


def test_what_is_written_otherwise_is_found_by_verification(command, capsys, monkeypatch):
    def rounded(tensors, file, **options):
        save_file({name: tensor.bfloat16().to(tensor.dtype) for name, tensor in tensors.items()}, file, **options)

    monkeypatch.setattr(conversion, "save_file", rounded)
    assert_refused([*command[:-2], "--verify", *command[-2:]], capsys, "verification failed", "is not what its source")


def test_tokenizer_and_statistics_are_taken_from_beside_the_parts(command, language, vision, tokenizer_folder):
    for file in tokenizer_folder.iterdir():
        shutil.copy(file, language)
    write(vision, "preprocessor_config.json", {"image_mean": [0.1, 0.2, 0.3]})
    place = command.index("--tokenizer")
    assert cli.main(command[:place] + command[place + 2 :]) == 0
    config = VideoMa2mbaConfig.from_pretrained(command[-1])
    assert list(config.image_mean) == [0.1, 0.2, 0.3]
    assert list(config.image_std) == [0.26862954, 0.26130258, 0.27577711]  # CLIP's, as the folder says none


def test_weights_of_the_hub_are_safetensors_or_else_bin(tmp_path, language, monkeypatch):
    asked = []

    def snapshot_download(name, allow_patterns):
        asked.append((name, allow_patterns))
        return str(tmp_path / "snapshot")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    (tmp_path / "snapshot").mkdir()
    assert parts.fetch("owner/name") == tmp_path / "snapshot"
    assert asked == [
        ("owner/name", ["*.json", "*.safetensors"]), ("owner/name", ["*.json", "pytorch_model*.bin"])
    ]  # fmt: skip
    shutil.copy(language / "model.safetensors", tmp_path / "snapshot")
    asked.clear()
    assert parts.fetch("owner/name") == tmp_path / "snapshot"
    assert len(asked) == 1


def test_an_empty_folder_may_be_the_place(command):
    Path(command[-1]).mkdir()
    assert cli.main(command) == 0
    assert VideoMa2mbaForConditionalGeneration.from_pretrained(command[-1]).config.text_config.vocab_size == made.PADDED
