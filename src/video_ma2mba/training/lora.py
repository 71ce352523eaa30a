"""LoRA for Video-Ma2mba with PEFT."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from peft import LoraConfig

BACKBONE = r"language_model\.layers\.\d+\.mixer\.(in_proj|out_proj)"
PROJECTOR = r"multi_modal_projector\.linear_[12]"
TOWER = r"vision_tower\..*\.(q_proj|k_proj|v_proj|out_proj|fc1|fc2)"


def lora_config(rank: int = 16, alpha: int = 32, dropout: float = 0.05, vision_tower: bool = False) -> "LoraConfig":
    """Adapters on all linear layers of the mixers and the projector, and of the tower where asked.

    PEFT knows no targets for Mamba-2, and its plain names would reach into the tower too: hence the patterns. The
    projections are modules of their own on every backend here, so no kernel goes past an adapter of `out_proj`.

        model = get_peft_model(model, lora_config(rank=16))

    For QLoRA load the model with a `quantization_config` first; nothing else changes. No task type is named: with that
    of a causal model, PEFT's `AutoPeftModel` would look for this one among those that know no videos.
    """
    from peft import LoraConfig

    targets = [BACKBONE, PROJECTOR, *([TOWER] if vision_tower else [])]
    return LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules=rf".*({'|'.join(targets)})")
