"""Video-Ma2mba: a vision tower, a projector and a Mamba-2 backbone that reads every frame (arXiv 2411.19460)."""

import copy
import math
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from transformers import AutoModel, GenerationMixin, PreTrainedModel
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.generation.utils import ALL_CACHE_NAMES
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.utils import ModelOutput

from .autocast import autocast_dtype
from .checkpoint_plan import CheckpointOptions
from .configuration_video_ma2mba import VideoMa2mbaConfig
from .interleave import Interleave
from .mamba2 import Mamba2Backbone, Mamba2Cache, Mamba2Mixer, Mamba2RMSNorm, Mamba2RMSNormGated, init_mamba2_weights
from .multi_axis_checkpointing import MultiAxisCheckpointing
from .recompute import recompute_segments
from .sharded_parameters import as_unsharded_class, engine_hooks_aside, others_wait_for, run_gathered

# `generate` finds the cache of an output, and reorders it for beams, by these names; before 5.24 `cache` is not one.
if "cache" not in ALL_CACHE_NAMES:
    ALL_CACHE_NAMES.append("cache")


@dataclass
class VideoMa2mbaOutput(ModelOutput):
    """
    Attributes:
        loss: scalar float32, where labels were given.
        logits: (batch, kept tokens, vocabulary), float32; absent where a loss was asked for.
        last_hidden_state: (batch, tokens, hidden) after the final norm; of the base model only.
        cache: `Mamba2Cache`, the states after the last token.
    """

    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    last_hidden_state: torch.Tensor | None = None
    cache: Mamba2Cache | None = None


class VideoMa2mbaProjector(nn.Module):
    """Two linear layers with an activation between: vision width -> language width."""

    def __init__(self, config):
        super().__init__()
        hidden_size = config.text_config.hidden_size
        self.linear_1 = nn.Linear(config.vision_config.hidden_size, hidden_size)
        self.act = ACT2FN[config.projector_hidden_act]
        self.linear_2 = nn.Linear(hidden_size, hidden_size)

    def forward(self, features):
        """(frames, tokens, vision hidden) -> (frames, tokens, hidden)"""
        return self.linear_2(self.act(self.linear_1(features)))


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

    def save_pretrained(self, save_directory, *args, state_dict=None, **kwargs):
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
            super().save_pretrained(save_directory, *args, state_dict=state_dict, **kwargs)

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


