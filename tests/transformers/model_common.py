"""Transformers' own tests of a model and of a configuration, over our classes."""

import unittest

import torch

from video_ma2mba import VideoMa2mbaConfig, VideoMa2mbaForConditionalGeneration, VideoMa2mbaModel

from ..tiny import tiny_config
from .source import PACKAGE, install

install({})

import importlib

common = importlib.import_module(f"{PACKAGE}.test_modeling_common")
configuration = importlib.import_module(f"{PACKAGE}.test_configuration_common")
generation = importlib.import_module(f"{PACKAGE}.generation.test_utils")

BATCH_SIZE, NUM_FRAMES, NUM_WORDS = 3, 2, 7


class Tester:
    """What the mixins ask of a `model_tester`: a small configuration, inputs, and their sizes."""

    is_training = True
    batch_size = BATCH_SIZE
    num_hidden_layers = 2
    hidden_size = 32

    def __init__(self, parent, media, tied):
        self.parent, self.media, self.tied = parent, media, tied
        config = self.get_config()
        self.visual_tokens = NUM_FRAMES * config.tokens_per_frame if media else 0
        self.seq_length = self.encoder_seq_length = NUM_WORDS + self.visual_tokens

    def get_config(self):
        text = {"vocab_size": 99, "tie_word_embeddings": self.tied}
        return tiny_config(text=text, tie_word_embeddings=self.tied)

    def prepare_config_and_inputs_for_common(self):
        config = self.get_config()
        ids = common.ids_tensor([self.batch_size, self.seq_length], config.text_config.vocab_size - 4) + 2
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        if self.media:
            token = config.video_token_id if self.media == "pixel_values_videos" else config.image_token_id
            ids[:, 2 : 2 + self.visual_tokens] = token
            inputs[self.media] = common.floats_tensor([self.batch_size, NUM_FRAMES, 3, 16, 16])
        return config, inputs


class Mixins(common.ModelTesterMixin, generation.GenerationTesterMixin):
    all_model_classes = (VideoMa2mbaModel, VideoMa2mbaForConditionalGeneration)
    test_resize_embeddings = True
    test_mismatched_shapes = True
    has_attentions = False
    _is_composite = True
    media: str | None = None
    tied = True

    def setUp(self):
        self.model_tester = Tester(self, self.media, self.tied)
        self.config_tester = configuration.ConfigTester(self, config_class=VideoMa2mbaConfig, has_text_modality=False)

    def _prepare_for_class(self, inputs_dict, model_class, return_labels=False):
        inputs = super()._prepare_for_class(inputs_dict, model_class, return_labels)
        if return_labels and model_class is VideoMa2mbaForConditionalGeneration:
            inputs["labels"] = torch.zeros_like(inputs["input_ids"])
        return inputs

    def test_config(self):
        self.config_tester.run_common_tests()


class TestTiedVideo(Mixins, unittest.TestCase):
    media = "pixel_values_videos"


class TestUntiedImage(Mixins, unittest.TestCase):
    media = "pixel_values"
    tied = False


class TestTiedText(Mixins, unittest.TestCase):
    pass


class TestUntiedText(Mixins, unittest.TestCase):
    tied = False
