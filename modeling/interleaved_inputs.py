"""The input of a batch: text through the table, and in the places of its placeholders frames through the tower."""

import torch

from .host_copies import on_host, to_device, wait_for
from .host_memory import Borrowed


class InterleavedInputs:
    """Ids or embeddings, and the frames that their placeholders stand for.

    Rows may hold padding frames at the end; placeholders say how many are real. In embeddings a placeholder is found by
    its embedding.

    Args:
        model: `VideoMa2mbaModel`.
        input_ids: (batch, tokens) int64; either these or inputs_embeds (batch, tokens, hidden), the other is None.
        ids_on_host: the ids on the CPU; None under `torch.compile`, and for a single token without frames.
        pixels_by_name: `pixel_values_videos` and `pixel_values`, as of the model's forward.
        order: (batch, tokens) int64, in which the tokens of each row are wanted; None as they are.

    Raises:
        ValueError: placeholders and frames do not fit.
    """

    def __init__(self, model, input_ids, ids_on_host, inputs_embeds, pixels_by_name, order=None):
        self.model, self.table, self.has_ids = model, model.get_input_embeddings(), inputs_embeds is None
        self.text = input_ids if self.has_ids else inputs_embeds
        self.device = self.text.device
        self.kinds = []  # all real frames, and the token of these that stands at a position, -1 for none
        token_ids = {"pixel_values_videos": model.config.video_token_id, "pixel_values": model.config.image_token_id}
        for name, token_id in token_ids.items():
            pixels = pixels_by_name[name]
            if pixels is None:
                _refuse_placeholders(input_ids, ids_on_host, token_id, name)
                continue
            if self.has_ids:
                is_placeholder = ids_on_host == token_id
            else:
                one = self.table(torch.full((1, 1), token_id, device=self.device))
                (is_placeholder,) = on_host((inputs_embeds == one.to(inputs_embeds)).all(-1))
            frames = _real_frames(pixels, self._frames_per_row(is_placeholder, pixels, name))
            numbers = is_placeholder.flatten().cumsum(0).view_as(is_placeholder) - 1
            numbers = torch.where(is_placeholder, numbers, -1)
            self.kinds.append((frames, numbers if order is None else numbers.gather(1, order)))
        if order is not None:
            order = to_device(order, self.device)
            self.text = self.text.gather(1, order if self.has_ids else order[..., None].expand_as(self.text))

    def embed(self, span=None, to_host=False, live=None):
        """
        Args:
            span: slice of tokens; None for all.
            to_host: gather the result in host memory.
            live: (batch, span) bool on the CPU, the tokens that get a gradient: frames with none build no graph. None:
                all get one.

        Returns:
            (batch, span, hidden); embeddings without frames as they are.

        Raises:
            ValueError: NEFTune, whose noise is of whole rows on the device.
        """
        if not self.has_ids and not self.kinds:
            return self.text if span is None else self.text[:, span]
        is_part = to_host or span is not None
        if is_part and self.has_ids and getattr(self.table, "neftune_noise_alpha", None) is not None:
            raise ValueError(
                "neftune_noise_alpha needs the embeddings of whole rows on the device; use it without offload=True and "
                "without gradient_horizon"
            )
        span = slice(None) if span is None else span
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
        text, parts = self.text[:, span], self.model._encode_parts(parts, self.device, to_host)
        return self._on_host(text, parts) if to_host else self._on_device(text, parts)

    def _frames_of(self, frames, numbers):
        """The frames of the tokens `numbers` (tokens,), each once, and what picks these tokens from their features."""
        per_frame = self.model.config.tokens_per_frame
        if len(numbers) == len(frames) * per_frame and bool((numbers[1:] > numbers[:-1]).all()):
            return frames, lambda values: values
        wanted, place = (numbers // per_frame).unique(return_inverse=True)
        if len(wanted) < len(frames):
            frames = frames[to_device(wanted, frames.device)]
        place = place * per_frame + numbers % per_frame
        return frames, lambda values: values[to_device(place, values.device)]

    def _on_device(self, text, parts):
        """Text, as ids or embeddings, with other embeddings in the places of their masks: (batch, tokens, hidden).

        Args:
            parts: pairs of places (rows,) int64 on the CPU in the flattened input, and what stands there.
        """
        text = self.table(text) if self.has_ids else text
        if not parts:
            return text
        places, values = zip(*parts, strict=True)
        places = tuple(to_device(one, text.device) for one in places)
        return _Interleave.apply(text, self.has_ids and not text.requires_grad, places, *values)

    def _on_host(self, text, parts):
        """As `_on_device`, in host memory, so that nothing as long as the input is ever on the device."""
        is_text = torch.ones(text.shape[:2], dtype=torch.bool).flatten()
        for places, _ in parts:
            is_text[places] = False
        text_places = is_text.nonzero()[:, 0]
        words = text.flatten(0, 1)[to_device(text_places, text.device)]
        words = self.table(words[None])[0] if self.has_ids else words
        words, device = words.to("cpu", non_blocking=True), words.device
        wait_for(device)
        places, values = zip(*parts, (text_places, words), strict=True)
        whole = Borrowed(0).empty((*text.shape[:2], words.shape[-1]), words.dtype)
        return _Interleave.apply(whole, True, places, *values)

    def _frames_per_row(self, is_placeholder, pixels, name):
        """How many real frames each row has, as its placeholders say. Raises ValueError where they do not fit."""
        if pixels.ndim != 5:
            raise ValueError(f"{name} must be (batch, frames, 3, height, width), got shape {tuple(pixels.shape)}")
        tokens_per_frame = self.model.config.tokens_per_frame
        counts = is_placeholder.sum(dim=1).tolist()
        num_frames = [count // tokens_per_frame for count in counts]
        whole = all(count % tokens_per_frame == 0 for count in counts)
        if not whole or len(counts) != pixels.shape[0] or max(num_frames) != pixels.shape[1]:
            given, remedy = "input_ids", "prepare both with the same processor call"
            if not self.has_ids:
                given = "inputs_embeds"
                remedy = "frames need input_ids, or embeddings that still hold those of the placeholders"
            raise ValueError(
                f"the rows of {given} have {counts} placeholders for {name} at {tokens_per_frame} per frame, but "
                f"{name} holds {pixels.shape[0]} row(s) of {pixels.shape[1]} frame(s); {remedy}"
            )
        return num_frames


def _real_frames(pixels, counts):
    """(batch, frames, 3, height, width) without the padding frames of rows with fewer: (all real frames, ...)."""
    if min(counts) == pixels.shape[1]:
        return pixels.flatten(0, 1)
    return torch.cat([row[:count] for row, count in zip(pixels, counts, strict=True)])


def _refuse_placeholders(input_ids, ids_on_host, token_id, name):
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
