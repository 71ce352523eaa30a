"""What a batch holds, embedded a span of tokens at a time: text through the table, frames through the tower."""

import torch


class GivenEmbeddings:
    """Embeddings that the caller brought: (batch, tokens, hidden)."""

    def __init__(self, inputs_embeds):
        self.inputs_embeds = inputs_embeds

    def reordered(self, order):
        """The same with the tokens of each row in this order: (batch, tokens) int64."""
        order = order.to(self.inputs_embeds.device)
        return GivenEmbeddings(self.inputs_embeds.gather(1, order[..., None].expand_as(self.inputs_embeds)))

    def embed(self, span, to_host=False, live=None):
        """As of `InterleavedInputs`."""
        return self.inputs_embeds[:, span]


class InterleavedInputs:
    """Ids, and the frames that their placeholders stand for.

    Args:
        model: `VideoMa2mbaModel`.
        input_ids: (batch, tokens) int64.
        pixel_values_videos, pixel_values: (batch, frames, 3, height, width) or None. Rows may hold padding frames at
            the end; placeholders say how many are real.

    Raises:
        ValueError: placeholders and frames do not fit.
    """

    def __init__(self, model, input_ids, pixel_values_videos, pixel_values):
        self.model, self.input_ids = model, input_ids
        self.kinds = []  # method, all real frames, and the token of these that stands at a position, -1 for none
        for name, pixels, token_id, encode in (
            ("pixel_values_videos", pixel_values_videos, model.config.video_token_id, model.get_video_features),
            ("pixel_values", pixel_values, model.config.image_token_id, model.get_image_features),
        ):
            is_placeholder = input_ids == token_id
            if pixels is None:
                # a single id is a token being generated, which a model may get wrong
                if input_ids.shape[1] > 1 and is_placeholder.any():
                    raise ValueError(
                        f"input_ids has {int(is_placeholder.sum())} placeholders for {name}, but no {name} was given; "
                        "prepare both with the same processor call"
                    )
                continue
            counts = _frames_per_row(is_placeholder, pixels, name, model.config.tokens_per_frame)
            frames = pixels.flatten(0, 1)
            if min(counts) < pixels.shape[1]:
                frames = torch.cat([row[:count] for row, count in zip(pixels, counts, strict=True)])
            numbers = is_placeholder.flatten().cumsum(0).view_as(input_ids) - 1
            self.kinds.append((encode, frames, torch.where(is_placeholder, numbers, -1)))

    def reordered(self, order):
        """The same with the tokens of each row in this order: (batch, tokens) int64."""
        other = object.__new__(InterleavedInputs)
        other.model, other.input_ids = self.model, self.input_ids.gather(1, order)
        other.kinds = [(encode, frames, numbers.gather(1, order)) for encode, frames, numbers in self.kinds]
        return other

    def embed(self, span, to_host=False, live=None):
        """
        Args:
            span: slice of tokens. to_host: gather the result in host memory.
            live: (batch, span) bool on the CPU, the tokens that get a gradient: frames with none build no graph. None:
                all get one.

        Returns:
            (batch, span, hidden).
        """
        ids, per_frame = self.input_ids[:, span], self.model.config.tokens_per_frame
        is_text, masks, values = torch.ones_like(ids, dtype=torch.bool), [], []
        for encode, frames, numbers in self.kinds:
            numbers = numbers[:, span]
            here = numbers >= 0
            is_text &= ~here
            rests = torch.zeros_like(here)
            if live is not None:
                of_frame = numbers // per_frame
                rests = here & ~torch.isin(of_frame, of_frame[here & live.to(here.device)])
            for mask, builds_graph in ((here & ~rests, True), (rests, False)):
                if mask.any():
                    with torch.set_grad_enabled(builds_graph and torch.is_grad_enabled()):
                        values.append(_encode(encode, frames, numbers[mask], per_frame, to_host))
                    masks.append(mask)
        text = self.model.get_input_embeddings()(ids[is_text])
        if not values and not to_host:
            return text.view(*ids.shape, -1)
        masks, values = [*masks, is_text], [*values, text.cpu() if to_host else text]
        masks = tuple(mask.to(values[-1].device) for mask in masks)
        return _Interleave.apply(masks, text.dtype, to_host and text.is_cuda, *values)


def _encode(encode, frames, numbers, per_frame, to_host):
    """The tokens `numbers` (tokens,) of the frames, each frame encoded once: (tokens, hidden)."""
    wanted, place = (numbers // per_frame).unique(return_inverse=True)
    if len(wanted) < len(frames):
        frames = frames[wanted.to(frames.device)]
    values = encode(frames, to_host=to_host).pooler_output.flatten(0, 1)
    place = place * per_frame + numbers % per_frame
    whole = len(place) == len(values) and bool((place[1:] > place[:-1]).all())
    return values if whole else values[place.to(values.device)]


class _Interleave(torch.autograd.Function):
    """Rows of several tensors into one sequence: `out[masks[i]] = values[i]`, each position in exactly one mask."""

    @staticmethod
    def forward(ctx, masks, dtype, pin_memory, *values):
        ctx.masks, ctx.dtypes = masks, [value.dtype for value in values]
        shape, device = (*masks[0].shape, values[0].shape[-1]), values[0].device
        out = torch.empty(shape, dtype=dtype, device=device, pin_memory=pin_memory)
        for mask, value in zip(masks, values, strict=True):
            out[mask] = value.to(dtype)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        wanted = zip(ctx.masks, ctx.dtypes, ctx.needs_input_grad[3:], strict=True)
        return None, None, None, *(grad[mask].to(dtype) if need else None for mask, dtype, need in wanted)


def _frames_per_row(is_placeholder, pixels, name, tokens_per_frame):
    if pixels.ndim != 5:
        raise ValueError(f"{name} must be (batch, frames, 3, height, width), got shape {tuple(pixels.shape)}")
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
