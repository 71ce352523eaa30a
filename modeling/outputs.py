"""What the models give out."""

from dataclasses import dataclass

import torch
from transformers.utils import ModelOutput

from .mamba2 import Mamba2Cache


@dataclass
class VideoMa2mbaOutput(ModelOutput):
    """
    Attributes:
        loss: scalar float32, where labels were given.
        logits: (batch, kept tokens, vocabulary), float32; beside a loss where they were asked for, or in eval mode
            where they are small enough.
        last_hidden_state: (batch, tokens, hidden) after the final norm; of the base model only.
        cache: `Mamba2Cache`, the states after the last token.
        hidden_states: on request, (batch, tokens, hidden) of the embeddings and after each layer: layers + 1 entries,
            the last one after the final norm.
    """

    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    last_hidden_state: torch.Tensor | None = None
    cache: Mamba2Cache | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
