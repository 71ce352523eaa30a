"""Video-Ma2mba: a vision tower, a projector and a Mamba-2 backbone that reads every frame (arXiv 2411.19460)."""

import math
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers import GenerationMixin, PreTrainedModel
from transformers import initialization as init
from transformers.utils import logging
from transformers.utils.generic import can_return_tuple

from .arguments import check_arguments, chosen, hidden_states_wanted, num_logits_bytes
from .checkpoint_plan import CheckpointOptions, format_bytes
from .configuration_video_ma2mba import VideoMa2mbaConfig
from .generation_video_ma2mba import VideoMa2mbaGeneration, cache_under_old_names
from .gradient_horizon import gradient_windows
from .head_loss import head_loss
from .host_copies import on_host, to_device
from .interleaved_inputs import InterleavedInputs
from .mamba2 import Mamba2Backbone, Mamba2Mixer, Mamba2RMSNorm, Mamba2RMSNormGated, init_mamba2_weights
from .multi_axis_checkpointing import MultiAxisCheckpointing
from .outputs import VideoMa2mbaOutput
from .sharded_parameters import as_unsharded_class, is_partitioned, refuse_narrow_policies, run_gathered
from .visual_features import VideoMa2mbaProjector, VisualFeatures, build_tower

logger = logging.get_logger(__name__)


class VideoMa2mbaPreTrainedModel(MultiAxisCheckpointing, PreTrainedModel):  # type: ignore[misc]  # more arguments
    config: VideoMa2mbaConfig
    config_class = VideoMa2mbaConfig
    base_model_prefix = "model"
    main_input_name = "input_ids"
    input_modalities = ("image", "video", "text")  # type: ignore[assignment]  # so in transformers' own models
    supports_gradient_checkpointing = True
    _no_split_modules = ["Mamba2Block", "CLIPEncoderLayer", "SiglipEncoderLayer"]  # noqa: RUF012 - read by transformers
    _skip_keys_device_placement = ["cache"]  # noqa: RUF012 - read by transformers
    _keep_in_fp32_modules_strict = ["mixer.A_log", "mixer.D", "mixer.dt_bias"]  # noqa: RUF012 - read by transformers
    _supports_sdpa = True
    _supports_flash_attn = True  # in the tower, the only place with attention
    _is_stateful = True

    def save_pretrained(self, save_directory, is_main_process=True, state_dict=None, *args, **kwargs):
        """As in transformers; a folder saved with its code names it for every Auto class, not only for this one's, and
        is the same whatever engine held the weights."""
        if self._auto_class is not None:
            here = "modeling_video_ma2mba."
            self.config.auto_map = {
                **getattr(self.config, "auto_map", {}),
                "AutoModel": here + "VideoMa2mbaModel",
                "AutoModelForImageTextToText": here + "VideoMa2mbaForConditionalGeneration",
                "AutoModelForMultimodalLM": here + "VideoMa2mbaForConditionalGeneration",
            }
        if state_dict is not None:  # gathered by an engine, which writes out a tied tensor twice
            tied = self._tied_weights_keys or {} if self.config.text_config.tie_word_embeddings else {}
            state_dict = {
                name: tensor for name, tensor in state_dict.items() if not (name in tied and tied[name] in state_dict)
            }
        with as_unsharded_class(self):
            super().save_pretrained(save_directory, is_main_process, state_dict, *args, **kwargs)

    def initialize_weights(self):
        """As in transformers, which, for code not its own, passes over modules of a tower that have no own weights."""
        for module in self.modules():
            if isinstance(module, PreTrainedModel) and not module.is_custom_code():
                module.initialize_weights()
        super().initialize_weights()

    @torch.no_grad()
    def _init_weights(self, module):
        if isinstance(module, Mamba2Mixer):
            init_mamba2_weights(module, self.config.text_config)
        elif isinstance(module, nn.Embedding):
            init.normal_(module.weight, std=0.02)
        elif isinstance(module, Mamba2RMSNorm | Mamba2RMSNormGated):
            init.ones_(module.weight)
        elif isinstance(module, nn.Linear):  # before the mixer that holds it, which scales its own out_proj
            init.kaiming_uniform_(module.weight, a=math.sqrt(5))
            if module.bias is not None:
                init.zeros_(module.bias)


