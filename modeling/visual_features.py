"""The visual half of the model: frames through tower, pooling and projector (paper, section 3.1)."""

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
from .host_copies import wait_for
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
