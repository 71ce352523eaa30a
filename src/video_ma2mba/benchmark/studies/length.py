"""Remembering longer than one was trained: accuracy from 8 s to 4 h by how the states were trained; what a state holds.

The backbone of the study `backbone` knows videos of 3 to 48 s. From there, arms of equal compute (token passes: one
for a token that is watched, three or, with MA-GC, four for one with a gradient) go on in different ways, three
trainings each. A second part asks how many facts, and for how long, states of 16 to 128 columns hold: a sequence shows
pairs of key and value, more in a longer one, and all of them are asked for at the end.

What has been trained and measured is kept, so a study that was stopped goes on. `--scale` down to 0.2 shortens the arms
and asks about fewer videos; their begin, the lengths, the number of trainings and the second part stay.
"""

import json
import math
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

from ...data.synthetic import QUESTION_KINDS, make_story
from ...files import new_figure, write_json
from ...modeling import VideoMa2mbaForConditionalGeneration
from ...training.initial_states import InitialStates, InitialStatesOptions
from ..train import small_config
from .backbone import BATCH_SIZE, NAMES, build, memory_bytes, trained
from .stories import SEEDS, Stories, are_right, shares

TESTED_S = (8, 32, 128, 512, 2048, 14400)
TRAININGS = 3
TOKEN_PASSES = 4_000_000  # of every arm
SHORT_S, LONG_S = (3, 48), (48, 3072)
LONG_BATCH = 2
HORIZON = 320  # the questions of a dialogue, and some hundred and fifty frames
INTERVAL = 64
LEARNING_RATE = 1e-3


class Arm(NamedTuple):
    """How a training goes on: the `share` of its steps on `long_s` seconds, the horizon there, the first states.

    With `slow_heads` the states of half of the heads begin to decay at a sixteenth of the rate.
    """

    label: str
    share: float = 0.0
    long_s: tuple[int, int] = LONG_S
    horizon: int | None = HORIZON
    initial_states: str = "zeros"
    slow_heads: bool = False


ARMS = {
    "control": Arm("short videos alone"),
    "longer": Arm("all backpropagated, 48 to 768 s", 0.5, (48, 768), None),
    "carried": Arm("carried states, 48 to 3,072 s", 0.5),
    "passed": Arm("short, states of another video", initial_states="passed"),
    "noise": Arm("short, noise like final states", initial_states="noise"),
    "mixture": Arm("carried, half begin with passed states", 0.5, initial_states="passed"),
}
# one training each: what decides how well carried states work
VARIANTS = {
    "horizon 192": Arm("", 0.5, horizon=192),
    "horizon 1024": Arm("", 0.5, horizon=1024),
    "share 0.25": Arm("", 0.25),
    "share 0.75": Arm("", 0.75),
    "slow heads": Arm("", 0.5, slow_heads=True),
}


def run(scale: float, keep: Path) -> dict[str, Any]:
    stories = Stories()
    whole = scale >= 0.2  # less only tries the study out
    base = trained(stories, 1 if whole else scale, keep)
    tested = TESTED_S if whole else (8, 64)
    num_stories, trainings = max(2, round(24 * math.sqrt(scale))), TRAININGS if whole else 1
    videos = {video_s: _test_videos(stories, video_s, num_stories) for video_s in tested}
    folder = keep / f"length-{scale:g}"
    folder.mkdir(parents=True, exist_ok=True)
    arms: dict[str, Any] = {"as it was": [_accuracies(stories, base["mamba2"], videos, folder / "as-it-was")]}
    for name, arm in (ARMS | (VARIANTS if whole else {})).items():
        for seed in range(trainings if name in ARMS else 1):
            file = folder / f"{name.replace(' ', '-')}-{seed}"
            model = _trained_on(stories, base["mamba2"], arm, seed, round(TOKEN_PASSES * scale), file)
            arms.setdefault(name, []).append(_accuracies(stories, model, videos, file))
    attention_s = [video_s for video_s in tested if video_s <= 2048]  # beyond, its scores alone take gigabytes
    return {
        "num_stories": num_stories,
        "token_passes": round(TOKEN_PASSES * scale),
        "trained_on_s": SHORT_S,
        "arms": {name: _summary(runs) for name, runs in arms.items()},
        "attention": {s: stories.accuracy(base["attention"], s, num_stories) for s in attention_s},
        "state_bytes": memory_bytes(base["mamba2"], "mamba2", 1),
        "attention_bytes_per_frame": memory_bytes(base["attention"], "attention", 1),
        "facts": _facts(scale, folder),
    }


