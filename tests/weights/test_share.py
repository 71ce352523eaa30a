"""What goes to the Hub, and what does not; the card; the upload, to a stand-in for the Hub."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file

from video_ma2mba import cli
from video_ma2mba.data.synthetic import make_story

TINY = Path(__file__).resolve().parents[2] / "model_cards" / "video-ma2mba-tiny"
FILES = {
    "configuration_video_ma2mba.py", "modeling_video_ma2mba.py", "mamba2.py", "ssd.py", "ssd_kernels.py",
    "scan_backends.py", "segment_sizes.py", "recompute.py", "run_layers.py", "checkpointing.py", "checkpoint_plan.py",
    "checkpoint_costs.py",
    "multi_axis_checkpointing.py", "autocast.py", "arguments.py", "generation_video_ma2mba.py", "gradient_horizon.py",
    "head_loss.py", "interleaved_inputs.py", "outputs.py", "sharded_parameters.py", "visual_features.py",
    "processing_video_ma2mba.py", "video_processing_video_ma2mba.py",
    "chat_video_ma2mba.py", "frame_sampling_video_ma2mba.py", "options_video_ma2mba.py", "rows_video_ma2mba.py",
    "video_reader.py", "video_source.py", "picture_source.py", "media_location.py", "frame_pixels.py",
    "frames_in_memory.py", "video_container.py", "host_copies.py", "host_memory.py", "mamba2_cache.py",
    "README.md", "chat_template.jinja", "config.json", "generation_config.json", "model.safetensors",
    "processor_config.json", "tokenizer.json", "tokenizer_config.json",
}  # fmt: skip


@pytest.fixture
def folder(tmp_path):
    return Path(shutil.copytree(TINY, tmp_path / "tiny", ignore=shutil.ignore_patterns("*.py")))


@pytest.fixture
def sent(monkeypatch):
    """What a stand-in for the Hub was sent."""
    sent = {}

    class Hub:
        def create_repo(self, repo, private, exist_ok):
            sent.update(repo=repo, private=private)
            return f"https://hub/{repo}"

        def upload_folder(self, repo_id, folder_path, allow_patterns, commit_message):
            sent.update(files=set(allow_patterns), folder=folder_path)

    monkeypatch.setattr("huggingface_hub.HfApi", Hub)
    return sent


def contents(folder):
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def listed(text):
    return {line.split()[1] for line in text.splitlines()}


def test_dry_run_lists_exactly_what_is_needed(folder):
    """By the command itself, in a process of its own, with nobody there to answer a prompt."""
    (folder / "events.out.tfevents.1").write_text("log")
    (folder / "optimizer.safetensors").write_bytes(b"")
    (folder / "scratch.py").write_text("print()")
    (folder / "training_args.bin").write_bytes(b"\x80")
    (folder / "README.md").unlink()
    before = contents(folder)
    done = subprocess.run(
        [Path(sys.executable).with_name("video-ma2mba"), "share", str(folder), "--repo", "me/tiny", "--dry-run"],
        stdin=subprocess.DEVNULL, capture_output=True, text=True, env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert listed(done.stdout) == FILES
    assert "not uploaded: events.out.tfevents.1, optimizer.safetensors, scratch.py, training_args.bin" in done.stderr
    assert "custom code" not in done.stderr
    assert contents(folder) == before
    assert done.stderr.splitlines()[-1] == (
        f"a dry run: nothing was uploaded and nothing written. Without --dry-run these {len(FILES)} files go to "
        f"me/tiny after writing the card and the code into {folder}"
    )


WITHOUT_THE_PACKAGE = """
import importlib.abc, sys

