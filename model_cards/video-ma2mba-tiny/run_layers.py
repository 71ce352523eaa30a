"""The one primitive of this library: layers [i:j] on tokens [a:b], starting from states.

Chunked prefill, streaming and Multi-Axis Gradient Checkpointing are loops over it. It knows nothing of Mamba-2: a block
obeys `block(hidden_states, state, mask) -> hidden_states, state`, and its state is a tuple of tensors.
"""


def run_layers(blocks, hidden_states, states, mask=None):
    """Run layers [i:j] on tokens [a:b]; differentiable in the hidden states and in the states.

    Args:
        blocks: the layers [i:j].
        hidden_states: (batch, tokens, hidden) of tokens [a:b], entering layer i.
        states: one state per block, left by the tokens before a.
        mask: (batch, tokens) bool, True for real tokens, or None.

    Returns:
        (batch, tokens, hidden) leaving layer j - 1, and the list of states after token b - 1.
    """
    new_states = []
    for block, state in zip(blocks, states, strict=True):
        hidden_states, state = block(hidden_states, state, mask)
        new_states.append(state)
    return hidden_states, new_states


def kept_tokens(keep, span):
    """Which of a chunk's tokens the caller asked for.

    Args:
        keep: (batch, tokens) int64 on the CPU: the row of the result that a token's hidden state becomes, -1 for none.
        span: the slice of tokens that is the chunk.

    Returns:
        (kept,) positions in the chunk's flattened (batch * tokens) hidden states, and (kept,) rows of the result.
    """
    rows = keep[:, span].flatten()
    positions = (rows >= 0).nonzero()[:, 0]
    return positions, rows[positions]