# --- the arms ---------------------------------------------------------------------------------------------------------


def _trained_on(stories: Stories, base: Any, arm: Arm, seed: int, budget: int, file: Path) -> Any:
    """The base trained on for `budget` token passes, or read from its file."""
    model = build("mamba2", stories)
    weights = Path(f"{file}.safetensors")
    model.load_state_dict((load_file(weights) if weights.is_file() else base.state_dict()), strict=False)
    model.tie_weights()
    if weights.is_file():
        return model
    if arm.slow_heads:
        for layer in model.model.language_model.layers:
            layer.mixer.A_log.data[layer.mixer.num_heads // 2 :] -= math.log(16)
    rng = np.random.default_rng([5, seed])
    states = InitialStates(InitialStatesOptions(arm.initial_states), seed)
    step = 0

    def batches() -> Iterator[tuple[torch.Tensor, int]]:
        nonlocal step
        while True:
            step += 1
            is_long = rng.random() < arm.share
            span, size = (arm.long_s, LONG_BATCH) if is_long else (SHORT_S, BATCH_SIZE)
            batch = stories.training_batch(10**6 * (seed + 1) + step, *span, size)
            if is_long and arm.horizon is not None:
                model.gradient_checkpointing_enable(sequence_interval=INTERVAL, gradient_horizon=arm.horizon)
                plan = model.checkpoint_plan(*batch.labels.shape)
                passes = round(3 * plan.recompute_factor * batch.labels.numel())
            else:
                model.gradient_checkpointing_disable()
                passes = 3 * batch.labels.numel()
            cache = states.begin(model.model.language_model.new_cache(size))
            loss = model(inputs_embeds=batch.embedded(model), labels=batch.labels, cache=cache).loss
            states.end(cache)
            yield loss, passes

    steps = _train(model, batches(), budget, f"{file.name}: ")
    write_json(Path(f"{file}.steps.json"), {"steps": steps})
    own = {key: value.contiguous() for key, value in model.state_dict().items() if key != "lm_head.weight"}
    save_file(own, weights)
    return model


def _train(
    model: Any, batches: Iterator[tuple[torch.Tensor, int]], budget: int, say: str, peak_rate: float = LEARNING_RATE
) -> int:
    """AdamW along half a cosine over the token passes of the budget; returns the steps."""
    parameters = [p for p in model.train().parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=peak_rate, betas=(0.9, 0.98), weight_decay=0.05)
    spent, steps = 0, 0
    for loss, passes in batches:
        rate = peak_rate * min(1.0, (steps + 1) / 50) * 0.5 * (1 + math.cos(math.pi * spent / budget))
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0, error_if_nonfinite=True)
        optimizer.step()
        spent, steps = spent + passes, steps + 1
        if steps % 100 == 0:
            print(f"{say}step {steps}, {spent / budget:.0%}: {loss.item():.4f}", flush=True)
        if spent >= budget:
            return steps
    raise AssertionError("batches do not end")


# --- accuracy by length ----------------------------------------------------------------------------------------------


def _test_videos(stories: Stories, video_s: int, count: int) -> list[tuple[torch.Tensor, list]]:
    """For every fresh story its features (1, frames, hidden), and one question of each kind."""
    rng = np.random.default_rng([2, video_s])
    made = [make_story(SEEDS["test"] + i, video_s) for i in range(count)]
    return [(stories.features([s.frames()]), [s.question(kind, rng) for kind in QUESTION_KINDS]) for s in made]


