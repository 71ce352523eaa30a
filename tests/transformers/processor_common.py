"""Transformers' own tests of a processor and of a video processor, over ours."""

import functools
import importlib
import tempfile
import unittest
from pathlib import Path
from unittest import mock

from PIL import Image
from transformers import AutoTokenizer

from video_ma2mba import VideoMa2mbaProcessor, VideoMa2mbaVideoProcessor
from video_ma2mba.data.synthetic import make_story

from ..tiny import byte_tokenizer
from .skips import skipped
from .source import PACKAGE, install

FOLDER = tempfile.TemporaryDirectory()  # kept as long as the module
VIDEO = str(make_story(seed=0, duration_s=4).render(Path(FOLDER.name) / "video.mp4"))
IMAGE = str(Path(FOLDER.name) / "image.png")
Image.fromarray(next(iter(make_story(seed=1, duration_s=3).frames()))).save(IMAGE)
install({"video": VIDEO, "image": IMAGE})
processing = importlib.import_module(f"{PACKAGE}.test_processing_common")
videos = importlib.import_module(f"{PACKAGE}.test_video_processing_common")


class TestProcessor(skipped(processing.ProcessorTesterMixin), processing.ProcessorTesterMixin, unittest.TestCase):
    processor_class = VideoMa2mbaProcessor

    @classmethod
    def setUpClass(cls):
        # all inputs and not ids alone by default, as tokenizers of transformers have it and its processors do not
        by_default = functools.partialmethod(VideoMa2mbaProcessor.apply_chat_template, return_dict=False)
        cls.enterClassContext(mock.patch.object(VideoMa2mbaProcessor, "apply_chat_template", by_default))
        # as a class of transformers itself: a saved folder names no code
        cls.enterClassContext(mock.patch.object(VideoMa2mbaProcessor, "_auto_class", None))
        cls.enterClassContext(mock.patch.object(VideoMa2mbaVideoProcessor, "_auto_class", None))
        # `AutoVideoProcessor` needs torchvision, which ours does not
        loaders = {"tokenizer": AutoTokenizer, "video_processor": VideoMa2mbaVideoProcessor}
        cls.enterClassContext(mock.patch.object(processing, "MODALITY_TO_AUTOPROCESSOR_MAPPING", loaders))
        super().setUpClass()

    def test_processor_with_multiple_inputs(self):
        # the mixin gives images only where they have a processor of their own
        with mock.patch.object(type(self), "image_token", ""):
            super().test_processor_with_multiple_inputs()

    @property
    def video_sampling_expectations(self):
        """Of four seconds at four frames each; the processor's own rate is one."""
        lengths = (({"num_frames": 3}, 3), ({"fps": 2}, 8), ({"do_sample_frames": False}, 16), ({}, 4))
        return [{**options, "expected_dim": 1, "output_length": length} for options, length in lengths]

    @classmethod
    def _setup_tokenizer(cls):
        return byte_tokenizer()

    @classmethod
    def _setup_video_processor(cls):
        return VideoMa2mbaVideoProcessor(size=28)

    @staticmethod
    def prepare_processor_dict():
        return {"patch_size": 14}


class Sizes:
    """What the mixin asks of a `video_processor_tester`."""

    batch_size, num_frames, num_channels = 5, 8, 3
    min_resolution, max_resolution = 30, 80

    def prepare_video_inputs(self, equal_resolution=False, return_tensors="pil"):
        return videos.prepare_video_inputs(
            batch_size=self.batch_size, num_frames=self.num_frames, num_channels=self.num_channels,
            min_resolution=self.min_resolution, max_resolution=self.max_resolution,
            equal_resolution=equal_resolution, return_tensors=return_tensors,
        )  # fmt: skip

    def expected_output_video_shape(self, clips):
        return [self.num_frames, self.num_channels, 28, 28]


class TestVideoProcessor(skipped(videos.VideoProcessingTestMixin), videos.VideoProcessingTestMixin, unittest.TestCase):
    fast_video_processing_class = VideoMa2mbaVideoProcessor
    video_processor_dict = {"size": {"height": 28, "width": 28}, "do_convert_rgb": True}  # noqa: RUF012

    def setUp(self):
        super().setUp()
        self.video_processor_tester = Sizes()

    def test_video_processor_from_dict_with_kwargs(self):
        made = VideoMa2mbaVideoProcessor.from_dict(self.video_processor_dict, size=42)
        assert (made.size.height, made.size.width) == (42, 42)
