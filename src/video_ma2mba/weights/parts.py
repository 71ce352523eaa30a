"""The parts of a Video-Ma2mba, read from published folders: Mamba-2 language models, towers, tokenizers."""

from pathlib import Path
from typing import Any

from transformers import CLIPVisionConfig, Mamba2Config, PreTrainedConfig, PreTrainedTokenizerFast, SiglipVisionConfig

from ..loading import hub_answers, not_from_the_hub, reading
from ..registration import VideoMa2mbaConfig, VideoMa2mbaProcessor, VideoMa2mbaVideoProcessor
from .checkpoint_reader import read_json

DEFAULT_TOKENIZER = "EleutherAI/gpt-neox-20b"  # of all state-spaces/mamba2-*

# mamba_ssm's `Mamba2` arguments -> transformers' fields, with mamba_ssm's defaults.
_SSM_FIELDS = {
    "d_state": ("state_size", 128),
    "d_conv": ("conv_kernel", 4),
    "expand": ("expand", 2),
    "headdim": ("head_dim", 64),
    "ngroups": ("n_groups", 1),
    "bias": ("use_bias", False),
    "conv_bias": ("use_conv_bias", True),
    "chunk_size": ("chunk_size", 256),
}
_SSM_FIXED = {"layer": "Mamba2", "rmsnorm": True, "norm_before_gate": False, "D_has_hdim": False}
_SSM_OF_INITIALISATION = {"A_init_range", "dt_min", "dt_max", "dt_init_floor", "use_mem_eff_path"}
_LANGUAGE_FIXED = {"d_intermediate": 0, "attn_layer_idx": [], "rms_norm": True}

_IMAGE_STATISTICS = {  # where the tower's folder has no preprocessor_config.json
    "clip_vision_model": ([0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]),
    "siglip_vision_model": ([0.5] * 3, [0.5] * 3),
}
_RESIZE_MODES = {"clip_vision_model": "crop", "siglip_vision_model": "squash"}  # as each was trained


def fetch(name: str, patterns: tuple[str, ...] = ("*.json", "*.safetensors")) -> Path:
    """A folder as it is, or a Hub repository's files of these patterns; `.bin` weights where it has no others.

    Raises:
        ValueError: neither a folder nor something that the Hub gives out.
    """
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    hub_answers()
    try:
        folder = Path(snapshot_download(name, allow_patterns=list(patterns)))
        if "*.safetensors" in patterns and not list(folder.glob("*.safetensors")):
            folder = Path(snapshot_download(name, allow_patterns=["*.json", "pytorch_model*.bin"]))
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        raise ValueError(not_from_the_hub(name)) from error
    return folder


def needed(config: dict, field: str, folder: Path):
    """A field of a config, or a ValueError that names it."""
    if field not in config:
        raise ValueError(f"{folder / 'config.json'}: the field {field} is missing; add it")
    return config[field]


def check_fixed(config: dict, fixed: dict, folder: Path) -> None:
    """Refuse settings that this model has no counterpart of; absent ones have the fixed value."""
    for field, value in fixed.items():
        if config.get(field, value) != value:
            raise ValueError(f"{folder / 'config.json'}: {field}={config[field]!r} is not supported, only {value!r}")


