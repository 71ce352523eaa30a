"""The loss, a chunk of tokens at a time, through the head as a module: whatever wraps or replaces the head acts.

It is one more loop over the primitive (`checkpointing`): a block without a state, whose cells are chunks of tokens. So
logits exist for one chunk only, forward and backward, and the gradient of the head is summed in float32.
"""

from torch import nn
from torch.nn import functional as F

from .autocast import autocast_dtype, autocast_to
from .checkpoint_plan import CheckpointPlan
from .checkpointing import run_checkpointed
from .host_copies import to_device
from .sharded_parameters import run_gathered


class TokenLosses(nn.Module):
    """Head and cross-entropy as a block: (1, tokens, hidden) and the targets (1, tokens) -> (1, tokens, 1) float32."""

    def __init__(self, head):
        super().__init__()
        self.head = head

    def forward(self, hidden_states, state, targets):
        logits = self.head(hidden_states).float()
        return F.cross_entropy(logits[0], targets[0], reduction="none")[None, :, None], state


def head_loss(head, hidden_states, targets, chunk_size, num_items_in_batch=None):
    """Cross-entropy in float32, computed again in the backward pass.

    Args:
        head: module, (..., hidden) -> (..., vocabulary).
        hidden_states: (supervised, hidden). targets: (supervised,) int64, on any device.
        chunk_size: tokens whose logits exist at a time.
        num_items_in_batch: divides the sum; None for the number of targets.
    """
    if targets.numel() == 0:
        # nothing supervised: a zero in which all takes part, and what is sharded is gathered as by the other processes
        (zero,) = run_gathered([head], lambda hidden_states: (head(hidden_states).float().sum(),), hidden_states)
        return zero
    device = hidden_states.device
    plan = CheckpointPlan("sequence_major", layer_interval=1, sequence_interval=chunk_size, offload=False)
    # autocast may not remember the head's weight as it casts it here, where there is no graph
    with autocast_to(device.type, autocast_dtype(device.type), cache_enabled=False):
        losses, _ = run_checkpointed(
            [TokenLosses(head)], plan, hidden_states[None], [()], to_device(targets, device)[None], device=device
        )
    return losses.sum() / (targets.numel() if num_items_in_batch is None else num_items_in_batch)
