"""The format of the model's authors, `llava_mamba`: mamba_ssm's backbone, a tower and a projector under `mm_model`."""

from pathlib import Path

from transformers import CLIPVisionConfig, PreTrainedConfig, SiglipVisionConfig

from . import parts
from .checkpoint_reader import CheckpointReader, read_json
from .conversion import Conversion
from .mapping import MAMBA2_RENAMES, TOWER_RENAMES, map_tensors, tower_drops

# The towers that the authors name, which shapes alone do not tell whole: heads, activation, epsilon.
_KNOWN_TOWERS = {
    "clip-vit-large-patch14-336": lambda: CLIPVisionConfig(
        hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16, image_size=336,
        patch_size=14, projection_dim=768,
    ),
    "siglip-so400m-patch14-384": lambda: SiglipVisionConfig(
        hidden_size=1152, intermediate_size=4304, num_hidden_layers=27, num_attention_heads=16, image_size=384,
        patch_size=14,
    ),
}  # fmt: skip

_FIXED = {  # what this model does, as the authors' config says it
    "mm_projector_type": "mlp2x_gelu",
    "mm_spatial_pool_mode": "bilinear",
    "mm_patch_merge_type": "flat",
    "mm_use_im_start_end": False,
    "mm_use_im_patch_token": False,
}
_TOWER = r"mm_model\.vision_tower\.vision_tower\."
_RENAMES = (
    *MAMBA2_RENAMES,
    *((_TOWER + pattern, new) for pattern, new in TOWER_RENAMES),
    (r"mm_model\.mm_projector\.0\.(weight|bias)", r"model.multi_modal_projector.linear_1.\1"),
    (r"mm_model\.mm_projector\.2\.(weight|bias)", r"model.multi_modal_projector.linear_2.\1"),
)
# ReFoCUS, the authors' frame selector, shares all the rest with the model.
_SELECTOR_HEADS = (
    r"(?:key_head|query_head|value_head|value_embedding|rank_head)\..+|value_embedding|value_head_scale|logit_scale"
)


def read_llava_mamba(source: str, tokenizer: str | None = None, vision_model: str | None = None) -> Conversion:
    """Plan the conversion of a checkpoint of type `llava_mamba`.

    Args:
        source: folder or Hub id.
        tokenizer: folder or Hub id; by default the source's where it brings one, else GPT-NeoX's.
        vision_model: folder or Hub id with the tower's config; needed where the source names a tower that is not among
            the authors' two.

    Raises:
        ValueError: a config without a needed field or with one that this model has no counterpart of, or tensors that
            are left over.
    """
    folder = parts.fetch(source)
    config = read_json(folder, "config.json")
    if (model_type := parts.needed(config, "model_type", folder)) != "llava_mamba":
        raise ValueError(f"{folder}: a model of type {model_type!r}, not 'llava_mamba'")
    for field in ("mm_projector_type", "mm_spatial_pool_mode"):
        parts.needed(config, field, folder)
    parts.check_fixed(config, _FIXED, folder)

    tower, tower_folder = _tower(parts.needed(config, "mm_vision_tower", folder), vision_model, folder)
    stated_width = config.get("mm_hidden_size", tower.hidden_size)
    if stated_width != tower.hidden_size:
        raise ValueError(
            f"{folder / 'config.json'}: mm_hidden_size={stated_width}, but its tower is {tower.hidden_size} wide"
        )
    tokens = parts.load_tokenizer(tokenizer, folder)
    reader = CheckpointReader(folder)
    prefix = _wrapper(list(reader.shapes))
    table = f"{prefix}backbone.embedding.weight"
    if table not in reader.shapes:
        raise ValueError(f"{folder}: there is no {table}")
    language = parts.state_spaces_config(config, reader.shapes[table][0], folder)
    stride = config.get("mm_spatial_pool_stride", 2)
    ours, processor = parts.put_together(
        language, tower, tower_folder, tokens, stride, **_features(config, tower, folder)
    )
    drops = [
        *((_TOWER + pattern, reason) for pattern, reason in tower_drops(ours.num_vision_layers)),
        (_SELECTOR_HEADS, "a head of the frame selector"),
    ]
    return Conversion(ours, processor, [map_tensors(reader, _RENAMES, drops, prefix)])


def _wrapper(names: list[str]) -> str:
    """What stands before every name: "" or what wrappers of a model leave behind, such as "module."."""
    for prefix in ("module.model.", "module.", "model."):
        if all(name.startswith(prefix) for name in names):
            return prefix
    return ""


def _tower(stated: str, vision_model: str | None, folder: Path) -> tuple[PreTrainedConfig, Path | None]:
    if vision_model is not None:
        tower_folder = parts.fetch(vision_model, ("*config.json",))
        return parts.vision_config(tower_folder), tower_folder
    name = str(stated).rstrip("/").rpartition("/")[2]
    if name not in _KNOWN_TOWERS:
        raise ValueError(
            f"{folder / 'config.json'}: mm_vision_tower={stated!r} is not known; name a folder or Hub id that has its "
            "config with --vision-model"
        )
    return _KNOWN_TOWERS[name](), None


def _features(config: dict, tower: PreTrainedConfig, folder: Path) -> dict:
    """Which hidden state of the tower is used, and whether a class token is dropped."""
    layer = parts.needed(config, "mm_vision_select_layer", folder)
    select = config.get("mm_vision_select_feature", "patch")
    if tower.model_type == "siglip_vision_model":
        # the authors' code deletes SigLIP's last layer and takes what then is the last, whatever the config says
        return {"vision_feature_layer": -2, "vision_feature_select_strategy": "full"}
    if select != "patch":
        raise ValueError(
            f"{folder / 'config.json'}: mm_vision_select_feature={select!r} is not supported, only 'patch'"
        )
    return {"vision_feature_layer": layer}
