"""A saved folder is enough: it answers the same where this package is not installed."""

import json
import os
import subprocess
import sys

import numpy as np
import torch

# The finder stands in for an environment without the package: whatever tries to import it fails, as it would there.
NOT_INSTALLED = """
import importlib.abc, json, sys

class NotInstalled(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("video_ma2mba", "modeling", "processing"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, NotInstalled())
try:
    import video_ma2mba
except ModuleNotFoundError:
    pass
else:
    sys.exit("the package can still be imported")
"""

WITHOUT_THE_PACKAGE = (
    NOT_INSTALLED
    + """
from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText, AutoModelForMultimodalLM, AutoProcessor

folder, video, again = sys.argv[1:]
assert AutoConfig.from_pretrained(folder, trust_remote_code=True).model_type == "video_ma2mba"
model = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True).eval()
assert type(AutoModel.from_pretrained(folder, trust_remote_code=True)).__name__ == "VideoMa2mbaModel"
assert type(AutoModelForMultimodalLM.from_pretrained(folder, trust_remote_code=True)) is type(model)
processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
chat = [{"role": "user", "content": [{"type": "video", "path": video}, {"type": "text", "text": "What came first?"}]}]
inputs = processor.apply_chat_template(chat, add_generation_prompt=True, tokenize=True)
print(json.dumps({"tokens": model.generate(**inputs, max_new_tokens=12).tolist()}))
model.save_pretrained(again)
processor.save_pretrained(again)
"""
)

TOO_OLD = (
    NOT_INSTALLED
    + """
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

sys.modules["transformers"].__version__ = "5.16.3"
for loader in (AutoConfig, AutoModelForImageTextToText, AutoProcessor):
    try:
        loader.from_pretrained(sys.argv[1], trust_remote_code=True)
    except ImportError as error:
        print(error)
"""
)


def test_folder_answers_without_the_package(model, processor, model_folder, video, tmp_path):
    again = tmp_path / "again"
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_THE_PACKAGE, model_folder, video, str(again)],
        cwd=tmp_path,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(tmp_path / "modules")},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    content = [{"type": "video", "path": video}, {"type": "text", "text": "What came first?"}]
    chat = [{"role": "user", "content": content}]
    inputs = processor.apply_chat_template(chat, add_generation_prompt=True, tokenize=True)
    assert json.loads(done.stdout)["tokens"] == model.generate(**inputs, max_new_tokens=12).tolist()
    # What that process saved is as complete as what it was given.
    assert {path.name for path in again.iterdir()} == set(os.listdir(model_folder))


def test_folder_says_in_one_line_which_versions_it_needs(model_folder, tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", TOO_OLD, model_folder],
        cwd=tmp_path, env={**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules")}, stdout=subprocess.PIPE,
        text=True, check=True,
    )  # fmt: skip
    first, second, third = done.stdout.splitlines()
    assert first == second == third
    assert "transformers 5.17 or newer" in first
    assert "transformers 5.16.3" in first


def test_folder_loads_by_auto_classes_here(model, model_folder):
    from transformers import AutoModelForImageTextToText, AutoProcessor

    loaded = AutoModelForImageTextToText.from_pretrained(model_folder)
    assert type(loaded) is type(model)  # this package's class, although the folder holds code too
    for (name, ours), (_, theirs) in zip(model.state_dict().items(), loaded.state_dict().items(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0, msg=name)
    processor = AutoProcessor.from_pretrained(model_folder)
    frames = np.zeros((2, 28, 28, 3), np.uint8)
    assert processor(text="<video>?", videos=frames)["pixel_values_videos"].shape == (1, 2, 3, 28, 28)