class VideoMa2mbaModel(VisualFeatures, VideoMa2mbaPreTrainedModel):  # type: ignore[misc]  # as above
    """The model without a head: frames and text in, hidden states and recurrent states out (paper, section 3.1).

    Args:
        config: `VideoMa2mbaConfig`.
    """

    def __init__(self, config):
        super().__init__(config)
        self.vision_tower = build_tower(config)
        self.multi_modal_projector = VideoMa2mbaProjector(config)
        self.language_model = Mamba2Backbone(config.text_config, config.prefill_chunk_size, config.scan_backend)
        self.gradient_checkpointing, self.checkpoint_options, self._plans = False, CheckpointOptions(), {}
        self.post_init()

    def get_input_embeddings(self):
        return self.language_model.embeddings

    def set_input_embeddings(self, value):
        self.language_model.embeddings = value

    def _gradient_windows(self, mask, rows, batch, num_tokens):
        """The `GradientWindows` of a batch in the backbone's layout, for the horizon asked for; None for no end."""
        if (horizon := self.checkpoint_options.gradient_horizon) is None:
            return None
        if self.language_model.neighbours is not None:
            raise ValueError(
                "gradient_horizon and sequence parallel do not go together: with a horizon the memory does not grow "
                "with the video; leave one of them out"
            )
        if is_partitioned(self):
            raise ValueError(
                "gradient_horizon does not go with the ZeRO-3 of DeepSpeed, which fetches weights ahead in the order "
                "of an earlier pass, while here each process watches as much as its video is long: take fsdp2 or zero2"
            )
        lengths = torch.full((batch,), num_tokens) if mask is None else mask.sum(dim=1)
        supervised = torch.ones(batch, num_tokens, dtype=torch.bool) if rows is None else rows >= 0
        return gradient_windows(lengths, supervised, horizon)

    def _watch_and_train(self, inputs, cache, mask, rows, chunk_size, plan, windows):
        """What comes before all windows is watched, a chunk at a time; the rest goes through the plan."""
        # asked for by its name, a sharded weight would be gathered, which other processes may not do here
        dtype, first = next(self.get_input_embeddings().parameters()).dtype, windows.first
        step = chunk_size or self.language_model.prefill_chunk_size
        if cache is None:
            cache = self.language_model.new_cache(len(windows.live), inputs.device, dtype)

        def at(span):
            return (None if tensor is None else tensor[:, span] for tensor in (mask, rows))

        def watch():
            for span in (slice(start, min(start + step, first)) for start in range(0, first, step)):
                embeds = inputs.embed(span).to(cache.layers[0][0].device)
                self.language_model(embeds, cache, *at(span))
            return ()

        with torch.no_grad():
            run_gathered((*self._vision, self.language_model), watch)
        span = slice(first, first + windows.live.shape[1])
        embeds = inputs.embed(span, plan.offload, windows.live)
        return self.language_model(embeds, cache, *at(span), plan=plan, windows=windows), cache

    @can_return_tuple
    @cache_under_old_names
    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        pixel_values_videos=None,
        pixel_values=None,
        inputs_embeds=None,
        cache=None,
        use_cache=None,
        output_hidden_states=None,
        prefill_chunk_size=None,
        keep=None,
        ids_on_host=None,
        mm_token_type_ids=None,
        **kwargs,
    ):
        """
        Args:
            input_ids: (batch, tokens) int64. Either these or inputs_embeds (batch, tokens, hidden).
            attention_mask: (batch, tokens), non-zero for real tokens, anywhere in a row; padding changes neither the
                real tokens' results nor the states.
            pixel_values_videos, pixel_values: (batch, frames, 3, height, width), uint8 or normalised float: all the
                videos (images) of a row, one after another; shorter rows are padded with frames at the end.
            cache: `Mamba2Cache` of the tokens before; it is moved on in place.
            use_cache: return the states in `cache`. Default: yes, but not while training.
            output_hidden_states: give out those of all tokens and layers, or of a list of these. Default: the config's.
            prefill_chunk_size: tokens per step without gradient; None means the config's.
            keep: (batch, tokens) bool, the tokens whose hidden states are wanted; None for all.
            ids_on_host: `input_ids` on the CPU. Where these, `attention_mask` and `keep` are there, nothing waits for
                the device; else they are fetched from it.
            mm_token_type_ids: taken and not needed: the ids themselves say what a placeholder is.
            return_dict: False for a tuple.
            position_ids, seq_idx: taken where they only count the real tokens of a row; `arguments` says more.

        Returns:
            `VideoMa2mbaOutput`; `last_hidden_state` is (kept, hidden), row by row, where `keep` is given.

        Raises:
            ValueError: neither or both of ids and embeddings, frames that do not fit the placeholders, packed rows, or
                hidden states asked for under gradient checkpointing.
            TypeError: an unknown argument.
            InfeasibleMemoryBudget: under gradient checkpointing, no plan fits the budget.
        """
        batch, num_tokens = _batch_and_tokens(input_ids, inputs_embeds)
        check_arguments(kwargs, "forward", attention_mask, num_tokens)
        if prefill_chunk_size is not None and prefill_chunk_size < 1:
            raise ValueError(f"prefill_chunk_size must be at least 1, got {prefill_chunk_size}")
        checkpoints = self.is_checkpointing() and torch.is_grad_enabled()
        layers_wanted = hidden_states_wanted(output_hidden_states, self.config, checkpoints)
        every_layer: list | None = [] if layers_wanted else None
        # a graph cannot branch on what a mask or an id is: it always takes the general way
        compiling = torch.compiler.is_compiling()
        mask = order = rows = None
        if attention_mask is not None:
            mask = attention_mask[:, -num_tokens:].bool()
        if not compiling:
            if ids_on_host is None and (num_tokens > 1 or pixel_values is not None or pixel_values_videos is not None):
                ids_on_host = input_ids  # a single one is a token that was written, but where it stands for pixels
            ids_on_host, mask, keep = on_host(ids_on_host, mask, keep)
            if mask is not None and mask.all():
                mask = None
        if keep is not None:
            rows = torch.where(keep, keep.flatten().cumsum(0).view_as(keep) - 1, -1)
        if mask is not None and (compiling or (mask[:, 1:] & ~mask[:, :-1]).any()):
            # The backbone knows one layout, real tokens first: so every kind of padding is exact, also after a past.
            order = mask.int().argsort(dim=1, descending=True, stable=True)
            mask = mask.gather(1, order)
            rows = None if rows is None else rows.gather(1, order)

        windows = self._gradient_windows(mask, rows, batch, num_tokens) if checkpoints else None
        plan = None
        if checkpoints:
            planned = self.language_model.planned_tokens(num_tokens)
            plan = self.checkpoint_plan(batch, planned, planned - (0 if windows is None else windows.first))
            if windows is None and self.checkpoint_options.gradient_horizon is not None:
                # other processes may have something to watch, for which they gather what is sharded
                run_gathered((*self._vision, self.language_model), lambda: ())
        pixels = {"pixel_values_videos": pixel_values_videos, "pixel_values": pixel_values}
        inputs = InterleavedInputs(self, input_ids, ids_on_host, inputs_embeds, pixels, order)
        mask = None if mask is None else to_device(mask, inputs.device)
        if windows is None:
            embeds = inputs.embed(to_host=plan is not None and plan.offload)
            if cache is None:
                cache = self.language_model.new_cache(batch, inputs.device, embeds.dtype)
            hidden_states = self.language_model(embeds, cache, mask, rows, prefill_chunk_size, plan, every_layer)
        else:
            hidden_states, cache = self._watch_and_train(inputs, cache, mask, rows, prefill_chunk_size, plan, windows)
        if order is not None:
            back = to_device(order.argsort(dim=1), hidden_states.device)[..., None]
            if keep is None:
                hidden_states = hidden_states.gather(1, back.expand_as(hidden_states))
            if every_layer:
                every_layer = [states.gather(1, back.expand_as(states)) for states in every_layer]
        use_cache = not self.training if use_cache is None else use_cache
        return VideoMa2mbaOutput(
            last_hidden_state=hidden_states,
            cache=cache if use_cache else None,
            hidden_states=None if every_layer is None else chosen(every_layer, layers_wanted),
        )