class VideoMa2mbaModel(VideoMa2mbaPreTrainedModel):
    """The model without a head: frames and text in, hidden states and recurrent states out (paper, section 3.1).

    Args:
        config: `VideoMa2mbaConfig`.
    """

    def __init__(self, config):
        super().__init__(config)
        self.vision_tower = _build_tower(config)
        self.multi_modal_projector = VideoMa2mbaProjector(config)
        self.language_model = Mamba2Backbone(config.text_config, config.prefill_chunk_size, config.scan_backend)
        self.gradient_checkpointing, self.checkpoint_options, self._plans = False, CheckpointOptions(), {}
        self.post_init()

    def get_input_embeddings(self):
        return self.language_model.embeddings

    def set_input_embeddings(self, value):
        self.language_model.embeddings = value

    def get_video_features(self, pixel_values_videos, to_host=False, **kwargs):
        """Encode frames in micro-batches: tower, 2 x 2 bilinear pooling, projector (paper, section 3.1).

        A frozen tower builds no graph. Under gradient checkpointing, what trains is computed again in the backward
        pass, one micro-batch at a time.

        Args:
            pixel_values_videos: (frames, 3, height, width) or (batch, frames, 3, height, width): uint8, or float
                normalised; on any device.
            to_host: gather the features in host memory.

        Returns:
            `BaseModelOutputWithPooling` with `pooler_output` (all frames, tokens_per_frame, hidden).

        Raises:
            ValueError: frames of another form.
        """
        pixels = pixel_values_videos.flatten(0, -4)
        if pixels.shape[1] != 3:
            raise ValueError(f"frames must be (..., 3, height, width), got shape {tuple(pixel_values_videos.shape)}")
        trains_tower = any(param.requires_grad for param in self.vision_tower.parameters())

        def encode(pixels):
            features = []
            for chunk in pixels.split(self.config.vision_chunk_size):
                if trains_tower:
                    encoded = self._again_in_backward(self._encode_frames, chunk)
                else:
                    with torch.no_grad():
                        pooled = self._pooled_features(chunk)
                    encoded = self._again_in_backward(self._project, pooled.cpu() if to_host else pooled)
                features.append(encoded.cpu() if to_host else encoded)
            return (torch.cat(features),)

        (features,) = run_gathered(self._vision, encode, pixels)
        return BaseModelOutputWithPooling(pooler_output=features)

    @property
    def _vision(self):
        return self.vision_tower, self.multi_modal_projector

    def get_image_features(self, pixel_values, to_host=False, **kwargs):
        """As `get_video_features` of `pixel_values`: an image is a video of one frame."""
        return self.get_video_features(pixel_values, to_host)

    def _again_in_backward(self, fn, inputs):
        def run(inputs):
            with engine_hooks_aside(self._vision):  # the engine's part is done once for all micro-batches
                return fn(inputs)

        if self.is_checkpointing() and torch.is_grad_enabled():
            return checkpoint(run, inputs, use_reentrant=False)
        return fn(inputs)

    def _encode_frames(self, pixels):
        """(frames, 3, height, width) -> (frames, tokens_per_frame, hidden)"""
        return self._project(self._pooled_features(pixels))

    def _pooled_features(self, pixels):
        """(frames, 3, height, width) -> (frames, tokens_per_frame, vision hidden)"""
        config = self.config
        pixels = pixels.to(self.vision_tower.device)
        if pixels.dtype == torch.uint8:
            mean, std = (
                pixels.new_tensor(v, dtype=torch.float32)[:, None, None] for v in (config.image_mean, config.image_std)
            )
            pixels = (pixels / 255 - mean) / std
        # the tower has no layer after the wanted one and no final norm: its last hidden state is the wanted feature
        hidden = self.vision_tower(pixels.to(self.vision_tower.dtype)).last_hidden_state
        side = config.vision_config.image_size // config.vision_config.patch_size
        grid = hidden[:, hidden.shape[1] - side * side :]  # drops the class token, where there is one
        grid = grid.transpose(1, 2).unflatten(2, (side, side))
        pooled_side = -(-side // config.spatial_pool_stride)
        pooled = F.interpolate(grid, size=(pooled_side, pooled_side), mode=config.spatial_pool_mode)
        return pooled.flatten(2).transpose(1, 2)

    def _project(self, features):
        return self.multi_modal_projector(features.to(self.multi_modal_projector.linear_1.weight.device))

    def _embed(self, input_ids, pixels_by_name, to_host):
        """Text through the table, frames through the tower: (batch, tokens) ids -> (batch, tokens, hidden).

        Rows may hold padding frames at the end; placeholders say how many are real.
        """
        table = self.get_input_embeddings()
        is_text, parts = torch.ones_like(input_ids, dtype=torch.bool), []
        for name, token_id, encode in (
            ("pixel_values_videos", self.config.video_token_id, self.get_video_features),
            ("pixel_values", self.config.image_token_id, self.get_image_features),
        ):
            is_placeholder = input_ids == token_id
            if (pixels := pixels_by_name[name]) is None:
                # a single id is a token being generated, which a model may get wrong
                if input_ids.shape[1] > 1 and is_placeholder.any():
                    raise ValueError(
                        f"input_ids has {int(is_placeholder.sum())} placeholders for {name}, but no {name} was given; "
                        "prepare both with the same processor call"
                    )
                continue
            counts = self._frames_per_row(is_placeholder, pixels, name)
            frames = torch.cat([row[:count] for row, count in zip(pixels, counts, strict=True)])
            parts.append((is_placeholder, encode(frames, to_host=to_host).pooler_output.flatten(0, 1)))
            is_text &= ~is_placeholder
        if not parts and others_wait_for(self._vision):
            # in the order of a batch with frames, as engines add up gradients in the order in which they come
            side = self.config.vision_config.image_size
            black = torch.zeros(1, 3, side, side, dtype=torch.uint8, device=input_ids.device)
            unused = self.get_video_features(black, to_host=to_host).pooler_output.flatten(0, 1)[:0]
            parts.append((torch.zeros_like(is_text), unused))
        text = table(input_ids[is_text])
        if not parts and not to_host:
            return text.view(*input_ids.shape, -1)
        parts.append((is_text, text.cpu() if to_host else text))
        masks, values = zip(*parts, strict=True)
        masks = tuple(mask.to(values[-1].device) for mask in masks)
        return Interleave.apply(masks, text.dtype, to_host and text.is_cuda, *values)

    def _frames_per_row(self, is_placeholder, pixels, name):
        if pixels.ndim != 5:
            raise ValueError(f"{name} must be (batch, frames, 3, height, width), got shape {tuple(pixels.shape)}")
        tokens_per_frame = self.config.tokens_per_frame
        counts = is_placeholder.sum(dim=1).tolist()
        num_frames = [count // tokens_per_frame for count in counts]
        whole = all(count % tokens_per_frame == 0 for count in counts)
        if not whole or len(counts) != pixels.shape[0] or max(num_frames) != pixels.shape[1]:
            raise ValueError(
                f"the rows of input_ids have {counts} placeholders for {name} at {tokens_per_frame} per frame, but "
                f"{name} holds {pixels.shape[0]} row(s) of {pixels.shape[1]} frame(s); prepare both with the same "
                "processor call"
            )
        return num_frames

    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        pixel_values_videos=None,
        pixel_values=None,
        inputs_embeds=None,
        cache=None,
        use_cache=None,
        prefill_chunk_size=None,
        keep=None,
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
            prefill_chunk_size: tokens per step without gradient; None means the config's.
            keep: (batch, tokens) bool, the tokens whose hidden states are wanted; None for all.

        Returns:
            `VideoMa2mbaOutput`; `last_hidden_state` is (kept, hidden), row by row, where `keep` is given.

        Raises:
            ValueError: neither or both of ids and embeddings, or frames that do not fit the placeholders.
            InfeasibleMemoryBudget: under gradient checkpointing, no plan fits the budget.
        """
        batch, num_tokens = _batch_and_tokens(input_ids, inputs_embeds)
        if prefill_chunk_size is not None and prefill_chunk_size < 1:
            raise ValueError(f"prefill_chunk_size must be at least 1, got {prefill_chunk_size}")
        plan = None
        if self.is_checkpointing() and torch.is_grad_enabled():
            plan = self.checkpoint_plan(batch, self.language_model.planned_tokens(num_tokens))
        if inputs_embeds is None:
            pixels = {"pixel_values_videos": pixel_values_videos, "pixel_values": pixel_values}
            inputs_embeds = self._embed(input_ids, pixels, to_host=plan is not None and plan.offload)
        elif pixel_values_videos is not None or pixel_values is not None:
            raise ValueError("frames need input_ids, whose placeholders say where they go; got inputs_embeds")

        if cache is None:
            cache = self.language_model.new_cache(batch)
        rows = None
        if keep is not None:
            keep = keep.cpu()
            rows = torch.where(keep, keep.flatten().cumsum(0).view_as(keep) - 1, -1)
        mask = order = None
        if attention_mask is not None:
            mask = attention_mask[:, -num_tokens:].bool()
            if mask.all():
                mask = None
        if mask is not None and (mask[:, 1:] & ~mask[:, :-1]).any():
            # The backbone knows one layout, real tokens first: so every kind of padding is exact, also after a past.
            order = mask.int().argsort(dim=1, descending=True, stable=True)
            inputs_embeds = inputs_embeds.gather(1, order.to(inputs_embeds.device)[..., None].expand_as(inputs_embeds))
            mask = mask.gather(1, order)
            rows = None if rows is None else rows.gather(1, order.cpu())
        hidden_states = self.language_model(inputs_embeds, cache, mask, rows, prefill_chunk_size, plan)
        if order is not None and keep is None:
            hidden_states = hidden_states.gather(1, order.argsort(dim=1)[..., None].expand_as(hidden_states))
        use_cache = not self.training if use_cache is None else use_cache
        return VideoMa2mbaOutput(last_hidden_state=hidden_states, cache=cache if use_cache else None)


class VideoMa2mbaForConditionalGeneration(VideoMa2mbaPreTrainedModel, GenerationMixin):  # type: ignore[misc]  # as above
    """Video-Ma2mba with its language head: answers questions about videos and images.

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
        return self.model.get_video_features(pixel_values_videos)

    def get_image_features(self, pixel_values, **kwargs):
        """See `VideoMa2mbaModel.get_image_features`, of `pixel_values`."""
        return self.model.get_image_features(pixel_values)

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
        logits_to_keep=0,
        prefill_chunk_size=None,
        num_items_in_batch=None,
        **kwargs,
    ):
        """
        Args:
            labels: (batch, tokens) int64, -100 where no loss is wanted. Given labels, the head runs on the supervised
                tokens alone, in chunks, and no logits are returned.
            logits_to_keep: int, the last so many tokens (0 for all), or a 1-D int64 tensor of positions.
            num_items_in_batch: divide the summed loss by this instead of by the supervised tokens (the Trainer's count
                over an accumulation window).
            kwargs: `shift_labels` (batch, tokens) int64, in the place of labels: what each token is to predict. (As in
                transformers, which would take an argument of that name for a second kind of labels.)
            The others: as `VideoMa2mbaModel.forward`.

        Returns:
            `VideoMa2mbaOutput` with `loss`, or with `logits` (batch, kept, vocabulary) in float32.

        Raises:
            ValueError: labels of another shape than the inputs; and as `VideoMa2mbaModel.forward`.
        """
        inputs = {
            "input_ids": input_ids, "attention_mask": attention_mask, "pixel_values_videos": pixel_values_videos,
            "pixel_values": pixel_values, "inputs_embeds": inputs_embeds, "cache": cache,
            "use_cache": use_cache, "prefill_chunk_size": prefill_chunk_size,
        }  # fmt: skip
        batch, num_tokens = _batch_and_tokens(input_ids, inputs_embeds)
        shift_labels = kwargs.get("shift_labels")
        given = labels if shift_labels is None else shift_labels
        if given is not None:
            if given.shape != (batch, num_tokens):
                raise ValueError(f"labels are {tuple(given.shape)}, the inputs {(batch, num_tokens)}: they must match")
            # token t predicts token t + 1
            targets = F.pad(given[:, 1:], (0, 1), value=-100) if shift_labels is None else shift_labels
            keep = targets != -100
            outputs = self.model(**inputs, keep=keep)
            loss = self._loss(outputs.last_hidden_state, targets[keep], num_items_in_batch)
            return VideoMa2mbaOutput(loss=loss, cache=outputs.cache)

        if isinstance(logits_to_keep, int):
            first = max(0, num_tokens - logits_to_keep) if logits_to_keep else 0
            logits_to_keep = torch.arange(first, num_tokens)
        keep = torch.zeros(batch, num_tokens, dtype=torch.bool)
        keep[:, logits_to_keep.cpu()] = True
        outputs = self.model(**inputs, keep=keep)
        hidden_states = outputs.last_hidden_state.view(batch, -1, self.config.text_config.hidden_size)
        return VideoMa2mbaOutput(logits=self.lm_head(hidden_states).float(), cache=outputs.cache)

    def _loss(self, hidden_states, targets, num_items_in_batch):
        """Cross-entropy in float32 of (supervised, hidden) against (supervised,), a chunk of logits at a time."""
        dtype = autocast_dtype(hidden_states.device.type) or hidden_states.dtype

        def token_losses(sequence, states, params):
            hidden, target = sequence
            logits = (hidden[0].to(dtype) @ params[0].to(dtype).T).float()
            return F.cross_entropy(logits, target[0], reduction="none")[None], states

        def all_losses(hidden_states):
            sequence = hidden_states[None], targets[None]
            return recompute_segments(
                token_losses, self.config.loss_chunk_size, sequence, params=(self.lm_head.weight,)
            )[:1]

        (losses,) = run_gathered((self.lm_head,), all_losses, hidden_states)
        if targets.numel() == 0:
            return losses.sum()  # nothing supervised: a zero in which all takes part
        return losses.sum() / (targets.numel() if num_items_in_batch is None else num_items_in_batch)

    # --- generation -------------------------------------------------------------------------------------------------

    def _prepare_cache_for_generation(self, generation_config, model_kwargs, *args, **kwargs):
        # transformers would build an attention cache here and, asked for a chunked prefill, cut the ids but not the
        # video; the model cuts its own prefill instead
        if generation_config.prefill_chunk_size is not None:
            model_kwargs["prefill_chunk_size"] = generation_config.prefill_chunk_size
            generation_config.prefill_chunk_size = None
        if model_kwargs.get("cache") is not None:
            cache = model_kwargs["cache"].copy()  # the caller's stays as it was
            cache.batch_repeat_interleave(max(generation_config.num_beams, generation_config.num_return_sequences))
            model_kwargs["cache"] = cache

    def prepare_inputs_for_generation(  # type: ignore[override]  # before 5.24 the cache is called otherwise
        self, input_ids, inputs_embeds=None, attention_mask=None, cache=None, use_cache=None,
        is_first_iteration=False, **kwargs,
    ):  # fmt: skip
        first_or_uncached = is_first_iteration or not use_cache
        model_inputs = {
            name: kwargs[name] for name in ("logits_to_keep", "prefill_chunk_size") if kwargs.get(name) is not None
        }
        if first_or_uncached:
            for name in ("pixel_values_videos", "pixel_values"):
                model_inputs[name] = kwargs.get(name)
        if inputs_embeds is not None and is_first_iteration:
            model_inputs["inputs_embeds"] = inputs_embeds
        else:
            model_inputs["input_ids"] = input_ids if first_or_uncached else input_ids[:, -1:]
        model_inputs["attention_mask"] = attention_mask if first_or_uncached else None  # a new token is never padding
        return {**model_inputs, "cache": cache if use_cache else None, "use_cache": use_cache}


def _batch_and_tokens(input_ids, inputs_embeds):
    if (input_ids is None) == (inputs_embeds is None):
        raise ValueError("give either input_ids or inputs_embeds, and not both")
    return (input_ids if inputs_embeds is None else inputs_embeds).shape[:2]


def _build_tower(config):
    """The tower up to the layer whose output is used: what comes after would be neither run nor trained."""
    vision_config = copy.deepcopy(config.vision_config)
    vision_config.num_hidden_layers = config.num_vision_layers
    vision_config.vision_use_head = False  # SigLIP's attention pooling; not all versions declare the field
    tower = AutoModel.from_config(vision_config)
    tower.post_layernorm = nn.Identity()
    return tower
