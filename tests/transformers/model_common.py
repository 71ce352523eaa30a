"""Transformers' own tests of a model and a configuration over our classes: tied and untied, with and without frames."""

import copy
import importlib
import unittest

import torch
from transformers.models.auto import modeling_auto

from video_ma2mba import VideoMa2mbaConfig, VideoMa2mbaForConditionalGeneration, VideoMa2mbaModel

from ..tiny import tiny_config
from .skips import skipped
from .source import PACKAGE, install

install()
common = importlib.import_module(f"{PACKAGE}.test_modeling_common")
configuration = importlib.import_module(f"{PACKAGE}.test_configuration_common")
generation = importlib.import_module(f"{PACKAGE}.generation.test_utils")

# The tests tell a vision-language model by these tables, to which `AutoModel.register` does not add.
modeling_auto.MODEL_MAPPING_NAMES["video_ma2mba"] = VideoMa2mbaModel.__name__
modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES["video_ma2mba"] = VideoMa2mbaForConditionalGeneration.__name__

BATCH_SIZE, NUM_FRAMES, NUM_WORDS, SIDE = 3, 2, 7, 16
IMAGE, VIDEO, FIRST_WORD = 2, 3, 4  # low, as some tests make the vocabulary smaller


def frames():
    return common.floats_tensor([BATCH_SIZE, NUM_FRAMES, 3, SIDE, SIDE])


def zero_init(config, theirs=common._config_zero_init):
    """Theirs sets every field with "_std" in its name to nearly zero: not that of pixels, which initialises nothing."""
    config = copy.deepcopy(config)
    image_std = vars(config).pop("image_std", None)
    config = theirs(config)
    if image_std is not None:  # the parts of the configuration have none
        config.image_std = image_std
    return config


common._config_zero_init = zero_init


class ModelSizes:
    """What the mixins ask of a `model_tester`: a small configuration, inputs, and their sizes."""

    is_training = True
    batch_size = BATCH_SIZE
    num_hidden_layers = 2
    hidden_size = 32

    def __init__(self, media, tied):
        self.media, self.tied = media, tied
        visual_tokens = NUM_FRAMES * self.get_config().tokens_per_frame
        self.visual = slice(2, 2 + visual_tokens if media else 2)
        self.seq_length = NUM_WORDS + (visual_tokens if media else 0)

    def get_config(self):
        return tiny_config(
            text={"vocab_size": 99, "tie_word_embeddings": self.tied}, vision={"num_hidden_layers": 2},
            vision_feature_layer=-1, tie_word_embeddings=self.tied, image_token_id=IMAGE, video_token_id=VIDEO,
        )  # fmt: skip

    def prepare_config_and_inputs_for_common(self):
        ids = torch.randint(FIRST_WORD, 99, (BATCH_SIZE, self.seq_length))
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        if self.media:
            ids[:, self.visual] = VIDEO if self.media == "pixel_values_videos" else IMAGE
            inputs[self.media] = frames()
        return self.get_config(), inputs


class Mixins(skipped(common.ModelTesterMixin), common.ModelTesterMixin, generation.GenerationTesterMixin):
    all_model_classes = (VideoMa2mbaModel, VideoMa2mbaForConditionalGeneration)
    test_can_init_all_missing_weights_before_2023 = True  # run, whatever the year in a file's head
    has_attentions = False
    _is_composite = True
    media: str | None = None
    tied = True

    def setUp(self):
        self.model_tester = ModelSizes(self.media, self.tied)

    def test_config(self):
        tester = configuration.ConfigTester(self, config_class=VideoMa2mbaConfig, has_text_modality=False)
        tester.run_common_tests()

    def _image_features_prepare_config_and_inputs(self):
        return self.model_tester.get_config(), {"pixel_values": frames()}

    def _video_features_prepare_config_and_inputs(self):
        return self.model_tester.get_config(), {"pixel_values_videos": frames()}


class TestTiedVideo(Mixins, unittest.TestCase):
    media = "pixel_values_videos"


class TestUntiedImage(Mixins, unittest.TestCase):
    media, tied = "pixel_values", False


class TestTiedText(Mixins, unittest.TestCase):
    pass


class TestUntiedText(Mixins, unittest.TestCase):
    tied = False
