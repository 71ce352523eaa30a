"""The whole past of a Mamba-2: a state of fixed size per layer, and the cache that holds them all."""

from typing import NamedTuple

import torch
from torch.utils._pytree import SequenceKey, register_pytree_node


class LayerState(NamedTuple):
    """The past of a layer: conv_state (batch, conv_kernel - 1, conv_dim), ssm_state (batch, heads, head_dim, state)."""

    conv_state: torch.Tensor
    ssm_state: torch.Tensor


class OwnLayerState(LayerState):
    """A `LayerState` that nobody else holds: a decode step may write it in place."""

    __slots__ = ()


class Mamba2Cache:
    """The states of all layers after the tokens seen so far: what `cache` holds, always of one size.

    Args:
        layers: one `LayerState` per layer.
        num_tokens: tokens seen so far, padding included.
    """

    is_compileable = False  # asked by `generate`; see `compile_steps`
    is_croppable = False

    def __init__(self, layers, num_tokens=0):
        self.layers = list(layers)
        self.num_tokens = num_tokens

    @property
    def num_tokens(self):
        """Kept as a tensor, so that a compiled or exported step serves for any length of the past."""
        return int(self._seen)

    @num_tokens.setter
    def num_tokens(self, value):
        self._seen = torch.as_tensor(value, device="cpu")

    def advance(self, num_tokens):
        """Count so many more tokens as seen."""
        self._seen = self._seen + num_tokens

    @property
    def is_linear(self):
        """One True per layer: none keeps keys and values."""
        return [True] * len(self.layers)

    def get_seq_length(self, layer_idx=0):
        """Tokens seen so far."""
        return self.num_tokens

    def copy(self):
        """A cache that can go its own way; the states themselves are shared, and from now on not written in place."""
        self.share()
        return Mamba2Cache(self.layers, self._seen)

    def own(self):
        """Decode steps may write the states in place from now on: the caller knows that nobody else holds them."""
        if not all(isinstance(layer, OwnLayerState) for layer in self.layers):
            self.layers = [OwnLayerState(*layer) for layer in self.layers]
            if self.is_compileable:  # a captured step finds them where they were
                for tensor in (tensor for layer in self.layers for tensor in layer):
                    torch._dynamo.mark_static_address(tensor, guard=False)

    def compile_steps(self):
        """`generate` may compile or capture the decode step: tokens are counted on the device, where all else is."""
        self.is_compileable = True
        self._seen = self._seen.to(self.layers[0].ssm_state.device)

    def share(self):
        """The states may be held by others from now on, and are replaced, never written."""
        if any(isinstance(layer, OwnLayerState) for layer in self.layers):
            self.layers = [LayerState(*layer) for layer in self.layers]

    @staticmethod
    def joined(caches):
        """The rows of several caches as one batch."""
        layers = [
            LayerState(*(torch.cat(states) for states in zip(*layer, strict=True)))
            for layer in zip(*(cache.layers for cache in caches), strict=True)
        ]
        return Mamba2Cache(layers, caches[0]._seen)

    def reorder_cache(self, beam_idx):
        """Keep the rows `beam_idx` (beams,) of the batch, in that order, in place."""
        self.layers = [type(layer)(*(s.index_select(0, beam_idx.to(s.device)) for s in layer)) for layer in self.layers]

    def batch_repeat_interleave(self, repeats):
        """Repeat each row of the batch `repeats` times, in place."""
        self.layers = [LayerState(*(s.repeat_interleave(repeats, dim=0) for s in layer)) for layer in self.layers]

    @property
    def num_bytes(self):
        return sum(state.nbytes for layer in self.layers for state in layer)


# Lets `torch.export` and torch's other tools take the states apart.
def _parts(cache):
    return [cache._seen, *(list(layer) for layer in cache.layers)], None


register_pytree_node(
    Mamba2Cache,
    _parts,
    lambda parts, _: Mamba2Cache([LayerState(*layer) for layer in list(parts)[1:]], next(iter(parts))),
    serialized_type_name=f"{__name__}.Mamba2Cache",
    flatten_with_keys_fn=lambda cache: ([(SequenceKey(i), part) for i, part in enumerate(_parts(cache)[0])], None),
)
