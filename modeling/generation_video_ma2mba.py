"""What `generate` asks of the model, on every supported version of Transformers."""

from typing import Any

from torch.nn.utils.rnn import pad_sequence
from transformers import UnbatchedClassifierFreeGuidanceLogitsProcessor
from transformers.generation.utils import ALL_CACHE_NAMES
from transformers.utils.deprecation import deprecate_kwarg

from .mamba2_cache import Mamba2Cache

# `generate` finds the cache in a model's output, and reorders it for beams, by these names; before 5.24 `cache` is not
# among them.
if "cache" not in ALL_CACHE_NAMES:
    ALL_CACHE_NAMES.append("cache")


def cache_under_old_names(function):
    """Take the names of before 5.24 for `cache`, with Transformers' warning; an error where two names are given."""
    for name in ("cache_params", "past_key_values"):
        function = deprecate_kwarg(name, version="6.0.0", new_name="cache", raise_if_both_names=True)(function)
    return function


class VideoMa2mbaGeneration:
    """The overrides of `GenerationMixin`: the states are the cache, and a prompt is cut by the model itself."""

    config: Any  # these four of `PreTrainedModel`
    model: Any
    device: Any
    dtype: Any

    @cache_under_old_names
    def generate(self, *args, **kwargs):
        """As in Transformers. `cache=` goes on from the states of an earlier call, whose object stays as it was.

        `compile_config=CompileConfig()` compiles the decode step and, on a GPU, captures it as a graph: the states are
        written in place, and nothing in the step waits. The first answer then takes as long as compiling does.

        The ids may then be the new ones alone, or the whole conversation again, of which the part that `cache` has seen
        is left out, with its frames. Whole is what is longer than the past while no mask says that it is only the new.
        """
        found = super().generate(*args, **kwargs)  # type: ignore[misc]  # of `GenerationMixin`, as below
        if isinstance(found, dict):
            for name in ALL_CACHE_NAMES:
                if isinstance(found.get(name), Mamba2Cache):
                    found[name].share()
        return found

    def _prepare_cache_for_generation(self, generation_config, model_kwargs, generation_mode, batch_size, *args):
        # transformers would build an attention cache here and, asked for a chunked prefill, cut the ids but not the
        # video; the model cuts its own prefill instead
        if generation_config.prefill_chunk_size is not None:
            model_kwargs["prefill_chunk_size"] = generation_config.prefill_chunk_size
            generation_config.prefill_chunk_size = None
        compiles = generation_config.compile_config is not None
        if model_kwargs.get("cache") is None:
            if compiles and generation_config.use_cache:  # it is asked before the first pass whether it can be compiled
                size = batch_size * max(generation_config.num_beams, generation_config.num_return_sequences)
                model_kwargs["cache"] = self.model.language_model.new_cache(size, self.device, self.dtype)
                model_kwargs["cache"].compile_steps()
            return
        if not generation_config.use_cache:
            raise ValueError("cache was given together with use_cache=False: the past would not be read; leave one out")
        cache = model_kwargs["cache"].copy()  # the caller's stays as it was
        cache.batch_repeat_interleave(max(generation_config.num_beams, generation_config.num_return_sequences))
        if compiles:
            cache.compile_steps()
        model_kwargs["cache"] = cache
        mask = model_kwargs.get("attention_mask")  # newer versions have dropped one of ones, and noted its length
        length = getattr(generation_config, "_mask_length", None) if mask is None else mask.shape[1]
        model_kwargs["mask_length"] = length

    def _valid_auto_compile_criteria(self, model_kwargs, generation_config):
        under_old_name = {
            **model_kwargs,
            "past_key_values": model_kwargs.get("cache"),
        }  # where it is sought before 5.24
        return super()._valid_auto_compile_criteria(under_old_name, generation_config)  # type: ignore[misc]

    def _update_model_kwargs_for_generation(self, outputs, model_kwargs, *args, **kwargs):
        model_kwargs = super()._update_model_kwargs_for_generation(  # type: ignore[misc]
            outputs, model_kwargs, *args, **kwargs
        )
        if model_kwargs.get("cache") is not None:
            model_kwargs["cache"].own()  # the pass before made all its states anew, and `generate` alone holds them
        return model_kwargs

    def prepare_inputs_for_generation(
        self, input_ids, inputs_embeds=None, attention_mask=None, cache=None, use_cache=None,
        is_first_iteration=False, next_sequence_length=None, **kwargs,
    ):  # fmt: skip
        model_inputs = {**kwargs, "cache": cache if use_cache else None, "use_cache": use_cache}
        mask_length = model_inputs.pop("mask_length", None)
        model_inputs.pop("labels", None)
        if use_cache and not is_first_iteration:
            # the last token alone, which is never padding
            for name in ("pixel_values_videos", "pixel_values", "mm_token_type_ids"):
                model_inputs.pop(name, None)
            return {**model_inputs, "input_ids": input_ids[:, -1:]}
        name = "inputs_embeds" if inputs_embeds is not None and is_first_iteration else "input_ids"
        given = inputs_embeds if name == "inputs_embeds" else input_ids
        num_seen = cache.get_seq_length() if cache is not None and use_cache else 0
        if 0 < num_seen < given.shape[1] and mask_length in (None, given.shape[1]):
            if name == "input_ids":
                self._leave_out_frames(model_inputs, given, num_seen)
            given = given[:, num_seen:]
        return {**model_inputs, name: given, "attention_mask": attention_mask}

    def _leave_out_frames(self, model_inputs, input_ids, num_seen):
        """Drop the frames whose placeholders are among the first `num_seen` ids, which have been read."""
        for name, token_id in (
            ("pixel_values_videos", self.config.video_token_id), ("pixel_values", self.config.image_token_id),
        ):  # fmt: skip
            pixels = model_inputs.get(name)
            if pixels is None:
                continue
            places = input_ids == token_id
            per_frame = self.config.tokens_per_frame
            first, last = places[:, :num_seen].sum(dim=1) // per_frame, places.sum(dim=1) // per_frame
            left = [row[a:b] for row, a, b in zip(pixels, first.tolist(), last.tolist(), strict=True)]
            model_inputs[name] = pad_sequence(left, batch_first=True) if any(map(len, left)) else None

    def _get_logits_processor(self, generation_config, *args, **kwargs):
        processors = super()._get_logits_processor(generation_config, *args, **kwargs)  # type: ignore[misc]
        for processor in processors:
            if isinstance(processor, UnbatchedClassifierFreeGuidanceLogitsProcessor):
                if generation_config.num_beams > 1:
                    raise ValueError(
                        "guidance_scale does not go with num_beams: beams cross, and the unguided pass would keep the "
                        "past of others; use num_beams=1"
                    )
                if "past_key_values" in processor.unconditional_context:  # before 5.24
                    processor.model = _Guide(self)
        return processors


class _Guide:
    """The model of an unguided pass, whose past goes by the old name."""

    def __init__(self, model):
        self.model = model

    def __call__(self, input_ids, past_key_values=None, **kwargs):
        outputs = self.model(input_ids, cache=past_key_values, **kwargs)
        return _Unguided(logits=outputs.logits, past_key_values=outputs.cache)


class _Unguided(dict):
    @property
    def logits(self):
        return self["logits"]
