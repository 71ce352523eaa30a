"""A model card from what is known: the config, the memory plan, reports of training and evaluation, licence, bases."""

import re
import shlex
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from ..loading import load
from ..modeling.checkpoint_plan import format_bytes, plan_checkpoints
from ..registration import VideoMa2mbaConfig, VideoMa2mbaForConditionalGeneration
from .checkpoint_reader import read_json

TAGS = ["video", "mamba2", "video-ma2mba"]
_TEMPLATE = """---
{{ card_data }}
---

# {{ title }}

A video language model that watches every frame at 1 FPS: a vision tower, a projector and a Mamba-2 backbone, whose
memory of the past is a state of fixed size ([paper](https://arxiv.org/abs/2411.19460)).

| | |
| --- | --- |
{% for name, value in facts.items() -%}
| {{ name }} | {{ value }} |
{% endfor %}
{%- if not has_weights %}
There are no weights here yet: config, processor and this card only.{% if base_models %} The untrained model of this
size, from which the training starts, is made by

```
video-ma2mba convert init --language-model {{ base_models[0] }} --vision-model {{ base_models[1] }} -o DIR
```
{% endif %}
{%- endif %}
{%- if has_weights %}
## Use

```sh
pip install {{ torch }}    # the build for your device
pip install {{ requirements }}
```

```python
from transformers import AutoModelForImageTextToText, AutoProcessor

model = AutoModelForImageTextToText.from_pretrained("{{ repo }}", trust_remote_code=True)
processor = AutoProcessor.from_pretrained("{{ repo }}", trust_remote_code=True)
content = [{"type": "video", "path": "talk.mp4"}, {"type": "text", "text": "What is on the last slide?"}]
chat = [{"role": "user", "content": content}]
inputs = processor.apply_chat_template(chat, fps=1.0, add_generation_prompt=True, tokenize=True)
answer = model.generate(**inputs, max_new_tokens=64)[0, inputs["input_ids"].shape[1] :]
print(processor.decode(answer, skip_special_tokens=True))
```

That runs the code of this repository. With the package `video-ma2mba` installed, `import video_ma2mba` takes its place,
and `video-ma2mba ask talk.mp4 "What is on the last slide?" --model {{ repo }}` asks from the command line.
{% endif %}
{%- if training %}
## Training

| | |
| --- | --- |
{% for name, value in training.items() -%}
| {{ name }} | {{ value }} |
{% endfor %}
{%- endif %}
{%- if results %}
## Evaluation

| data set | metric | value |
| --- | --- | --- |
{% for row in results -%}
| {{ row.dataset }}{% if row.split %} ({{ row.split }}){% endif %} | {{ row.metric }} | {{ row.value }} |
{% endfor %}
{%- endif %}
## Limits

- {{ "Other tasks than those above were not measured." if results else "It was not evaluated." }}
- It takes pictures and text, and no sound. What happens between two sampled frames is not seen.
- Its memory has a fixed size: of a long video, details fade that a question asks for later.
- It repeats what its training data say, wrong and biased statements among them: its answers are no ground on which to
  decide about people.
"""


def render_card(
    folder: Path,
    repo: str,
    *,
    licence: str = "apache-2.0",
    base_models: list[str] | None = None,
    training: dict[str, Any] | None = None,
    evaluation: dict[str, Any] | None = None,
) -> ModelCard:
    """The card of the checkpoint in `folder`, to be published as `repo`.

    Args:
        licence: identifier of the Hub.
        base_models: Hub ids; where there are no weights yet, the language model's comes first, then the tower's.
        training: what to state about the training, name -> value.
        evaluation: {"results": [{"dataset", "metric", "value"}, ...]}, each with "split" if it wants to.

    Raises:
        ValueError: an evaluation of another form.
    """
    config = load(VideoMa2mbaConfig, str(folder))
    stated = (evaluation or {}).get("results", [])
    if not isinstance(stated, list):
        raise ValueError(f"the results of the evaluation must be a list, got {stated!r}")
    results = [_checked(row) for row in stated]
    data = {
        "license": licence, "library_name": "transformers", "tags": TAGS, "base_model": base_models or None,
        "model_name": repo.rpartition("/")[2] if results else None,
        "eval_results": [_eval_result(row) for row in results] or None,
    }  # fmt: skip
    return make_card(
        _TEMPLATE, repo, data, facts=_facts(config), has_weights=any(folder.glob("*.safetensors")),
        base_models=base_models, training=training, results=results,
    )  # fmt: skip


