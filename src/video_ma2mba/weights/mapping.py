"""Which tensor of another format becomes which of ours. Every one is either renamed, or dropped for a stated reason."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from .checkpoint_reader import CheckpointReader, list_names

Rules = Sequence[tuple[str, str]]

# mamba_ssm calls the table `embedding`, transformers `embeddings`; all other names are the same.
MAMBA2_RENAMES: Rules = (
    (r"backbone\.embeddings?\.weight", "model.language_model.embeddings.weight"),
    (r"backbone\.(layers\.\d+\.(?:norm|mixer)\..+|norm_f\.weight)", r"model.language_model.\1"),
    (r"lm_head\.weight", "lm_head.weight"),
)
# transformers 5 has no `vision_model.` level in its towers; files have.
TOWER_RENAMES: Rules = (
    (r"(?:vision_model\.)?((?:embeddings|pre_layrnorm|encoder)\..+)", r"model.vision_tower.\1"),
)  # fmt: skip


def tower_drops(num_layers: int) -> Rules:
    """What a CLIP or SigLIP file may hold beyond a tower of which `num_layers` layers are run."""
    used = "|".join(map(str, range(num_layers)))
    unused = rf"(?:vision_model\.)?encoder\.layers\.(?!(?:{used})\.)\d+\..+"
    return (
        (unused, "a layer after the one whose output is used"),
        (r"(?:vision_model\.)?post_layernorm\..+", "the norm after the last layer, which is not used"),
        (r"(?:vision_model\.)?head\..+", "SigLIP's pooling head, which is not used"),
        (r"(?:vision_model\.)?embeddings\.position_ids", "a counter that old files hold"),
    )


# a whole CLIP or SigLIP model
TEXT_SIDE_DROPS: Rules = (
    (r"text_model\..+|text_projection\..+", "the text side"),
    (r"visual_projection\..+|logit_scale|logit_bias", "the contrastive head"),
)


@dataclass
class Source:
    """A checkpoint and what becomes of its tensors.

    Attributes:
        names: our name -> theirs.
        dropped: their name -> why it has no place in ours.
    """

    reader: CheckpointReader
    names: dict[str, str]
    dropped: dict[str, str]


def map_tensors(reader: CheckpointReader, renames: Rules, drops: Rules = (), prefix: str = "") -> Source:
    """Apply rules of (regular expression over the whole name, replacement or reason); drops come first.

    Args:
        prefix: cut from every name that begins with it, as wrappers of a model leave it behind.

    Raises:
        ValueError: a tensor to which no rule applies, or two that become one.
    """
    source = Source(reader, {}, {})
    left_over = []
    for theirs in reader.shapes:
        name = theirs.removeprefix(prefix)
        reason = next((reason for pattern, reason in drops if re.fullmatch(pattern, name)), None)
        ours = next((re.sub(pattern, new, name) for pattern, new in renames if re.fullmatch(pattern, name)), None)
        if reason is not None:
            source.dropped[theirs] = reason
        elif ours is None:
            left_over.append(theirs)
        elif ours in source.names:
            raise ValueError(f"{reader.folder}: {theirs} and {source.names[ours]} are both {ours}")
        else:
            source.names[ours] = theirs
    if left_over:
        raise ValueError(f"{reader.folder}: no place for {list_names(left_over)}: not a tensor of this format")
    return source