class VideoMa2mbaForConditionalGeneration(  # type: ignore[misc]  # as above
    VideoMa2mbaGeneration, VideoMa2mbaPreTrainedModel, GenerationMixin
):
    """Video-Ma2mba with its language head: answers questions about videos and images.

    `torch.compile(fullgraph=True)` and `torch.export` take the prefill of text and the decode step. Eager stay frames,
    whose number per row is read from the ids, and training, whose recomputation hangs on autograd's own hooks.

    Args:
        config: `VideoMa2mbaConfig`.
    """

    _tied_weights_keys = {  # noqa: RUF012 - read by transformers
        "lm_head.weight": "model.language_model.embeddings.weight"
    }

    def __init__(self, config):
        super().__init__(config)
        self.model = VideoMa2mbaModel(config)
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        self.post_init()
        # a placeholder is the place of a frame, never a word of an answer
        self.generation_config.suppress_tokens = [config.image_token_id, config.video_token_id]

    def get_input_embeddings(self):
        return self.model.get_input_embeddings()

    def set_input_embeddings(self, value):
        self.model.set_input_embeddings(value)

    def get_output_embeddings(self):
        return self.lm_head

    def set_output_embeddings(self, value):
        self.lm_head = value

    def get_video_features(self, pixel_values_videos, **kwargs):
        """See `VideoMa2mbaModel.get_video_features`."""
        return self.model.get_video_features(pixel_values_videos, **kwargs)

    def get_image_features(self, pixel_values, **kwargs):
        """See `VideoMa2mbaModel.get_image_features`, of `pixel_values`."""
        return self.model.get_image_features(pixel_values, **kwargs)

    @can_return_tuple
    @cache_under_old_names
    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        pixel_values_videos=None,
        pixel_values=None,
        inputs_embeds=None,
        labels=None,
        cache=None,
        use_cache=None,
        output_hidden_states=None,
        logits_to_keep=None,
        prefill_chunk_size=None,
        num_items_in_batch=None,
        mm_token_type_ids=None,
        **kwargs,
    ):
        """
        Args:
            labels: (batch, tokens) int64, -100 where no loss is wanted. The head runs on the supervised tokens, in
                chunks.
            shift_labels: labels that already stand at the token that predicts them; taken in place of `labels`. (Not
                named in the signature, where the Trainer would take it for labels that every batch must have.)
            logits_to_keep: int, the last so many tokens (0 for all), or a 1-D int64 tensor of positions. None is all
                where no labels are given. Beside a loss it is none while training, and in eval mode all, unless they
                would take more than `config.eval_logits_bytes`: then the loss comes alone, with a warning.
            num_items_in_batch: divide the summed loss by this instead of by the supervised tokens (the Trainer's count
                over an accumulation window).
            The others: as `VideoMa2mbaModel.forward`.

        Returns:
            `VideoMa2mbaOutput` with `loss` where there are labels, and `logits` (batch, kept, vocabulary) in float32.

        Raises:
            ValueError: labels of another shape than the inputs, FSDP2 that casts A_log to 16 bits; and as
                `VideoMa2mbaModel.forward`.
        """
        refuse_narrow_policies(self)
        batch, num_tokens = _batch_and_tokens(input_ids, inputs_embeds)
        targets = _targets(labels, kwargs.pop("shift_labels", None), batch, num_tokens)
        inputs = {
            "input_ids": input_ids, "attention_mask": attention_mask, "pixel_values_videos": pixel_values_videos,
            "pixel_values": pixel_values, "inputs_embeds": inputs_embeds, "cache": cache,
            "use_cache": use_cache, "output_hidden_states": output_hidden_states,
            "prefill_chunk_size": prefill_chunk_size, "return_dict": True, **kwargs,
        }  # fmt: skip
        wanted = self._logits_wanted(logits_to_keep, batch, num_tokens, targets is not None)
        all_wanted = isinstance(wanted, slice) and len(range(num_tokens)[wanted]) == num_tokens
        keep: Any = None
        rows_of: Any = None
        supervised: Any = None
        if targets is not None or (num_tokens > 1 and not torch.compiler.is_compiling()):
            # all that the host must know of the batch, in one go
            ids = inputs.get("ids_on_host") if inputs.get("ids_on_host") is not None else input_ids
            inputs["ids_on_host"], inputs["attention_mask"], targets = on_host(ids, attention_mask, targets)
            supervised = None if targets is None else targets != -100
        # a graph has one shape for all masks: there all hidden states are given out
        if not all_wanted and not (targets is None and torch.compiler.is_compiling()):
            keep = torch.zeros(batch, num_tokens, dtype=torch.bool) if supervised is None else supervised.clone()
            if wanted is not None:
                keep[:, wanted] = True
                rows_of = keep.flatten().cumsum(0).view_as(keep) - 1
        outputs = self.model(**inputs, keep=keep)
        hidden_states, loss, logits = outputs.last_hidden_state, None, None
        if targets is not None:
            rows = hidden_states
            if keep is None:
                places = to_device(supervised.flatten().nonzero()[:, 0], hidden_states.device)
                rows = hidden_states.flatten(0, 1)[places]
            elif wanted is not None:
                rows = hidden_states[to_device(rows_of[supervised], hidden_states.device)]
            loss = head_loss(self.lm_head, rows, targets[supervised], self.config.loss_chunk_size, num_items_in_batch)
        if wanted is not None:
            # all of them, or of the rows that were kept
            rows = (slice(None), wanted) if keep is None else to_device(rows_of[:, wanted], hidden_states.device)
            # as for the loss, and by no hook of an engine, which would fetch ahead for the loss what this one used
            (logits,) = run_gathered([self.lm_head], lambda rows: (self.lm_head(rows).float(),), hidden_states[rows])
        return VideoMa2mbaOutput(loss=loss, logits=logits, cache=outputs.cache, hidden_states=outputs.hidden_states)

    def _logits_wanted(self, logits_to_keep, batch, num_tokens, has_targets):
        """Which tokens' logits are to be given out: a slice, a tensor of positions, or None."""
        if isinstance(logits_to_keep, torch.Tensor):
            return logits_to_keep
        if logits_to_keep is not None:
            return slice(-logits_to_keep, None) if logits_to_keep else slice(None)
        if not has_targets:
            return slice(None)
        limit = self.config.eval_logits_bytes
        if self.training or num_logits_bytes(batch, num_tokens, self.config.text_config.vocab_size) > limit:
            if not self.training and limit > 0:
                logger.warning_once(
                    f"In eval mode the loss comes without logits where these would take more than eval_logits_bytes, "
                    f"{format_bytes(limit)}. Metrics that need them: set config.eval_logits_bytes higher, make the "
                    "batch smaller, or ask for the last tokens with logits_to_keep."
                )
            return None
        return slice(None)


def _batch_and_tokens(input_ids, inputs_embeds):
    if (input_ids is None) == (inputs_embeds is None):
        raise ValueError("give either input_ids or inputs_embeds, and not both")
    return (input_ids if inputs_embeds is None else inputs_embeds).shape[:2]


def _targets(labels, shift_labels, batch, num_tokens):
    """What each token is to predict, (batch, tokens) int64, -100 for nothing; None without labels."""
    name, given = ("labels", labels) if shift_labels is None else ("shift_labels", shift_labels)
    if given is None:
        return None
    if given.shape != (batch, num_tokens):
        raise ValueError(f"{name} are {tuple(given.shape)}, the inputs {(batch, num_tokens)}: they must match")
    return F.pad(given[:, 1:], (0, 1), value=-100) if shift_labels is None else given
