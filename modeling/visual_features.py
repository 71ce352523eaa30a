"""The visual half of the model: frames through tower, pooling and projector, and into the text (paper, section 3.1)."""

import copy
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from transformers import AutoModel
from transformers.activations import ACT2FN
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.utils.generic import can_return_tuple

from .arguments import refuse_unknown
from .sharded_parameters import engine_hooks_aside, others_wait_for, run_gathered


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


def build_tower(config):
    """The tower up to the layer whose output is used: what comes after would be neither run nor trained."""
    vision_config = copy.deepcopy(config.vision_config)
    vision_config.num_hidden_layers = config.num_vision_layers
    vision_config.vision_use_head = False  # SigLIP's attention pooling; not all versions declare the field
    tower = AutoModel.from_config(vision_config)
    tower.post_layernorm = nn.Identity()
    built = tower.config
    for module in tower.modules():  # what is set in the model's configuration later acts in the tower, too
        if getattr(module, "config", None) is built:
            module.config = config.vision_config
    config.vision_config._attn_implementation = built._attn_implementation
    return tower


class VisualFeatures:
    """The methods of `VideoMa2mbaModel` that turn frames into embeddings."""

    config: Any  # of `VideoMa2mbaModel`, as the next
    vision_tower: Any
    multi_modal_projector: Any
    is_checkpointing: Any
    get_input_embeddings: Any

    @can_return_tuple
    def get_video_features(self, pixel_values_videos, output_hidden_states=None, output_attentions=None, **kwargs):
        """Encode frames in micro-batches: tower, 2 x 2 bilinear pooling, projector (paper, section 3.1).

        A frozen tower builds no graph.

        Args:
            pixel_values_videos: (batch, frames, 3, height, width), or (frames, 3, height, width): uint8, or float
                normalised; on any device.
            output_hidden_states, output_attentions: give out the tower's, too.
            return_dict: False for a tuple.

        Returns:
            `BaseModelOutputWithPooling`. `pooler_output`: an entry per video, (batch, frames * tokens_per_frame,
            hidden); of frames without a batch an entry per frame, (frames, tokens_per_frame, hidden).
            `last_hidden_state` (batch, frames, patches, vision hidden), the tower's before pooling, and on request
            `hidden_states`, one more than the layers that are run, and `attentions`: likewise, or without batch.

        Raises:
            ValueError: frames of another form. TypeError: an unknown argument.
        """
        refuse_unknown(kwargs, "get_video_features")
        options = {"output_hidden_states": output_hidden_states, "output_attentions": output_attentions}
        said: list = []
        pixels = pixel_values_videos.flatten(0, -4) if pixel_values_videos.ndim > 4 else pixel_values_videos
        options = {name: value for name, value in options.items() if value}
        (features,) = run_gathered(self._vision, lambda pixels: (self._encode(pixels, said=said, **options),), pixels)
        leading = pixel_values_videos.shape[:-3]

        def by_layer(chunks):
            return tuple(torch.cat(parts).unflatten(0, leading) for parts in zip(*chunks, strict=True)) or None

        return BaseModelOutputWithPooling(
            last_hidden_state=torch.cat([out.last_hidden_state for out in said]).unflatten(0, leading),
            pooler_output=features.unflatten(0, leading).flatten(1, -2) if len(leading) > 1 else features,
            hidden_states=by_layer(out.hidden_states or () for out in said),
            attentions=by_layer(out.attentions or () for out in said),
        )

    def get_image_features(self, pixel_values, **kwargs):
        """As `get_video_features` of `pixel_values`: an image is a video of one frame."""
        return self.get_video_features(pixel_values, **kwargs)

    @property
    def _vision(self):
        return self.vision_tower, self.multi_modal_projector

    def _encode_parts(self, parts, input_ids, to_host):
        """All frames of a batch in one go, as all processes gather what is sharded: [(mask, (tokens, hidden))].

        A process without frames that train runs a black one where others wait for it.

        Args:
            parts: [(mask (batch, tokens) bool, whether a graph is built, pixels, features -> rows of the mask)].
        """
        if not any(builds_graph for _, builds_graph, *_ in parts) and others_wait_for(self._vision):
            # in the order of a batch with frames, as engines add up gradients in the order in which they come
            side = self.config.vision_config.image_size
            black = torch.zeros(1, 3, side, side, dtype=torch.uint8, device=input_ids.device)
            nowhere = torch.zeros_like(input_ids, dtype=torch.bool)
            parts = [*parts, (nowhere, True, black, lambda features: features[:0])]
        if not parts:
            return []

        def encode():
            values = []
            for _, builds_graph, pixels, chosen in parts:
                with torch.set_grad_enabled(builds_graph and torch.is_grad_enabled()):
                    values.append(chosen(self._encode(pixels, to_host=to_host).flatten(0, 1)))
            return tuple(values)

        return list(zip((part[0] for part in parts), run_gathered(self._vision, encode), strict=True))

    def _encode(self, pixels, to_host=False, said=None, **options):
        """(frames, 3, height, width) -> (frames, tokens_per_frame, hidden)

        Under gradient checkpointing, what trains is computed again in the backward pass, one micro-batch at a time.

        Args:
            to_host: gather the features in host memory.
            said: list to which the tower's outputs are added.
            options: for the tower.
        """
        if pixels.ndim != 4 or pixels.shape[1] != 3:
            raise ValueError(f"frames must be (..., 3, height, width), got shape {tuple(pixels.shape)}")
        trains = any(param.requires_grad for param in self.vision_tower.parameters())

        def see(pixels):
            outputs = self._see(pixels, **options)
            if said is not None:
                said.append(outputs)
            return self._pool(outputs.last_hidden_state)

        features = []
        for chunk in pixels.split(self.config.vision_chunk_size):
            if trains and said is None:
                encoded = self._again_in_backward(lambda pixels: self.multi_modal_projector(see(pixels)), chunk)
            else:
                with torch.set_grad_enabled(trains and torch.is_grad_enabled()):
                    pooled = see(chunk)
                device = pooled.device
                encoded = self._again_in_backward(
                    lambda pooled, device=device: self.multi_modal_projector(pooled.to(device)),
                    pooled.cpu() if to_host else pooled,
                )
            features.append(encoded.cpu() if to_host else encoded)
        return torch.cat(features)

    def _again_in_backward(self, fn, inputs):
        def run(inputs):
            with engine_hooks_aside(self._vision):  # the engine's part is done once for all micro-batches
                return fn(inputs)

        if self.is_checkpointing() and torch.is_grad_enabled():
            return checkpoint(run, inputs, use_reentrant=False)
        return fn(inputs)

    def _pooled_features(self, pixels):
        """(frames, 3, height, width) -> (frames, tokens_per_frame, vision hidden)"""
        return self._pool(self._see(pixels).last_hidden_state)

    def _see(self, pixels, **options):
        """Pixels of any kind -> the tower's output. It has no layer after the wanted one and no final norm."""
        device = next(self.vision_tower.parameters()).device
        if device.type != "meta":  # what is offloaded is brought to the pixels
            pixels = pixels.to(device)
        if pixels.dtype == torch.uint8:
            mean, std = (
                pixels.new_tensor(v, dtype=torch.float32)[:, None, None]
                for v in (self.config.image_mean, self.config.image_std)
            )
            pixels = (pixels / 255 - mean) / std
        return self.vision_tower(pixels.to(self.vision_tower.dtype), return_dict=True, **options)

    def _pool(self, hidden):
        """(frames, patches, vision hidden), maybe with a class token before -> (frames, tokens_per_frame, ...)"""
        config = self.config
        side = config.vision_config.image_size // config.vision_config.patch_size
        grid = hidden[:, hidden.shape[1] - side * side :]  # drops the class token, where there is one
        grid = grid.transpose(1, 2).unflatten(2, (side, side))
        pooled_side = -(-side // config.spatial_pool_stride)
        pooled = F.interpolate(grid, size=(pooled_side, pooled_side), mode=config.spatial_pool_mode)
        return pooled.flatten(2).transpose(1, 2)

    # --- into the text ----------------------------------------------------------------------------------------------

    def _embed(self, input_ids, inputs_embeds, pixels_by_name, to_host):
        """Text through the table, frames through the tower: ids or embeddings -> (batch, tokens, hidden).

        Rows may hold padding frames at the end; placeholders say how many are real. In embeddings a placeholder is
        found by its embedding.
        """
        table = self.get_input_embeddings()
        token_ids = {
            "pixel_values_videos": self.config.video_token_id, "pixel_values": self.config.image_token_id,
        }  # fmt: skip
        parts = []
        for name, token_id in token_ids.items():
            pixels = pixels_by_name[name]
            if input_ids is not None:
                is_placeholder = input_ids == token_id
            elif pixels is not None:
                one = table(torch.full((1, 1), token_id, device=inputs_embeds.device))
                is_placeholder = (inputs_embeds == one.to(inputs_embeds)).all(-1)
            if pixels is None:
                if input_ids is not None:
                    refuse_placeholders(is_placeholder, name)
                continue
            counts = self._frames_per_row(is_placeholder, pixels, name, input_ids is None)
            frames = torch.cat([row[:count] for row, count in zip(pixels, counts, strict=True)])
            parts.append((is_placeholder, True, frames, lambda features: features))
        if input_ids is not None or parts:
            parts = self._encode_parts(parts, is_placeholder, to_host)
        return self._interleave(input_ids, inputs_embeds, parts, to_host)

    def _interleave(self, input_ids, inputs_embeds, parts, to_host):
        """Text, as ids or embeddings, with other embeddings in the places of their masks: (batch, tokens, hidden).

        Args:
            parts: pairs of a mask (batch, tokens) bool, and what stands there, row by row.
            to_host: gather the result in host memory.
        """
        table = self.get_input_embeddings()
        if not to_host:
            text = table(input_ids) if inputs_embeds is None else inputs_embeds
            if not parts:
                return text
            masks, values = zip(*parts, strict=True)
            ours = inputs_embeds is None and not text.requires_grad
            return _Interleave.apply(text, ours, masks, *values)
        return self._embed_on_host(table, input_ids, inputs_embeds, parts)

    def _embed_on_host(self, table, input_ids, inputs_embeds, parts):
        """In host memory, so that nothing as long as the input is ever on the device."""
        if getattr(table, "neftune_noise_alpha", None) is not None:
            raise ValueError(
                "neftune_noise_alpha needs the embeddings of whole rows on the device; use it without offload=True"
            )
        given = input_ids if inputs_embeds is None else inputs_embeds
        is_text = torch.ones(given.shape[:2], dtype=torch.bool, device=given.device)
        for mask, _ in parts:
            is_text &= ~mask
        text = table(input_ids[is_text][None])[0] if inputs_embeds is None else inputs_embeds[is_text]
        masks, values = zip(*parts, (is_text, text.cpu()), strict=True)
        masks = tuple(mask.cpu() for mask in masks)
        shape = *given.shape[:2], text.shape[-1]
        whole = torch.empty(shape, dtype=text.dtype, device=values[-1].device, pin_memory=text.is_cuda)
        return _Interleave.apply(whole, True, masks, *values)

    def _frames_per_row(self, is_placeholder, pixels, name, by_embedding=False):
        """How many real frames each row has, as its placeholders say. Raises ValueError where they do not fit."""
        if pixels.ndim != 5:
            raise ValueError(f"{name} must be (batch, frames, 3, height, width), got shape {tuple(pixels.shape)}")
        tokens_per_frame = self.config.tokens_per_frame
        counts = is_placeholder.sum(dim=1).tolist()
        num_frames = [count // tokens_per_frame for count in counts]
        whole = all(count % tokens_per_frame == 0 for count in counts)
        if not whole or len(counts) != pixels.shape[0] or max(num_frames) != pixels.shape[1]:
            given, remedy = "input_ids", "prepare both with the same processor call"
            if by_embedding:
                given = "inputs_embeds"
                remedy = "frames need input_ids, or embeddings that still hold those of the placeholders"
            raise ValueError(
                f"the rows of {given} have {counts} placeholders for {name} at {tokens_per_frame} per frame, but "
                f"{name} holds {pixels.shape[0]} row(s) of {pixels.shape[1]} frame(s); {remedy}"
            )
        return num_frames


def refuse_placeholders(is_placeholder, name):
    # a single id is a token being generated, which a model may get wrong
    if is_placeholder.shape[1] == 1:
        return
    if torch.compiler.is_compiling():  # a graph cannot branch on what the ids are, but it can refuse them
        torch._assert_async(~is_placeholder.any(), f"input_ids has placeholders for {name}, but no {name} was given")
    elif is_placeholder.any():
        raise ValueError(
            f"input_ids has {int(is_placeholder.sum())} placeholders for {name}, but no {name} was given; "
            "prepare both with the same processor call"
        )


class _Interleave(torch.autograd.Function):
    """Rows into their places of a sequence: `whole[masks[i]] = values[i]`, in place where `whole` needs no gradient."""

    @staticmethod
    def forward(ctx, whole, in_place, masks, *values):
        ctx.masks, ctx.dtypes = masks, [value.dtype for value in values]
        out = whole if in_place else whole.clone()
        if in_place:
            ctx.mark_dirty(whole)
        for mask, value in zip(masks, values, strict=True):
            out[mask] = value.to(out.dtype)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        grad_whole = None
        if ctx.needs_input_grad[0]:
            grad_whole = grad.clone()
            for mask in ctx.masks:
                grad_whole[mask] = 0
        wanted = zip(ctx.masks, ctx.dtypes, ctx.needs_input_grad[3:], strict=True)
        return grad_whole, None, None, *(grad[mask].to(dtype) if need else None for mask, dtype, need in wanted)
