"""Configuration of a Video-Ma2mba model."""

import copy
import math
import sys

import transformers

if sys.version_info < (3, 11) or tuple(map(int, transformers.__version__.split(".")[:2])) < (5, 17):
    raise ImportError(
        "the code of this Video-Ma2mba folder needs Python 3.11 and transformers 5.17 or newer; here are Python "
        f"{sys.version.split()[0]} and transformers {transformers.__version__}: pip install -U 'transformers>=5.17'"
    )

from typing import Any, Literal

from huggingface_hub.dataclasses import strict
from transformers import CONFIG_MAPPING, AutoConfig, CLIPVisionConfig, Mamba2Config, PreTrainedConfig

# The paper's three sizes: whole model -> (hidden size, layers) of its Mamba-2 backbone.
PRESETS = {"0.7b": (1024, 48), "1.8b": (2048, 48), "3.1b": (2560, 64)}


@strict
class VideoMa2mbaConfig(PreTrainedConfig):
    """Vision tower, pooling, projector and Mamba-2 backbone (paper, section 3.1).

    Args:
        vision_config: `CLIPVisionConfig`, `SiglipVisionConfig` or a dict with a `model_type`; CLIP-ViT-L/14-336 if left
            out.
        text_config: `Mamba2Config` or a dict; the 370M backbone if left out.
        image_token_id, video_token_id: ids whose positions are filled with projected features, one id per visual token.
        vision_feature_layer: which hidden state of the tower is used: -2 is the penultimate layer's output. The layers
            after it are not built.
        vision_feature_select_strategy: "default" drops the class token where the tower has one; "full" is for towers
            that have none and says so.
        spatial_pool_mode: "bilinear", the paper's. spatial_pool_stride: each side of the patch grid is divided by it,
            rounding up.
        projector_hidden_act: activation between the two linear layers of the projector.
        image_mean, image_std: per channel, for pixels given as uint8.
        vision_chunk_size: frames that go through the tower at a time; a CLIP-L that trains keeps 0.4 GB of each.
        prefill_chunk_size: tokens that go through the backbone at a time where no gradient is asked for.
        scan_backend: "torch", "mamba_ssm" (kernels for GPUs), or "auto" for these where they run. One that is asked for
            by name never gives way to another in silence.
        loss_chunk_size: supervised tokens that go through the head at a time.
        eval_logits_bytes: in eval mode, logits are given out beside a loss up to this size; 0 for never.
        tie_word_embeddings: the head is the embedding table, as in the published backbones.

    Raises:
        ValueError: where the parts do not fit together.
    """

    model_type = "video_ma2mba"
    sub_configs = {"text_config": AutoConfig, "vision_config": AutoConfig}  # noqa: RUF012 - the name and form transformers reads
    keys_to_ignore_at_inference = ["cache", "hidden_states"]  # noqa: RUF012 - as above

    vision_config: Any = None  # checked by `_as_config`, which turns dicts into configurations
    text_config: Any = None
    image_token_id: int = 50277
    video_token_id: int = 50278
    vision_feature_layer: int = -2
    vision_feature_select_strategy: Literal["default", "full"] = "default"
    spatial_pool_mode: Literal["bilinear"] = "bilinear"
    spatial_pool_stride: int = 2
    projector_hidden_act: str = "gelu"
    image_mean: list[float] | tuple[float, ...] = (0.48145466, 0.4578275, 0.40821073)
    image_std: list[float] | tuple[float, ...] = (0.26862954, 0.26130258, 0.27577711)
    vision_chunk_size: int = 8
    prefill_chunk_size: int = 4096
    loss_chunk_size: int = 1024
    eval_logits_bytes: int = 2 * 2**30
    scan_backend: Literal["auto", "torch", "mamba_ssm"] = "auto"
    tie_word_embeddings: bool = True

    def __post_init__(self, **kwargs):
        self.vision_config = _as_config(self.vision_config, _clip_vit_l_14_336)
        self.text_config = _as_config(self.text_config, lambda: _mamba2(*PRESETS["0.7b"]))
        super().__post_init__(**kwargs)

    @classmethod
    def from_preset(cls, size, **kwargs):
        """The paper's model of `size` "0.7b", "1.8b" or "3.1b"; nothing is downloaded. `kwargs` override fields.

        >>> VideoMa2mbaConfig.from_preset("3.1b").tokens_per_frame
        144
        """
        if size not in PRESETS:
            raise ValueError(f"no preset {size!r}: choose one of {', '.join(PRESETS)}")
        return cls(**{"text_config": _mamba2(*PRESETS[size]), **kwargs})

    @classmethod
    def get_config_dict(cls, pretrained_model_name_or_path, **kwargs):
        """As in transformers, which would read the format of the model's authors as if it were this one."""
        config, kwargs = super().get_config_dict(pretrained_model_name_or_path, **kwargs)
        if config.get("model_type") == "llava_mamba":
            raise ValueError(
                f"{pretrained_model_name_or_path} is of type llava_mamba, the format of the model's authors; convert "
                f"it: video-ma2mba convert llava-mamba {pretrained_model_name_or_path} -o DIR"
            )
        return config, kwargs

    def validate_architecture(self):
        """Called by `strict` once all fields are set."""
        num_layers = self.vision_config.num_hidden_layers
        if not -num_layers - 1 <= self.vision_feature_layer <= num_layers:
            raise ValueError(
                f"vision_feature_layer={self.vision_feature_layer} is not among the tower's {num_layers} layers"
            )
        if self.vision_feature_select_strategy == "full" and self.vision_config.model_type == "clip_vision_model":
            raise ValueError("vision_feature_select_strategy='full' would keep CLIP's class token; take 'default'")
        if self.image_token_id == self.video_token_id:
            raise ValueError(f"image_token_id and video_token_id must differ, both are {self.video_token_id}")
        for name in ("image_token_id", "video_token_id"):
            if not 0 <= getattr(self, name) < self.text_config.vocab_size:
                raise ValueError(
                    f"{name}={getattr(self, name)} lies outside the vocabulary of {self.text_config.vocab_size}"
                )
        for name in ("spatial_pool_stride", "vision_chunk_size", "prefill_chunk_size", "loss_chunk_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if self.eval_logits_bytes < 0:
            raise ValueError(f"eval_logits_bytes={self.eval_logits_bytes} must not be negative")

    @property
    def num_vision_layers(self):
        """Layers of the tower that are run: those up to `vision_feature_layer`."""
        layer = self.vision_feature_layer
        return layer if layer >= 0 else self.vision_config.num_hidden_layers + 1 + layer

    @property
    def tokens_per_frame(self):
        """Visual tokens of one frame: 144 for CLIP-ViT-L/14-336, 196 for SigLIP-so400m/14-384."""
        patches = self.vision_config.image_size // self.vision_config.patch_size
        return math.ceil(patches / self.spatial_pool_stride) ** 2


def _as_config(value, default):
    if value is None:
        return default()
    if isinstance(value, dict):
        value = copy.deepcopy(value)
        model_type = value.pop("model_type", None)
        if model_type not in CONFIG_MAPPING:
            raise ValueError(
                f"a sub-config needs a known model_type, such as 'mamba2' or 'clip_vision_model'; got {model_type!r}"
            )
        return CONFIG_MAPPING[model_type](**value)
    if not isinstance(value, PreTrainedConfig):
        raise ValueError(f"a sub-config must be a configuration of transformers or a dict, got {value!r}")
    return value


def _clip_vit_l_14_336():
    return CLIPVisionConfig(
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=24,
        num_attention_heads=16,
        image_size=336,
        patch_size=14,
        projection_dim=768,
    )


def _mamba2(hidden_size, num_hidden_layers):
    """state-spaces/mamba2-370m, -1.3b, -2.7b, which leave everything else the same."""
    return Mamba2Config(
        hidden_size=hidden_size,
        num_hidden_layers=num_hidden_layers,
        num_heads=hidden_size * 2 // 64,
        head_dim=64,
        state_size=128,
        n_groups=1,
        expand=2,
        vocab_size=50288,  # 50,277 of the GPT-NeoX tokenizer, padded to a multiple of 16
        chunk_size=256,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=1,
    )
