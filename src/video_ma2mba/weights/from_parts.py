"""An untrained Video-Ma2mba from a published language model and a published tower, with a fresh projector."""

import torch

from ..modeling.modeling_video_ma2mba import VideoMa2mbaProjector
from ..registration import VideoMa2mbaConfig
from . import parts
from .checkpoint_reader import CheckpointReader
from .conversion import Conversion
from .mapping import MAMBA2_RENAMES, TEXT_SIDE_DROPS, TOWER_RENAMES, map_tensors, tower_drops

_PROJECTOR = "model.multi_modal_projector."


def read_parts(language_model: str, vision_model: str, tokenizer: str | None = None, seed: int = 0) -> Conversion:
    """Plan the model that stage 1 of the training starts from (paper, section 4.1).

    Args:
        language_model: folder or Hub id, in the format of state-spaces or of transformers' Mamba2.
        vision_model: folder or Hub id of a CLIP or SigLIP, whole or the tower alone.
        tokenizer: folder or Hub id; by default the language model's where it brings one, else GPT-NeoX's.
        seed: of the projector's weights.

    Raises:
        ValueError: parts that are not what they should be, or do not fit together.
    """
    language_folder, vision_folder = parts.fetch(language_model), parts.fetch(vision_model)
    language = map_tensors(CheckpointReader(language_folder), MAMBA2_RENAMES)
    table = language.names.get("model.language_model.embeddings.weight")
    if table is None:
        raise ValueError(f"{language_folder}: there is no backbone.embedding.weight: not a Mamba-2 language model")
    text_config = parts.language_config(language_folder, language.reader.shapes[table][0])

    tower = parts.vision_config(vision_folder)
    tokens = parts.load_tokenizer(tokenizer, language_folder)
    config, processor = parts.put_together(text_config, tower, vision_folder, tokens)

    drops = (*tower_drops(config.num_vision_layers), *TEXT_SIDE_DROPS)
    vision = map_tensors(CheckpointReader(vision_folder), TOWER_RENAMES, drops)
    return Conversion(config, processor, [language, vision], fresh=_fresh_projector(config, seed))


def _fresh_projector(config: VideoMa2mbaConfig, seed: int) -> dict[str, torch.Tensor]:
    """As the model initialises its projector: uniform within 1 / sqrt(inputs), biases zero; float32."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        projector = VideoMa2mbaProjector(config).float()
    for linear in (projector.linear_1, projector.linear_2):
        torch.nn.init.zeros_(linear.bias)
    return {_PROJECTOR + name: tensor for name, tensor in projector.state_dict().items()}