def state_spaces_config(config: dict, num_embeddings: int, folder: Path) -> Mamba2Config:
    """Translate a config of state-spaces/mamba2-*. The rows of the embedding table decide the vocabulary."""
    check_fixed(config, _LANGUAGE_FIXED, folder)
    hidden_size, ssm = needed(config, "d_model", folder), dict(needed(config, "ssm_cfg", folder))
    if "n_groups" in config:
        ssm.setdefault("ngroups", config["n_groups"])
    if ssm.get("layer") != "Mamba2":
        raise ValueError(f"{folder / 'config.json'}: ssm_cfg.layer is {ssm.get('layer')!r}, this model needs 'Mamba2'")
    check_fixed(ssm, _SSM_FIXED, folder)
    if unknown := set(ssm) - _SSM_FIELDS.keys() - _SSM_FIXED.keys() - _SSM_OF_INITIALISATION:
        raise ValueError(f"{folder / 'config.json'}: no counterpart of ssm_cfg.{', ssm_cfg.'.join(sorted(unknown))}")
    vocab_size, multiple = needed(config, "vocab_size", folder), config.get("pad_vocab_size_multiple", 1)
    if num_embeddings not in (vocab_size, -(-vocab_size // multiple) * multiple):
        raise ValueError(
            f"{folder}: the embedding table has {num_embeddings} rows, config.json says vocab_size={vocab_size} padded "
            f"to a multiple of {multiple}"
        )
    fields = {theirs: ssm.get(ours, default) for ours, (theirs, default) in _SSM_FIELDS.items()}
    return Mamba2Config(
        hidden_size=hidden_size,
        num_hidden_layers=needed(config, "n_layer", folder),
        num_heads=hidden_size * fields["expand"] // fields["head_dim"],
        vocab_size=num_embeddings,
        residual_in_fp32=config.get("residual_in_fp32", True),
        tie_word_embeddings=config.get("tie_embeddings", True),
        layer_norm_epsilon=1e-5,
        **fields,
    )


def language_config(folder: Path, num_embeddings: int) -> Mamba2Config:
    """The config of a Mamba-2 language model in the format of state-spaces or of transformers."""
    config = read_json(folder, "config.json")
    model_type = config.get("model_type")
    if model_type == "mamba2":
        with reading(folder, "Mamba2Config"):
            return Mamba2Config.from_pretrained(folder)
    if model_type is not None:
        raise ValueError(f"{folder}: a model of type {model_type!r}, not a Mamba-2 language model")
    return state_spaces_config(config, num_embeddings, folder)


def vision_config(folder: Path) -> CLIPVisionConfig | SiglipVisionConfig:
    """The tower's config, from the folder of a whole CLIP or SigLIP or of its tower alone."""
    model_type = read_json(folder, "config.json").get("model_type")
    with reading(folder, "the tower's config"):
        if model_type in ("clip", "clip_vision_model"):
            return CLIPVisionConfig.from_pretrained(folder)
        if model_type in ("siglip", "siglip_vision_model"):
            return SiglipVisionConfig.from_pretrained(folder)
    raise ValueError(f"{folder}: a model of type {model_type!r}; a tower must be CLIP or SigLIP")


def image_statistics(tower: PreTrainedConfig, folder: Path | None) -> dict[str, Any]:
    """image_mean and image_std: those of the tower's folder, or else of its family."""
    mean, std = _IMAGE_STATISTICS[tower.model_type]
    if folder is not None and (folder / "preprocessor_config.json").is_file():
        stated = read_json(folder, "preprocessor_config.json")
        mean, std = stated.get("image_mean", mean), stated.get("image_std", std)
    return {"image_mean": mean, "image_std": std}


def load_tokenizer(name: str | None, language_model: Path) -> PreTrainedTokenizerFast:
    """The tokenizer of a folder or a Hub repository; None: that beside the language model, or else GPT-NeoX's."""
    if name is None:
        name = str(language_model) if (language_model / "tokenizer.json").is_file() else DEFAULT_TOKENIZER
    folder = fetch(name, ("tokenizer*.json", "special_tokens_map.json"))
    if not (folder / "tokenizer.json").is_file():
        raise ValueError(f"{name}: there is no tokenizer.json; name a tokenizer with --tokenizer")
    with reading(name, "the tokenizer"):
        tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
        tokenizer("?")  # its settings are looked at when they are first used
        return tokenizer


def put_together(
    language: Mamba2Config, tower: PreTrainedConfig, tower_folder: Path | None, tokenizer: PreTrainedTokenizerFast,
    pool_stride: int = 2, **fields: Any,
) -> tuple[VideoMa2mbaConfig, VideoMa2mbaProcessor]:  # fmt: skip
    """One config of the parts, whose ids come from the tokenizer; and a processor of frames as the tower saw them.

    Raises:
        ValueError: the tokenizer, with its placeholders, has more tokens than the vocabulary has rows.
    """
    statistics = image_statistics(tower, tower_folder)
    video_processor = VideoMa2mbaVideoProcessor(
        size=tower.image_size, resize_mode=_RESIZE_MODES[tower.model_type], **statistics
    )
    processor = VideoMa2mbaProcessor(tokenizer, video_processor, tower.patch_size, pool_stride)
    if len(tokenizer) > language.vocab_size:
        raise ValueError(
            f"the tokenizer has {len(tokenizer)} tokens with the placeholders, the language model "
            f"{language.vocab_size} rows: they do not belong together; name another with --tokenizer"
        )
    for name in ("bos", "eos", "pad"):
        setattr(language, f"{name}_token_id", getattr(tokenizer, f"{name}_token_id"))
    config = VideoMa2mbaConfig(
        text_config=language, vision_config=tower, image_token_id=processor.image_token_id,
        video_token_id=processor.video_token_id, spatial_pool_stride=pool_stride,
        tie_word_embeddings=language.tie_word_embeddings, **statistics, **fields,
    )  # fmt: skip
    return config, processor
