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
from .host_copies import on_host, to_device, wait_for
from .host_memory import Borrowed
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

    def _encode_parts(self, parts, device, to_host):
        """All frames of a batch in one go, as all processes gather what is sharded: [(places, (tokens, hidden))].

        A process without frames that train runs a black one where others wait for it.

        Args:
            parts: [(places, whether a graph is built, pixels, features -> rows of the places)]. Places are (tokens,)
                int64 on the CPU: where the rows stand in the flattened input.
            device: of the input.
        """
        if not any(builds_graph for _, builds_graph, *_ in parts) and others_wait_for(self._vision):
            # in the order of a batch with frames, as engines add up gradients in the order in which they come
            side = self.config.vision_config.image_size
            black = torch.zeros(1, 3, side, side, dtype=torch.uint8, device=device)
            parts = [*parts, (torch.zeros(0, dtype=torch.int64), True, black, lambda features: features[:0])]
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
                    pooled.to("cpu", non_blocking=True) if to_host else pooled,
                )
            features.append(encoded.to("cpu", non_blocking=True) if to_host else encoded)
        if to_host:
            wait_for(encoded.device)  # before anything reads these on the host
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

    def _embed(self, input_ids, ids_on_host, inputs_embeds, pixels_by_name, to_host):
        """Text through the table, frames through the tower: ids or embeddings -> (batch, tokens, hidden).

        Rows may hold padding frames at the end; placeholders say how many are real. In embeddings a placeholder is
        found by its embedding.
        """
        table = self.get_input_embeddings()
        parts = []
        for name, token_id in self._token_ids.items():
            pixels = pixels_by_name[name]
            if pixels is None:
                refuse_placeholders(input_ids, ids_on_host, token_id, name)
                continue
            if input_ids is None:
                one = table(torch.full((1, 1), token_id, device=inputs_embeds.device))
                (is_placeholder,) = on_host((inputs_embeds == one.to(inputs_embeds)).all(-1))
            else:
                is_placeholder = ids_on_host == token_id
            counts = self._frames_per_row(is_placeholder, pixels, name, input_ids is None)
            places = is_placeholder.flatten().nonzero()[:, 0]
            parts.append((places, True, real_frames(pixels, counts), lambda features: features))
        given = input_ids if inputs_embeds is None else inputs_embeds
        if input_ids is not None or parts:
            parts = self._encode_parts(parts, given.device, to_host)
        return self._interleave(input_ids, inputs_embeds, parts, to_host)

    @property
    def _token_ids(self):
        return {"pixel_values_videos": self.config.video_token_id, "pixel_values": self.config.image_token_id}

    def _interleave(self, input_ids, inputs_embeds, parts, to_host):
        """Text, as ids or embeddings, with other embeddings in the places of their masks: (batch, tokens, hidden).

        Args:
            parts: pairs of places (rows,) int64 on the CPU in the flattened input, and what stands there.
            to_host: gather the result in host memory.
        """
        table = self.get_input_embeddings()
        if not to_host:
            text = table(input_ids) if inputs_embeds is None else inputs_embeds
            if not parts:
                return text
            places, values = zip(*parts, strict=True)
            places = tuple(to_device(one, text.device) for one in places)
            ours = inputs_embeds is None and not text.requires_grad
            return _Interleave.apply(text, ours, places, *values)
        return self._embed_on_host(table, input_ids, inputs_embeds, parts)

    def _embed_on_host(self, table, input_ids, inputs_embeds, parts):
        """In host memory, so that nothing as long as the input is ever on the device."""
        if getattr(table, "neftune_noise_alpha", None) is not None:
            raise ValueError(
                "neftune_noise_alpha needs the embeddings of whole rows on the device; use it without offload=True"
            )
        given = input_ids if inputs_embeds is None else inputs_embeds
        is_text = torch.ones(given.shape[:2], dtype=torch.bool).flatten()
        for places, _ in parts:
            is_text[places] = False
        text_places = is_text.nonzero()[:, 0]
        text = given.flatten(0, 1)[to_device(text_places, given.device)]
        text = table(text[None])[0] if inputs_embeds is None else text
        places, values = zip(*parts, (text_places, text.cpu()), strict=True)
        shape = *given.shape[:2], text.shape[-1]
        whole = Borrowed(0).empty(shape, text.dtype)
        return _Interleave.apply(whole, True, places, *values)

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


def real_frames(pixels, counts):
    """(batch, frames, 3, height, width) without the padding frames of rows with fewer: (all real frames, ...)."""
    if min(counts) == pixels.shape[1]:
        return pixels.flatten(0, 1)
    return torch.cat([row[:count] for row, count in zip(pixels, counts, strict=True)])


def refuse_placeholders(input_ids, ids_on_host, token_id, name):
    # a single id is a token being generated, which a model may get wrong
    if input_ids is None or input_ids.shape[1] == 1:
        return
    if ids_on_host is None:  # a graph cannot branch on what the ids are, but it can refuse them
        message = f"input_ids has placeholders for {name}, but no {name} was given"
        torch._assert_async(~(input_ids == token_id).any(), message)
    elif count := int((ids_on_host == token_id).sum()):
        raise ValueError(
            f"input_ids has {count} placeholders for {name}, but no {name} was given; "
            "prepare both with the same processor call"
        )


class _Interleave(torch.autograd.Function):
    """Rows into their places of a sequence, in place where `whole` needs no gradient.

    `whole.flatten(0, 1)[places[i]] = values[i]`
    """

    @staticmethod
    def forward(ctx, whole, in_place, places, *values):
        ctx.places, ctx.dtypes = places, [value.dtype for value in values]
        out = whole if in_place else whole.clone()
        if in_place:
            ctx.mark_dirty(whole)
        for where, value in zip(places, values, strict=True):
            out.view(-1, out.shape[-1]).index_copy_(0, where, value.to(out.dtype))
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        grad_whole, rows = None, grad.flatten(0, 1)
        if ctx.needs_input_grad[0]:
            grad_whole = grad.clone(memory_format=torch.contiguous_format)
            for where in ctx.places:
                grad_whole.view(rows.shape).index_fill_(0, where, 0)
        wanted = zip(ctx.places, ctx.dtypes, ctx.needs_input_grad[3:], strict=True)
        return grad_whole, None, None, *(rows[where].to(dtype) if need else None for where, dtype, need in wanted)
