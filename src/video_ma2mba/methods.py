"""The checkpointing methods that benchmarks and plans compare, as options of `gradient_checkpointing_enable`."""

from typing import Any

METHODS: dict[str, dict[str, Any] | None] = {
    "off": None,
    "per layer": {"axes": ("layer",)},
    "sqrt": {"axes": ("layer",), "layer_interval": 8},
    "layer_major": {"order": "layer_major"},
    "sequence_major": {"order": "sequence_major"},
    "sequence_major + offload": {"order": "sequence_major", "offload": True},
}
