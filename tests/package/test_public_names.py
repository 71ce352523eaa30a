"""The names that others build on, and what importing the package tells transformers."""

import subprocess
import sys

import pytest
import transformers
from transformers.utils import is_torchvision_available

import video_ma2mba
from video_ma2mba import registration


def test_names_are_one_list():
    assert video_ma2mba.__all__ == registration.__all__
    assert all(getattr(video_ma2mba, name).__name__ == name for name in video_ma2mba.__all__)


def test_unknown_name_raises():
    with pytest.raises(AttributeError, match="no attribute 'VideoMamba3'"):
        video_ma2mba.VideoMamba3  # noqa: B018 - the access is the test


@pytest.mark.parametrize(
    ("auto", "name"),
    [
        ("AutoModel", "VideoMa2mbaModel"),
        ("AutoModelForImageTextToText", "VideoMa2mbaForConditionalGeneration"),
        ("AutoModelForMultimodalLM", "VideoMa2mbaForConditionalGeneration"),
    ],
)
def test_auto_models(auto, name):
    assert getattr(transformers, auto)._model_mapping[video_ma2mba.VideoMa2mbaConfig].__name__ == name


def test_auto_config_and_processors():
    config_class = video_ma2mba.VideoMa2mbaConfig
    assert transformers.AutoConfig.for_model("video_ma2mba").__class__ is config_class
    processors = transformers.models.auto.processing_auto.PROCESSOR_MAPPING
    assert processors[config_class] is video_ma2mba.VideoMa2mbaProcessor
    if is_torchvision_available():
        video_processors = transformers.models.auto.video_processing_auto.VIDEO_PROCESSOR_MAPPING
        assert video_processors[config_class] is video_ma2mba.VideoMa2mbaVideoProcessor


def test_the_module_starts_without_torch():
    """As `torchrun -m video_ma2mba.cli` starts it."""
    command = [sys.executable, "-X", "importtime", "-m", "video_ma2mba.cli", "--version"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout == f"video-ma2mba {video_ma2mba.__version__}\n"
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "video_ma2mba.cli.parser" in imported
    assert not {"torch", "transformers"} & imported


def test_command_line_starts_without_torch():
    code = """
import sys
sys.argv = ["video-ma2mba"]
from video_ma2mba.cli import build_parser
build_parser().format_help()
assert "torch" not in sys.modules and "transformers" not in sys.modules
import video_ma2mba
assert video_ma2mba.VideoMa2mbaConfig.model_type == "video_ma2mba"  # the first use imports the rest
try:
    video_ma2mba.VideoMamba3
except AttributeError as error:
    assert "VideoMamba3" in str(error)
else:
    sys.exit("a name that is not there")
"""
    subprocess.run([sys.executable, "-c", code], check=True)
