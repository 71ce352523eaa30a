"""Mamba-2 against attention of equal size: the same features, questions, steps; accuracy, memory and time by length."""

import copy
import itertools
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from ...files import new_figure
from ..machine import allocated_peak_bytes, clock
from .side_by_side import shortened, train_side_by_side
from .stories import Stories

NAMES = {"mamba2": "Mamba-2", "attention": "attention"}
SHAPE = {"num_hidden_layers": 4, "num_heads": 4, "expand": 1}  # of the Mamba-2; inside, it is as wide as outside
STEPS, BATCH_SIZE = 2400, 12
CURRICULUM = ((0.25, 3, 8), (0.5, 3, 20), (1.0, 4, 48))  # up to this share of the steps: seconds from, to
TESTED_S = (8, 16, 32, 64, 128, 256, 512)
TIMED_TOKENS = (64, 256, 1024, 4096, 16384)
NEW_TOKENS = 8


def build(name: str, stories: Stories) -> Any:
    """A backbone with random weights: a Mamba-2 of `SHAPE`, or a Llama as wide with about as many parameters."""
    from ...modeling import VideoMa2mbaForConditionalGeneration
    from ..memory_of_video import attention_of_size

    torch.manual_seed(0)
    config = copy.deepcopy(stories.tiny.config)
    for key, value in SHAPE.items():
        setattr(config.text_config, key, value)
    model = VideoMa2mbaForConditionalGeneration(config)
    if name == "attention":
        return attention_of_size(model)
    model.model.vision_tower.requires_grad_(False)
    model.model.multi_modal_projector.requires_grad_(False)
    return model


def trained(stories: Stories, scale: float, keep: Path) -> dict[str, Any]:
    """Both backbones, trained side by side on the same batches, or read from `keep` if they were trained before.

    Returns:
        models by name.
    """
    models = {name: build(name, stories) for name in NAMES}
    steps = shortened(STEPS, scale)
    files = {name: keep / f"{name}-{steps}.safetensors" for name in NAMES}
    if all(file.is_file() for file in files.values()):
        for name, model in models.items():
            model.load_state_dict(load_file(files[name]), strict=False)  # tied heads are stored once
            model.tie_weights()
        return models
    spans = [next(part[1:] for part in CURRICULUM if step < part[0] * steps) for step in range(steps)]
    batches = (stories.training_batch(step, *span, BATCH_SIZE) for step, span in enumerate(spans))
    for _ in train_side_by_side(models, steps, batches):
        pass
    keep.mkdir(parents=True, exist_ok=True)
    for name, model in models.items():
        own = {key: value for key, value in model.state_dict().items() if key != "lm_head.weight"}
        save_file({key: value.contiguous() for key, value in own.items()}, files[name])
    return models


def run(scale: float, keep: Path) -> dict[str, Any]:
    stories = Stories()
    models = trained(stories, scale, keep)
    num_stories = max(2, round(24 * scale))
    tested = TESTED_S if scale == 1 else TESTED_S[:2]
    timed = TIMED_TOKENS if scale == 1 else TIMED_TOKENS[:2]
    result: dict[str, Any] = {
        "steps": shortened(STEPS, scale),
        "trained_on_s": [CURRICULUM[0][1], CURRICULUM[-1][2]],
        "num_parameters": {n: sum(p.numel() for p in models[n].parameters() if p.requires_grad) for n in NAMES},
        "accuracy": [
            {"video_s": s, **{name: stories.accuracy(models[name], s, num_stories) for name in NAMES}} for s in tested
        ],
        "training": [_training(models, tokens) for tokens in timed],
        "answering": [_answering(models, tokens) for tokens in timed],
    }
    for table, key in itertools.product(("training", "answering"), ("bytes", "seconds")):
        crossed = [row["tokens"] for row in result[table] if row["mamba2"][key] < row["attention"][key]]
        result[f"{table}_{key}_cross_at_tokens"] = crossed[0] if crossed else None
    return result


def memory_bytes(model: Any, name: str, num_tokens: int) -> int:
    """What a backbone keeps of so many tokens: states, or keys and values in float32."""
    config = model.config
    if name == "attention":
        return 8 * config.num_key_value_heads * config.head_dim * config.num_hidden_layers * num_tokens
    return model.model.language_model.new_cache(1).num_bytes


