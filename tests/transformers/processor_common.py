"""Transformers' own tests of a processor and of a video processor, over ours."""

import importlib
import tempfile
import unittest
from pathlib import Path

from video_ma2mba import VideoMa2mbaProcessor, VideoMa2mbaVideoProcessor
from video_ma2mba.data.synthetic import make_story

from ..tiny import byte_tokenizer
from .skips import skipped
from .source import PACKAGE, install

FOLDER = tempfile.TemporaryDirectory()  # kept as long as the module
VIDEO = str(make_story(seed=0, duration_s=4).render(Path(FOLDER.name) / "video.mp4"))
IMAGE = str(make_story(seed=1, duration_s=3).render(Path(FOLDER.name) / "image.mp4"))
install({"video": VIDEO, "image": IMAGE})
processing = importlib.import_module(f"{PACKAGE}.test_processing_common")
videos = importlib.import_module(f"{PACKAGE}.test_video_processing_common")


class TestProcessor(
    skipped(processing.ProcessorTesterMixin), processing.ProcessorTesterMixin, unittest.TestCase
):
    processor_class = VideoMa2mbaProcessor

    @classmethod
    def _setup_tokenizer(cls):
        return byte_tokenizer()

    @classmethod
    def _setup_video_processor(cls):
        return VideoMa2mbaVideoProcessor(size=28)

    @staticmethod
    def prepare_processor_dict():
        return {"patch_size": 14}

    def get_component(self, attribute, *args, **kwargs):
        if attribute == "video_processor":  # `AutoVideoProcessor` needs torchvision, which ours does not
            return VideoMa2mbaVideoProcessor.from_pretrained(self.tmpdirname, **kwargs)
        return super().get_component(attribute, *args, **kwargs)


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


class TestVideoProcessor(
    skipped(videos.VideoProcessingTestMixin), videos.VideoProcessingTestMixin, unittest.TestCase
):
    fast_video_processing_class = VideoMa2mbaVideoProcessor
    video_processor_dict = {"size": {"height": 28, "width": 28}}  # noqa: RUF012 - the name and form the mixin reads

    def setUp(self):
        super().setUp()
        self.video_processor_tester = Sizes()
