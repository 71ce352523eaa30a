"""Configurations, models and a tokenizer of some thousand parameters, for tests in which sizes are no matter."""

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import CLIPVisionConfig, Mamba2Config, PreTrainedTokenizerFast

from video_ma2mba import VideoMa2mbaConfig, VideoMa2mbaForConditionalGeneration


def tiny_config(vision=None, text=None, **kwargs):
    """4 tokens per frame of 16 x 16 pixels, two layers; the last two of the vocabulary are the placeholders.

    `vision` and `text` override fields of the parts; `vision` may also be a whole config.
    """
    if vision is None or isinstance(vision, dict):
        sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2}
        vision = CLIPVisionConfig(**{**sizes, "image_size": 16, "patch_size": 4, "projection_dim": 8, **(vision or {})})
    sizes = {"hidden_size": 32, "num_heads": 4, "head_dim": 16, "state_size": 8, "n_groups": 1, "num_hidden_layers": 2}
    ids = {"vocab_size": 48, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 1, "tie_word_embeddings": True}
    text = Mamba2Config(**{**sizes, **ids, **(text or {})})
    placeholders = {"image_token_id": text.vocab_size - 2, "video_token_id": text.vocab_size - 1}
    return VideoMa2mbaConfig(**{"vision_config": vision, "text_config": text, **placeholders, **kwargs})


def tiny_model(dtype=torch.float32, seed=0, **kwargs):
    """A model in eval mode whose logits depend visibly on all tokens before. `kwargs`: as for `tiny_config`."""
    torch.manual_seed(seed)
    model = VideoMa2mbaForConditionalGeneration(tiny_config(**kwargs)).to(dtype).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "vision_tower" in name:
                parameter.normal_(std=0.3)
            elif name.endswith("A_log"):
                parameter.normal_(mean=-2)  # a memory of some ten tokens
            elif name.endswith("dt_bias"):
                parameter.normal_()
            elif parameter.ndim < 2:
                parameter.add_(0.2 * torch.randn_like(parameter))
            elif "mixer" in name:
                parameter.normal_(std=0.5)  # loud enough beside the residual stream
        model.get_input_embeddings().weight.normal_(std=0.3)
    return model


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte, and the end of a turn: 257 tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({piece: i for i, piece in enumerate(["<|endoftext|>", *alphabet])}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>")