def make_card(template: str, repo: str, data: dict[str, Any], **values: Any) -> ModelCard:
    """A card of these metadata; its text, in Jinja, is given the packages that are needed, and `values`."""
    return ModelCard.from_template(
        ModelCardData(pipeline_tag="video-text-to-text", **data),
        template_str=template, title=repo.rpartition("/")[2], repo=repo, torch=requirements("torch"),
        requirements=requirements("transformers", "av", "pillow"), **values,
    )  # fmt: skip


def requirements(*names: str) -> str:
    """Packages that this one depends on, with the versions that it asks for, as words for a shell."""
    lines = metadata.requires("video-ma2mba") or ()
    stated = {re.split(r"[^\w-]", line)[0]: line for line in lines if "extra ==" not in line}
    return " ".join(shlex.quote(stated[name]) for name in names)


def check_card(card: str, path: Path) -> None:
    """Read the text of a card as the Hub does; `path` is what an error calls it.

    Raises:
        ValueError: metadata that is missing or that the Hub cannot read.
    """
    try:
        data = ModelCard(card).data
    except ValueError as error:
        raise ValueError(f"{path}: the Hub cannot read this card: {error}") from error
    if missing := [field for field in ("license", "library_name", "pipeline_tag") if not data.get(field)]:
        raise ValueError(f"{path}: the metadata lack {', '.join(missing)}")


def _facts(config: VideoMa2mbaConfig) -> dict[str, str]:
    with torch.device("meta"):
        num_parameters = VideoMa2mbaForConditionalGeneration(config).num_parameters()
    text, vision = config.text_config, config.vision_config
    num_frames = 7200
    family = {"clip_vision_model": "CLIP", "siglip_vision_model": "SigLIP"}.get(vision.model_type, vision.model_type)
    plan = plan_checkpoints(config, 1, num_frames * config.tokens_per_frame, num_frames=num_frames)
    return {
        "parameters": f"{num_parameters:,}",
        "frames": f"{vision.image_size} x {vision.image_size} pixels",
        "tokens per frame": f"{config.tokens_per_frame}",
        "vision tower": f"{family}, {config.num_vision_layers} layers of width {vision.hidden_size}",
        "backbone": (
            f"Mamba-2, {text.num_hidden_layers} layers of width {text.hidden_size}, {text.num_heads} heads of "
            f"{text.head_dim}, state {text.state_size}"
        ),
        "vocabulary": f"{text.vocab_size:,} rows",
        "weights in bfloat16": format_bytes(2 * num_parameters),
        "training on two hours at 1 FPS": (
            f"planned: {format_bytes(plan.predicted_peak_bytes)} of activations beside weights, gradients, optimizer, "
            f"at {plan.recompute_factor:.2f} times the compute of no checkpointing. The backward pass computes "
            f"activations again, one cell of {plan.layer_interval} layers x {plan.sequence_interval:,} tokens at a time"
        ),
    }


def _checked(row: Any) -> dict[str, Any]:
    is_named = isinstance(row, dict) and isinstance(row.get("dataset"), str) and isinstance(row.get("metric"), str)
    if not is_named or "value" not in row:
        raise ValueError(f"a result of the evaluation needs dataset, metric and value; got {row!r}")
    if isinstance(row["value"], bool) or not isinstance(row["value"], int | float):
        raise ValueError(f"the value of {row['dataset']} must be a number, got {row['value']!r}")
    return row


def _eval_result(row: dict[str, Any]) -> EvalResult:
    return EvalResult(
        task_type="video-text-to-text",
        dataset_type=row["dataset"].lower().replace(" ", "-"),
        dataset_name=row["dataset"],
        dataset_split=row.get("split"),
        metric_type=row["metric"].lower().replace(" ", "_"),
        metric_name=row["metric"],
        metric_value=row["value"],
    )


def read_report(path: Path | None) -> dict[str, Any] | None:
    """A JSON file of a training or an evaluation; None for None."""
    return None if path is None else read_json(path.parent, path.name)
