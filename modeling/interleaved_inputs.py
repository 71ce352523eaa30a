"""The input of a batch, embedded a span of tokens at a time: for who watches first and trains then."""

import torch

from .host_copies import to_device
from .visual_features import real_frames, refuse_placeholders


class WholeEmbeddings:
    """Embeddings of all tokens, which are there already: (batch, tokens, hidden), on any device."""

    def __init__(self, inputs_embeds):
        self.inputs_embeds, self.device = inputs_embeds, inputs_embeds.device

    def embed(self, span, to_host=False, live=None):
        """As of `InterleavedInputs`."""
        return self.inputs_embeds[:, span]


class InterleavedInputs:
    """Ids, and the frames that their placeholders stand for.

    Args:
        model: `VideoMa2mbaModel`.
        input_ids: (batch, tokens) int64. ids_on_host: the same on the CPU.
        pixels_by_name: `pixel_values_videos` and `pixel_values`, as of the model's forward.
        order: (batch, tokens) int64 on the CPU, in which the tokens of each row are wanted; None as they are.

    Raises:
        ValueError: placeholders and frames do not fit, or NEFTune, whose noise is of whole rows.
    """

    def __init__(self, model, input_ids, ids_on_host, pixels_by_name, order=None):
        if getattr(model.get_input_embeddings(), "neftune_noise_alpha", None) is not None:
            raise ValueError("neftune_noise_alpha needs the embeddings of whole rows; use it without gradient_horizon")
        self.model, self.device = model, input_ids.device
        self.input_ids = input_ids if order is None else input_ids.gather(1, to_device(order, input_ids.device))
        self.kinds = []  # all real frames, and the token of these that stands at a position, -1 for none
        for name, token_id in model._token_ids.items():
            is_placeholder, pixels = ids_on_host == token_id, pixels_by_name[name]
            if pixels is None:
                refuse_placeholders(input_ids, ids_on_host, token_id, name)
                continue
            frames = real_frames(pixels, model._frames_per_row(is_placeholder, pixels, name))
            numbers = is_placeholder.flatten().cumsum(0).view_as(ids_on_host) - 1
            numbers = torch.where(is_placeholder, numbers, -1)
            self.kinds.append((frames, numbers if order is None else numbers.gather(1, order)))

    def embed(self, span, to_host=False, live=None):
        """
        Args:
            span: slice of tokens. to_host: gather the result in host memory.
            live: (batch, span) bool on the CPU, the tokens that get a gradient: frames with none build no graph. None:
                all get one.

        Returns:
            (batch, span, hidden).
        """
        per_frame, parts = self.model.config.tokens_per_frame, []
        for frames, numbers in self.kinds:
            numbers = numbers[:, span]
            here = numbers >= 0
            rests = torch.zeros_like(here)
            if live is not None:
                of_frame = numbers // per_frame
                rests = here & ~torch.isin(of_frame, of_frame[here & live])
            for mask, builds_graph in ((here & ~rests, True), (rests, False)):
                if mask.any():
                    places = mask.flatten().nonzero()[:, 0]
                    parts.append((places, builds_graph, *self._frames_of(frames, numbers[mask])))
        input_ids = self.input_ids[:, span]
        return self.model._interleave(input_ids, None, self.model._encode_parts(parts, self.device, to_host), to_host)

    def _frames_of(self, frames, numbers):
        """The frames of the tokens `numbers` (tokens,), each once, and what picks these tokens from their features."""
        per_frame = self.model.config.tokens_per_frame
        wanted, place = (numbers // per_frame).unique(return_inverse=True)
        if len(wanted) < len(frames):
            frames = frames[to_device(wanted, frames.device)]
        place = place * per_frame + numbers % per_frame
        whole = len(place) == len(frames) * per_frame and bool((place[1:] > place[:-1]).all())
        return frames, lambda values: values if whole else values[to_device(place, values.device)]
