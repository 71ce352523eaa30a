"""Folders of LoRA adapters, as PEFT writes them: which model they belong to, and what the Hub needs of them."""

from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard

from ..loading import fetch_adapter, is_hub_id, load, load_model, reading
from ..processing import VideoMa2mbaProcessor
from .checkpoint_reader import read_json
from .conversion import answer_to_a_frame
from .model_card import TAGS, make_card

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
# What PEFT leaves where it has nothing to say: its own card is no card.
_UNWRITTEN = "[More Information Needed]"

_TEMPLATE = """---
{{ card_data }}
---

# {{ title }}

LoRA adapters for [{{ base }}](https://huggingface.co/{{ base }}), a Video-Ma²mba: a video language model that watches
every frame at 1 FPS.

| | |
| --- | --- |
{% for name, value in facts.items() -%}
| {{ name }} | {{ value }} |
{% endfor %}
## Use

```sh
pip install {{ torch }}    # the build for your device
pip install {{ requirements }} peft
```

```python
from peft import PeftModel
from transformers import AutoModelForImageTextToText, AutoProcessor

model = AutoModelForImageTextToText.from_pretrained("{{ base }}", trust_remote_code=True)
model = PeftModel.from_pretrained(model, "{{ repo }}")
processor = AutoProcessor.from_pretrained("{{ base }}", trust_remote_code=True)
```

That runs the code of the base model's repository. With the package `video-ma2mba` installed,
`video-ma2mba ask talk.mp4 "What is on the last slide?" --model {{ base }} --adapter {{ repo }}` asks from the command
line, and `video-ma2mba merge {{ repo }} -o merged` writes them into the weights.

## Limits

Those of the model that they adapt. Their answers were not evaluated.
"""


def is_adapter(folder: Path) -> bool:
    return (folder / CONFIG).is_file()


def base_model(adapter: str) -> str:
    """The folder or Hub id of the model that the adapters were trained on, as they name it.

    Raises:
        ValueError: there are no such adapters, or they name none.
    """
    if is_hub_id(adapter):
        fetch_adapter(adapter)
    elif not is_adapter(Path(adapter)):
        raise ValueError(f"{adapter}: there is no {CONFIG}; `train finetune-lora` writes one")
    from peft import PeftConfig

    with reading(adapter, "adapters"):
        name = PeftConfig.from_pretrained(adapter).base_model_name_or_path
    if not name:
        raise ValueError(f"{adapter}: the adapters do not name their model; say it with --model")
    return name


def render_adapter_card(
    folder: Path, repo: str, *, licence: str, base_models: list[str] | None, training: dict[str, Any] | None
) -> ModelCard:
    """The card of the adapters in `folder`, to be published as `repo`.

    Raises:
        ValueError: the model that they belong to is a folder of this machine, and no Hub id was given for it.
    """
    base = base_models[0] if base_models else base_model(str(folder))
    if Path(base).exists():
        raise ValueError(f"{folder}: the adapters name {base}, a folder here; say its Hub id with --base-model")
    config = read_json(folder, CONFIG)
    facts = {"rank": config.get("r"), "alpha": config.get("lora_alpha"), **(training or {})}
    data = {"license": licence, "library_name": "peft", "tags": [*TAGS, "lora"], "base_model": base}
    return make_card(_TEMPLATE, repo, data, base=base, facts=facts)


def has_card(folder: Path) -> bool:
    """Whether somebody wrote the card of a folder; the one that PEFT leaves is a form to be filled in."""
    path = folder / "README.md"
    return path.is_file() and _UNWRITTEN not in path.read_text(encoding="utf-8", errors="replace")


def check_adapter(folder: Path) -> str:
    """Load the adapters on their model and let it answer; returns the answer.

    Raises:
        ValueError: weights that are missing or do not fit.
    """
    if not (folder / WEIGHTS).is_file():
        raise ValueError(f"{folder}: lacks {WEIGHTS}; save the adapters as safetensors, with model.save_pretrained")
    name = base_model(str(folder))
    return answer_to_a_frame(folder, load_model(name, "auto", str(folder)), load(VideoMa2mbaProcessor, name))