class NotInstalled(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("video_ma2mba", "modeling", "processing"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, NotInstalled())
from transformers import AutoModelForImageTextToText, AutoProcessor

folder, video = sys.argv[1:]
model = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True).eval()
processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
content = [{"type": "video", "path": video}, {"type": "text", "text": "What colour was the circle?"}]
chat = [{"role": "user", "content": content}]
inputs = processor.apply_chat_template(chat, add_generation_prompt=True, tokenize=True)
print(processor.decode(model.generate(**inputs)[0, inputs["input_ids"].shape[1]:], skip_special_tokens=True).strip())
"""


def test_the_uploaded_files_alone_answer_without_the_package(folder, tmp_path, sent):
    assert cli.main(["share", str(folder), "--repo", "me/tiny"]) == 0
    assert sent["files"] == FILES
    alone = tmp_path / "alone"
    alone.mkdir()
    for name in FILES:
        shutil.copy(folder / name, alone)
    story = make_story(seed=7, duration_s=20)
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_THE_PACKAGE, str(alone), str(story.render(tmp_path / "story.mp4"))],
        cwd=tmp_path, env={**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules")}, stdout=subprocess.PIPE,
        text=True, check=True,
    )  # fmt: skip
    assert done.stdout.strip() == story.circle.colour


def test_card_says_what_is_known(folder, tmp_path):
    (folder / "README.md").unlink()
    evaluation = tmp_path / "evaluation.json"
    row = {"dataset": "Video-MME", "split": "short", "metric": "accuracy", "value": 57.6}
    evaluation.write_text(json.dumps({"results": [row]}))
    training = tmp_path / "training.json"
    training.write_text(json.dumps({"steps": 6000}))
    command = ["share", str(folder), "--repo", "me/mine", "--card-only", "--license", "mit", "--base-model", "a/b"]
    assert cli.main([*command, "--evaluation", str(evaluation), "--training", str(training)]) == 0
    card = ModelCard.load(folder / "README.md")
    assert (card.data.license, card.data.base_model) == ("mit", ["a/b"])
    (result,) = card.data.eval_results
    assert (result.dataset_name, result.dataset_split, result.metric_value) == ("Video-MME", "short", 57.6)
    for text in (
        "1,012,560",
        "| steps | 6000 |",
        "57.6",
        'from_pretrained("me/mine", trust_remote_code=True)',
        "## Limits",
    ):
        assert text in card.content
    assert not list(folder.glob(".README*"))


def refused(command, capsys, *says):
    assert cli.main(command) == 2
    error = capsys.readouterr().err
    assert all(text in error for text in says), error


@pytest.mark.parametrize(
    "missing", ["tokenizer.json", "chat_template.jinja", "model.safetensors", "ssd.py", "modeling_video_ma2mba.py"]
)
def test_incomplete_folder(folder, missing, sent, capsys):
    assert cli.main(["share", str(folder), "--repo", "me/tiny"]) == 0  # brings its code
    (folder / missing).unlink()
    says = "no weights" if missing == "model.safetensors" else missing
    refused(["share", str(folder), "--repo", "me/tiny", "--dry-run"], capsys, says)


def test_a_config_that_names_no_code(folder, capsys):
    config = json.loads((folder / "config.json").read_text())
    del config["auto_map"]
    (folder / "config.json").write_text(json.dumps(config))
    refused(["share", str(folder), "--repo", "me/tiny", "--dry-run"], capsys, "auto_map")


def test_weights_that_are_a_pickle(folder, capsys):
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    refused(["share", str(folder), "--repo", "me/tiny", "--dry-run"], capsys, "pytorch_model.bin", "safetensors")


def test_weights_that_are_not_all_there(folder, capsys):
    tensors = load_file(folder / "model.safetensors")
    name = "model.language_model.layers.1.mixer.D"
    tensors["model.extra"] = tensors.pop(name)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    refused(["share", str(folder), "--repo", "me/tiny", "--dry-run"], capsys, name, "model.extra")


def test_truncated_weights(folder, capsys):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-9])
    refused(["share", str(folder), "--repo", "me/tiny", "--dry-run"], capsys, "model.safetensors", "truncated")


@pytest.mark.parametrize(
    "card", ["no metadata", "---\nlicense: mit\n---\n", "---\n- a\n- list\n---\n", "---\nmodel-index: 3\n---\n"]
)
def test_card_that_the_hub_cannot_read(folder, card, capsys):
    (folder / "README.md").write_text(card)
    refused(["share", str(folder), "--repo", "me/tiny", "--dry-run"], capsys, "README.md")


def test_wrong_arguments(folder, tmp_path, capsys):
    refused(["share", str(tmp_path), "--repo", "me/tiny"], capsys, "config.json")
    refused(["share", str(folder), "--repo", "tiny"], capsys, "owner/name")
    command = ["share", str(folder), "--repo", "me/tiny", "--card-only"]
    for results in ('[{"dataset": "x", "value": 3}]', '[{"dataset": "x", "metric": 1, "value": 3}]', "3"):
        (tmp_path / "e.json").write_text(f'{{"results": {results}}}')
        refused([*command, "--evaluation", str(tmp_path / "e.json")], capsys, "of the evaluation")
    refused([*command, "--training", str(tmp_path / "none.json")], capsys, "none.json")


def test_upload_sends_the_listed_files(folder, sent, capsys):
    assert cli.main(["share", str(folder), "--repo", "me/tiny", "--private"]) == 0
    assert sent == {"repo": "me/tiny", "private": True, "files": FILES, "folder": folder}
    assert capsys.readouterr().out.splitlines()[-1] == "https://hub/me/tiny"


def test_unreachable_hub_is_an_error_not_a_traceback(folder, capsys):
    refused(["share", str(folder), "--repo", "me/tiny"], capsys, "me/tiny: the Hub cannot be reached")


def test_options_of_a_card_that_is_written_are_refused(folder, capsys):
    command = ["share", str(folder), "--repo", "me/tiny", "--dry-run"]
    for option in (("--license", "mit"), ("--base-model", "a/b"), ("--training", "t.json")):
        refused([*command, *option], capsys, option[0], "--card-only writes it anew")
    refused(["share", str(folder), "--repo", "me/tiny", "--card-only", "--private"], capsys, "--private")


def test_a_damaged_config_is_refused(folder, capsys):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "spatial_pool_mode": []}))
    (folder / "README.md").unlink()  # which is then made of the config
    refused(["share", str(folder), "--repo", "me/tiny", "--dry-run"], capsys, str(folder), "damaged")


def test_a_damaged_template_is_refused(folder, capsys):
    (folder / "chat_template.jinja").write_text("{% if messages %}")
    refused(["share", str(folder), "--repo", "me/tiny", "--dry-run"], capsys, str(folder), "damaged")
