"""What is skipped of transformers' common tests, and why: anything else that skips fails."""

import fnmatch
import unittest

# Tests that ask for what this model does otherwise. Pattern of the name -> reason.
OTHERWISE = {
    "test_gradient_checkpointing_enable_disable": "the tower has no checkpointing of its own: it runs in micro-batches",
    "test_peft_gradient_checkpointing_enable_disable": "as above",
    "test_training_gradient_checkpointing*": "asks the layer class of transformers, where MA-GC checkpoints cells: "
    "tests/modeling/test_gradient_checkpointing.py has every gradient of it",
    "test_capture_outputs_decorator": "asks for attentions too, as the tower has some",
    "test_apply_chat_template_assistant_mask": "tokenising follows the schema of the checkpoint and refuses a template "
    "that says something else: tests/processing has the masks of that schema",
    "test_video_processor_save_load_with_autovideoprocessor": "`AutoVideoProcessor` needs torchvision",
}

# What the tests skip by themselves. Part of their message -> reason why it is right here.
NO_ATTENTION = "the language model has no attention: a recurrent model returns none and has no choice of its kernels"
NO_POSITIONS = "a recurrence needs no positions"
MACHINE = "a GPU, another system or an optional package, which the machine of the tests has not"
NO_SOUND = "the model hears nothing"
ONE_FOR_BOTH = "images go through the video processor, as videos of one frame: there is no second processor for them"
THEMSELVES = {
    "does not support attentions": NO_ATTENTION,
    "does not output attentions": NO_ATTENTION,
    "does not support output_attentions": NO_ATTENTION,
    "does not support grouped_mm": "no mixture of experts",
    "no sparse experts": "no mixture of experts",
    "no `output_router_logits`": "no mixture of experts",
    "does not have position embeddings": NO_POSITIONS,
    "does not have RoPE": NO_POSITIONS,
    "does not support RoPE scaling": NO_POSITIONS,
    "no axial RoPE layer": NO_POSITIONS,
    "non standard Cache": "states of fixed size, no DynamicCache: tests/modeling/test_generation.py has the old names",
    "does not have a TP plan": "none is offered, as by Mamba2 of transformers",
    "Model is not an encoder-decoder": "a decoder alone",
    "Only PrefixChange conversions found": "the names of the weights have never changed",
    "test is slow": "compiles for training on a GPU",
    "image_processor attribute not present": ONE_FOR_BOTH,
    "doesn't support images with text": ONE_FOR_BOTH,
    "audio_processor attribute not present": NO_SOUND,
    "feature_extractor attribute not present": NO_SOUND,
    "Processor has no audio processor": NO_SOUND,
    "Chat template does not support tools": "the paper's schema has no tools",
    "Could not find a suitable attribute": "all that can be switched is off by default: frames stay uint8",
    "No validation found for `preprocess`": "so for every video processor of transformers",
    "does not have dict size or list image_mean": "so for every video processor of transformers, whose size is no dict",
    "doesn't support `_get_num_multimodal_tokens`": "placeholders grow while ids are made, and not as text",
    "test requires Torchcodec": MACHINE,
    "test requires librosa": NO_SOUND,
    "test requires Flash Attention": MACHINE,
    "test requires MPS": MACHINE,
    "test requires accelerator": MACHINE + "; offload to CPU and disk: tests/modeling",
    "test requires deepspeed": MACHINE,
    "test requires multiple accelerators": MACHINE,
    "test requires the kernels library": MACHINE,
}


def skipped(mixin: type) -> type:
    """A base class that skips the tests of `mixin` that `OTHERWISE` names; it goes before the mixin."""
    body = {}
    for pattern, reason in OTHERWISE.items():
        for name in fnmatch.filter(dir(mixin), pattern):
            body[name] = unittest.skip(reason)(lambda self: None)
    return type(f"Skipped{mixin.__name__}", (), body)


def is_listed(message: str) -> bool:
    return any(part in message for part in (*OTHERWISE.values(), *THEMSELVES))