def _training(models: dict[str, Any], num_tokens: int) -> dict[str, Any]:
    """Peak bytes and seconds of a forward and backward pass of one sequence."""
    row: dict[str, Any] = {"tokens": num_tokens}
    ids = torch.randint(4, 400, (1, num_tokens))
    labels = torch.where(torch.arange(num_tokens) < num_tokens - 32, -100, ids)
    for name, options in (("mamba2", None), ("mamba2 with MA-GC", {"sequence_interval": 256}), ("attention", None)):
        model = models[name.partition(" ")[0]].train()
        if options and num_tokens > 256:
            model.gradient_checkpointing_enable(**options)

        def step(model: Any = model, name: str = name) -> None:
            model.zero_grad(set_to_none=True)
            if name == "attention":  # as ours does by itself, only the answers meet the head
                logits = model(ids, logits_to_keep=33).logits[0, :-1]
                torch.nn.functional.cross_entropy(logits, ids[0, -32:]).backward()
            else:
                model(input_ids=ids, labels=labels).loss.backward()

        step()
        row[name] = {"seconds": clock(step, "cpu").seconds, "bytes": allocated_peak_bytes(step)}
        if name.startswith("mamba2"):
            model.gradient_checkpointing_disable()
        model.zero_grad(set_to_none=True)
    return row


@torch.no_grad()
def _answering(models: dict[str, Any], num_tokens: int) -> dict[str, Any]:
    """Bytes kept of a sequence, and seconds of an answer after it."""
    from transformers import DynamicCache

    row: dict[str, Any] = {"tokens": num_tokens}
    ids = torch.randint(4, 400, (1, num_tokens))
    for name, model in ((name, models[name].eval()) for name in NAMES):
        if name == "attention":
            cache: Any = DynamicCache(config=model.config)
            model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
            num_bytes = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
        else:
            cache = model(ids, use_cache=True, logits_to_keep=1).cache
            num_bytes = cache.num_bytes
        times = []
        for _ in range(5):
            start, own = time.perf_counter(), cache.copy() if name == "mamba2" else cache
            for token in itertools.repeat(ids[:, :1], NEW_TOKENS):
                if name == "mamba2":
                    own = model(token, cache=own, use_cache=True).cache
                else:
                    model(token, past_key_values=own, use_cache=True)
            times.append(time.perf_counter() - start)
            if name == "attention":
                cache.crop(num_tokens - cache.get_seq_length())
        row[name] = {"bytes": num_bytes, "seconds": statistics.median(times)}
    return row


def draw(result: dict[str, Any]) -> Any:
    figure, panels = new_figure(12, 6.4, 2, 3)
    labels = {**NAMES, "mamba2 with MA-GC": "Mamba-2 with MA-GC"}
    styles = {
        "mamba2": {"color": "tab:blue", "marker": "o"},
        "mamba2 with MA-GC": {"color": "tab:green", "marker": "^"},
        "attention": {"color": "tab:orange", "marker": "s", "linestyle": "--"},
    }
    for name in NAMES:
        rows = result["accuracy"]
        panels[0].plot([r["video_s"] for r in rows], [r[name]["all"] for r in rows], label=labels[name], **styles[name])
    panels[0].axvline(result["trained_on_s"][1], color="0.6", linewidth=0.8)
    panels[0].annotate("longest in training", (result["trained_on_s"][1], 0.02), fontsize=7, rotation=90, color="0.4")
    panels[0].set(title="accuracy, one frame a second", xlabel="seconds of video", xscale="log", ylim=(0, 1.03))
    for panel, (table, key), title in zip(
        panels[1:5],
        itertools.product(("training", "answering"), ("bytes", "seconds")),
        ("training: peak memory", "training: time of a step", "answering: bytes kept", "answering: time of an answer"),
        strict=True,
    ):
        for name, style in styles.items():
            rows = [row for row in result[table] if name in row]
            values = [row[name][key] / (2**20 if key == "bytes" else 1) for row in rows]
            panel.plot([row["tokens"] for row in rows], values, label=labels[name] if rows else None, **style)
        panel.set(title=title, xlabel="tokens", ylabel="MiB" if key == "bytes" else "s", xscale="log", yscale="log")
    for panel in panels[:5]:
        panel.legend(fontsize=7)
    panels[5].axis("off")
    sizes = ", ".join(f"{NAMES[name]} {size:,}" for name, size in result["num_parameters"].items())
    panels[5].text(0, 0.5, f"parameters: {sizes}\n{result['steps']} steps on the same batches", fontsize=9, wrap=True)
    return figure
