"""Saving, loading, and loading the copied code where the package is not installed."""

import json
import subprocess
import sys

import pytest
import torch
from transformers import AutoProcessor

from video_ma2mba.processing import VideoMa2mbaProcessor, VideoMa2mbaVideoProcessor

from .conftest import make_tokenizer


@pytest.fixture
def conversation(video):
    content = [{"type": "video", "path": str(video)}, {"type": "text", "text": "(A) or (B)?"}]
    return [{"role": "user", "content": content}]


@pytest.fixture
def saved(tmp_path):
    """A processor with no setting left at its default, and the folder it was saved to."""
    processor = VideoMa2mbaProcessor(
        make_tokenizer(),
        VideoMa2mbaVideoProcessor(size=24, resize_mode="squash", fps=2.0, image_std=(0.5, 0.5, 0.5)),
        patch_size=4,
        spatial_pool_stride=3,
        video_token="<clip>",
        image_token="<picture>",
        system_prompt="Be brief.",
        media_separator=" ",
    )
    processor.save_pretrained(tmp_path / "folder")
    return processor, tmp_path / "folder"


def _settings(part):
    """Without the note where the code lies, which saving adds."""
    settings = part.to_dict()
    settings.pop("auto_map", None)
    settings.pop("video_processor", None)
    return settings


def _assert_same(one, other, conversation):
    assert one.apply_chat_template(conversation) == other.apply_chat_template(conversation)
    wanted = one.apply_chat_template(conversation, tokenize=True, add_generation_prompt=True)
    batch = other.apply_chat_template(conversation, tokenize=True, add_generation_prompt=True)
    assert batch.keys() == wanted.keys()
    for name in wanted:
        torch.testing.assert_close(batch[name], wanted[name], rtol=0, atol=0)


def test_round_trip(saved, conversation, tmp_path):
    processor, folder = saved
    loaded = VideoMa2mbaProcessor.from_pretrained(folder)
    assert _settings(loaded) == _settings(processor)
    assert _settings(loaded.video_processor) == _settings(processor.video_processor)
    assert loaded.tokens_per_frame == processor.tokens_per_frame == 4
    assert loaded.tokenizer.pad_token == "<|padding|>"
    _assert_same(processor, loaded, conversation)
    loaded.save_pretrained(tmp_path / "again")
    _assert_same(processor, VideoMa2mbaProcessor.from_pretrained(tmp_path / "again"), conversation)


def test_settings_can_be_overridden_while_loading(saved):
    _, folder = saved
    assert VideoMa2mbaProcessor.from_pretrained(folder, patch_size=6).patch_size == 6


def test_what_is_saved_is_text(saved):
    _, folder = saved
    assert {path.suffix for path in folder.iterdir() if path.is_file()} <= {".json", ".jinja", ".py"}
    settings = json.loads((folder / "processor_config.json").read_text())
    assert settings["processor_class"] == "VideoMa2mbaProcessor"
    assert settings["video_processor"]["size"] == {"height": 24, "width": 24}
    assert (folder / "chat_template.jinja").read_text().count("<clip>") == 1


def test_a_subfolder(tmp_path, saved, conversation):
    processor, folder = saved
    assert folder.name == "folder"
    loaded = VideoMa2mbaProcessor.from_pretrained(tmp_path, subfolder="folder")
    _assert_same(processor, loaded, conversation)


_STRANGER = """
import json, sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "video_ma2mba":
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Refuse())
from transformers import AutoProcessor
folder, again, conversation = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
assert type(processor).__module__.startswith("transformers_modules"), type(processor)
processor.save_pretrained(again)
processor = AutoProcessor.from_pretrained(again, trust_remote_code=True)
batch = processor.apply_chat_template(conversation, tokenize=True, add_generation_prompt=True)
print(json.dumps({"ids": batch["input_ids"].tolist(), "pixels": int(batch["pixel_values_videos"].sum())}))
"""


def test_the_copied_code_works_where_the_package_is_not_installed(tmp_path, monkeypatch, conversation):
    monkeypatch.setattr(VideoMa2mbaProcessor, "_auto_class", "AutoProcessor")
    processor = VideoMa2mbaProcessor(make_tokenizer(), VideoMa2mbaVideoProcessor(size=28))
    folder, again = tmp_path / "folder", tmp_path / "again"
    processor.save_pretrained(folder)
    assert {path.name for path in folder.glob("*.py")} == {
        "processing_video_ma2mba.py",
        "chat_video_ma2mba.py",
        "frame_sampling_video_ma2mba.py",
        "options_video_ma2mba.py",
        "rows_video_ma2mba.py",
        "video_processing_video_ma2mba.py",
        "frame_pixels.py",
        "frames_in_memory.py",
        "media_location.py",
        "picture_source.py",
        "video_container.py",
        "video_reader.py",
        "video_source.py",
    }
    run = subprocess.run(
        [sys.executable, "-c", _STRANGER, folder, again, json.dumps(conversation)],
        env={"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "home"), "OMP_NUM_THREADS": "1", "PATH": "/usr/bin:/bin"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    batch = processor.apply_chat_template(conversation, tokenize=True, add_generation_prompt=True)
    assert json.loads(run.stdout.splitlines()[-1]) == {
        "ids": batch["input_ids"].tolist(),
        "pixels": int(batch["pixel_values_videos"].sum()),
    }


def test_auto_processor_knows_the_class(saved, conversation):
    """Registered by the package itself, on import."""
    processor, folder = saved
    (folder / "config.json").write_text(json.dumps({"model_type": "video_ma2mba"}))
    loaded = AutoProcessor.from_pretrained(folder)
    assert isinstance(loaded, VideoMa2mbaProcessor)
    _assert_same(processor, loaded, conversation)
