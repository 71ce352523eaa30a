"""Arguments that no forward pass may swallow: neutral values are taken, the rest is refused by name with the remedy."""

import torch

# What says where packed samples begin; a state knows no such border.
_PACKED = ("position_ids", "seq_idx")


def refuse_unknown(kwargs, function):
    """TypeError for what is left in `kwargs`, as Python has it for a function without `**kwargs`."""
    if kwargs:
        names = ", ".join(repr(name) for name in kwargs)
        raise TypeError(f"{function}() got unexpected keyword argument(s) {names}")


def check_arguments(kwargs, function, attention_mask, num_tokens):
    """Take what means nothing here from `kwargs`: `position_ids` and `seq_idx` without a border, no attentions.

    Args:
        kwargs: of `function`, beyond its own arguments; emptied.
        attention_mask: (batch, tokens) or None. num_tokens: of the input.

    Raises:
        ValueError: packed rows, or attentions asked for. TypeError: an unknown argument.
    """
    if kwargs.pop("output_attentions", None):
        raise ValueError(
            "output_attentions: Mamba-2 has no attention; the tower's are given by get_video_features(..., "
            "output_attentions=True)"
        )
    for name in _PACKED:
        values = kwargs.pop(name, None)
        if values is not None and _has_border(values, name == "position_ids", attention_mask, num_tokens):
            raise ValueError(
                f"{name} starts anew within a row: packed samples (as of DataCollatorWithFlattening) would run into "
                "one another, since the state goes on from token to token; give each sample a row of its own, padded"
            )
    refuse_unknown(kwargs, function)


def _has_border(values, counts_up, attention_mask, num_tokens):
    """Whether (batch, tokens) positions or sample numbers break off between two real tokens of a row."""
    if values.ndim != 2 or values.shape[1] != num_tokens:
        return True
    steps = values.diff(dim=1)
    if not (steps != int(counts_up)).any():
        return False
    if attention_mask is None:
        return True
    # 0..n-1 by the mask: one up at each real token, whatever stands at padding
    real = attention_mask[:, -num_tokens:].bool()
    for row, mask in zip(values.expand(len(real), -1), real, strict=True):
        if (row[mask].diff() != int(counts_up)).any():
            return True
    return False


def hidden_states_wanted(asked, config, checkpointing):
    """Which hidden states are to be given out: True for those of all layers, a list of some, or False.

    Raises:
        ValueError: they are not kept under gradient checkpointing.
    """
    wanted = getattr(config, "output_hidden_states", False) if asked is None else asked
    if wanted and checkpointing:
        raise ValueError(
            "output_hidden_states=True does not go with gradient checkpointing, which keeps none of them; leave it "
            "out, or call gradient_checkpointing_disable() first"
        )
    return wanted or False


def chosen(every_layer, wanted):
    """The hidden states as a tuple, None in place of those that a list does not name."""
    if wanted is True:
        return tuple(every_layer)
    indices = {index % len(every_layer) for index in wanted}
    return tuple(states if index in indices else None for index, states in enumerate(every_layer))


def num_logits_bytes(batch, num_tokens, vocab_size):
    """Bytes of float32 logits."""
    return batch * num_tokens * vocab_size * torch.float32.itemsize