@torch.no_grad()
def _accuracies(stories: Stories, model: Any, videos: dict[int, list], file: Path) -> dict[str, Any]:
    """Accuracy by length and kind of question. A video is watched once, and each question asked of its states."""
    measured = Path(f"{file}.accuracy.json")
    if measured.is_file():
        return json.loads(measured.read_text(encoding="utf-8"))
    model.eval()
    found: dict[str, Any] = {}
    for video_s, watched in videos.items():
        right = []
        for features, questions in watched:
            cache = model(inputs_embeds=features, use_cache=True, logits_to_keep=1).cache
            cache.batch_repeat_interleave(len(questions))
            ids, labels = stories._padded([stories._dialogue([question]) for question in questions])
            right.append(are_right(model(input_ids=ids, cache=cache).logits[:, :-1], labels[:, 1:]))
        found[str(video_s)] = shares(right)
    write_json(measured, found)
    return found


def _summary(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """By length the mean over trainings, by kind and of all; of all also the lowest and the highest training."""
    result = {}
    for video_s in runs[0]:
        every = [run[video_s]["all"] for run in runs]
        kinds = {kind: float(np.mean([run[video_s][kind] for run in runs])) for kind in (*QUESTION_KINDS, "all")}
        result[video_s] = {**kinds, "lowest": min(every), "highest": max(every), "trainings": len(runs)}
    return result


# --- facts that grow with length -------------------------------------------------------------------------------------

STATE_SIZES = (16, 32, 64, 128)
KEYS, VALUES, TOKENS_PER_FACT = 64, 16, 4
FACTS_TRAINED, FACTS_TESTED = (2, 16), (2, 4, 8, 16, 32, 64)
FACT_PASSES, FACT_BATCH, FACT_LEARNING_RATE = 8_000_000, 32, 3e-3


def _facts(scale: float, folder: Path) -> list[dict[str, Any]]:
    """For every state size: the share of values recalled, by the number of facts, each in four tokens of its own.

    Recall comes late and at once, so this part is not shortened, but to try it out.
    """
    rows, scale = [], 1 if scale >= 0.2 else scale
    for state_size in STATE_SIZES if scale == 1 else STATE_SIZES[::3]:
        file = folder / f"facts-{state_size}.json"
        if not file.is_file():
            model = _facts_model(state_size)
            draw = partial(_fact_loss, model, np.random.default_rng(6))
            _train(model, iter(draw, None), round(FACT_PASSES * scale), f"state {state_size}: ", FACT_LEARNING_RATE)
            write_json(file, [_recalled(model, count, max(2, round(64 * scale))) for count in FACTS_TESTED])
        num_bytes = _facts_model(state_size).model.language_model.new_cache(1).num_bytes
        for row in json.loads(file.read_text(encoding="utf-8")):
            rows.append({"state_size": state_size, "state_bytes": num_bytes, **row})
    return rows


def _facts_model(state_size: int) -> Any:
    torch.manual_seed(0)
    tower = {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 1, "image_size": 4, "patch_size": 4}
    config = small_config(
        64, tower, 2, num_heads=4, head_dim=32, state_size=state_size, chunk_size=64,
        vocab_size=KEYS + VALUES + 3,  # a filler, and the two placeholders
    )  # fmt: skip
    model = VideoMa2mbaForConditionalGeneration(config)
    model.model.vision_tower.requires_grad_(False)
    model.model.multi_modal_projector.requires_grad_(False)
    return model


def fact_sequences(rng: np.random.Generator, count: int, batch: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Each row shows `count` pairs of a key and its value, each somewhere in four tokens, then asks for all of them.

    Returns:
        ids and labels, int64 (batch, 6 * count): a value is supervised where its key is shown again.
    """
    rows, targets = [], []
    for _ in range(batch):
        keys, values = rng.permutation(KEYS)[:count], KEYS + rng.integers(VALUES, size=count)
        shown = np.full((count, TOKENS_PER_FACT), KEYS + VALUES)
        places = rng.integers(TOKENS_PER_FACT - 1, size=count)
        shown[np.arange(count), places], shown[np.arange(count), places + 1] = keys, values
        order = rng.permutation(count)
        asked = np.stack([keys[order], values[order]], axis=1)
        rows.append(np.concatenate([shown.ravel(), asked.ravel()]))
        targets.append(np.concatenate([np.full(shown.size, -100), (asked * [[0, 1]] - [[100, 0]]).ravel()]))
    return torch.from_numpy(np.stack(rows)), torch.from_numpy(np.stack(targets))


def _fact_loss(model: Any, rng: np.random.Generator) -> tuple[torch.Tensor, int]:
    low, high = np.log(FACTS_TRAINED)
    ids, labels = fact_sequences(rng, round(float(np.exp(rng.uniform(low, high)))), FACT_BATCH)
    return model(input_ids=ids, labels=labels).loss, 3 * ids.numel()


@torch.no_grad()
def _recalled(model: Any, count: int, batch: int) -> dict[str, Any]:
    ids, labels = fact_sequences(np.random.default_rng([7, count]), count, batch)
    logits = model.eval()(input_ids=ids, logits_to_keep=2 * count + 1).logits[:, :-1]
    wanted = F.pad(labels, (0, 0))[:, -2 * count :]
    chosen = wanted != -100
    right = (logits.argmax(-1) == wanted)[chosen].float().mean()
    return {"facts": count, "tokens": TOKENS_PER_FACT * count, "recalled": float(right)}


# --- the picture -----------------------------------------------------------------------------------------------------


def draw(result: dict[str, Any]) -> Any:
    figure, panels = new_figure(13, 4.6, 1, 3)
    left, middle, right = panels
    for name in ("as it was", *ARMS):
        rows = {int(video_s): row for video_s, row in result["arms"][name].items()}
        (line,) = left.plot(list(rows), [row["all"] for row in rows.values()], "o-", markersize=3, label=name)
        low, high = ([row[key] for row in rows.values()] for key in ("lowest", "highest"))
        left.fill_between(list(rows), low, high, color=line.get_color(), alpha=0.15)
    rows = result["attention"]
    left.plot([int(s) for s in rows], [row["all"] for row in rows.values()], "s--", label=NAMES["attention"])
    left.axvline(result["trained_on_s"][1], color="0.6", linewidth=0.8)
    left.set(title="accuracy by length", xlabel="seconds of video", xscale="log", ylim=(0, 1.03))
    for name in ("carried", *(name for name in VARIANTS if name in result["arms"])):
        rows = {int(video_s): row for video_s, row in result["arms"][name].items()}
        label = f"horizon {HORIZON}, share 0.5" if name == "carried" else name
        middle.plot(list(rows), [row["all"] for row in rows.values()], "o-", markersize=3, label=label)
    middle.set(title="carried states: what decides", xlabel="seconds of video", xscale="log", ylim=(0, 1.03))
    for state_size in sorted({row["state_size"] for row in result["facts"]}):
        facts = [row for row in result["facts"] if row["state_size"] == state_size]
        label = f"{state_size}: {facts[0]['state_bytes'] / 2**10:.0f} KiB"
        right.plot([row["facts"] for row in facts], [row["recalled"] for row in facts], "o-", markersize=3, label=label)
    right.axvline(FACTS_TRAINED[1], color="0.6", linewidth=0.8)
    right.set(title="facts recalled, by state size", xlabel="facts, one in four tokens", xscale="log", ylim=(0, 1.03))
    right.set_xticks(FACTS_TESTED, [str(count) for count in FACTS_TESTED])
    right.minorticks_off()
    for panel in panels:
        panel.legend(fontsize=7)
    return figure
