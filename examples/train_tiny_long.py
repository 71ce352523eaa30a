"""Teach the tiny Video-Ma²mba to remember for hours: carried states, on stories of up to 30,000 seconds.

    python examples/train_tiny_long.py --begin-with round3 --model long    # from a model of train_tiny.py; resumable
    python examples/train_tiny.py --evaluate-only --model long --beyond 2880 14400

A model knows only the states that its training length leads to, and is lost beyond it (Ruiz and Gu, arXiv 2507.02782).
So a few stories run beside the training, as streams. At every step some of them go on: by a stretch that is only
watched, then by a window with a gradient, which begins with the true states, carried over and detached; then questions
about all that was seen so far are asked from copies of the states, each in a row of its own, as `VideoMemory.ask` does.
That teaches to keep what was written. What to write is learnt on short videos, all of whose tokens get a gradient, but
there a head that forgets within the hour serves as well. So two of five steps cross a *gap*: a window with a gradient
around a fact, then the rest of a story, hours maybe, watched without a graph, then the questions. In each layer the
state after the gap is D times the state before it plus what was written since; D, the product of all decays, is noted
while watching, and the gradient crosses the gap along this one path, to what was written hours ago.

A story's circle has a colour that no other shape of it has. So a model may work out a colour that it has forgotten, as
the one that never appeared, and the questions of `train_tiny.py` reward that. Where a circle was put into a film it is
wrong. So in most of the stories the circle is of any colour, stays for a second, and stands anywhere.

A head that writes every second has written 14,400 times after four hours, and once a circle. So with `--circle-gate`
one head of the first layer begins as a gate: its time step is fitted, by hand so to speak, to open for circles alone.

What is saved is an average of the weights over the last few hundred steps: those of a single step answer worse after
hours, where a small change of what is written adds up.

Two more things are changed in the model first, and hardly change its answers: every layer gets heads that forget
slowly, and two more layers, which do nothing yet, find their places between the old ones. Tower and projector stay
frozen, so frames are turned into features once: a bank of scenes, from H.264 and as they were drawn, of which stories
of any length are put together.
"""

import argparse
import copy
import math
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence
from train_tiny import CARD, as_chat, decode_story, save

from video_ma2mba import VideoMa2mbaForConditionalGeneration, VideoMa2mbaProcessor
from video_ma2mba.data.synthetic import COLOURS, NEEDLE, SHAPES, Question, make_story

NUM_HEADS, NUM_LAYERS = 8, 6
NEW_LAYERS = (1, 4)  # their places among the six
HALF_LIVES = (2000.0, 8000.0, 30000.0, 120000.0)  # of the new heads, in tokens, at the time step they begin with
TIME_STEP = 0.03
BANK_STORY_S, BANK_SEED, STREAM_SEED = 24, 3 * 10**8, 10**10
NUM_STREAMS, STREAMS_S = 8, ((0.5, 400, 24_000), (0.5, 12_000, 30_000))  # share of the streams, seconds from, to
WINDOWS = ((0.35, 128, 8), (0.3, 256, 6), (0.2, 512, 4), (0.15, 1024, 2))  # share of the steps, frames, streams
SHORT = ((0.25, 3, 30, 24), (0.6, 8, 180, 8), (0.15, 180, 480, 3))  # share of the steps, seconds from, to, videos
GAPS = ((96, 4), (224, 3))  # frames of the window, stories
GAP_STORY_S = (2_000, 20_000)
WATCHED_AT_A_TIME = 2048
PLAIN_SHARE, NEEDLE_SHARE = 0.4, 0.7  # of the stories: never encoded; with a circle of any colour
CIRCLE_HEAD = 6  # of the first layer: the one that costs least when it is given away
SAVED, SAVE_EVERY = "training.safetensors", 100
AVERAGING = 0.995  # what the model that is saved keeps of its weights at every step; the rest is what was just trained


# --- the model ------------------------------------------------------------------------------------------------------


@torch.no_grad()
def grown(old: VideoMa2mbaForConditionalGeneration) -> VideoMa2mbaForConditionalGeneration:
    """The model with twice the heads in every layer and two layers more; it answers much as before."""
    config = copy.deepcopy(old.config)
    text = config.text_config
    inner, state, heads = text.num_heads * text.head_dim, text.state_size, text.num_heads
    places = [place for place in range(NUM_LAYERS) if place not in NEW_LAYERS]
    text.num_heads, text.num_hidden_layers = NUM_HEADS, NUM_LAYERS
    text.expand = NUM_HEADS * text.head_dim // text.hidden_size
    new = VideoMa2mbaForConditionalGeneration(config)
    wide = NUM_HEADS * text.head_dim
    given = dict(old.named_parameters())
    for name, parameter in new.named_parameters():
        before, layers, rest = name.partition("language_model.layers.")
        place, _, tail = rest.partition(".")
        if not layers:
            parameter.copy_(given[name])
            continue
        is_new = int(place) in NEW_LAYERS
        value = None if is_new else given[f"{before}{layers}{places.index(int(place))}.{tail}"]
        if tail.endswith(("A_log", "dt_bias")):
            steps = torch.full((NUM_HEADS,), TIME_STEP)
            steps[:heads] = torch.tensor([0.003, 0.02, 0.1, 0.3])
            decays = torch.tensor([1.0, 1.0, 2.0, 3.0, *(math.log(2) / (TIME_STEP * life) for life in HALF_LIVES)])
            begin = decays.log() if tail.endswith("A_log") else steps + torch.log(-torch.expm1(-steps))
            parameter.copy_(begin if is_new else torch.cat([value, begin[heads:]]))
        elif is_new:
            if tail.endswith("out_proj.weight"):
                parameter.zero_()  # the layer adds nothing yet
        elif tail.endswith("in_proj.weight"):
            mine = parameter.split([wide, wide, 2 * state, NUM_HEADS])
            theirs = value.split([inner, inner, 2 * state, heads])
            for part, old_part in zip(mine, theirs, strict=True):
                part[: len(old_part)] = old_part
            mine[1][inner:] *= 0.2  # new heads are quiet at first
            mine[3][heads:] *= 0.3
        elif "conv1d" in tail:
            parameter[:inner], parameter[wide:] = value[:inner], value[inner:]
            if tail.endswith("bias"):
                parameter[inner:wide] = 0
        elif tail.endswith("mixer.norm.weight"):  # the mean square of twice as many numbers, half of them small
            parameter[:inner], parameter[inner:] = value, value.mean()
            parameter *= math.sqrt(inner / wide)
        elif tail.endswith("out_proj.weight"):
            parameter[:, :inner] = value
            parameter[:, inner:] *= 0.3
        elif tail.endswith("mixer.D"):
            parameter[:heads] = value
        else:
            parameter.copy_(value)
    new.generation_config = old.generation_config
    return new


# --- the stories ----------------------------------------------------------------------------------------------------


class Bank:
    """Features of scenes by name and length, float32 (frames, hidden): from decoded H.264, and as they were drawn."""

    def __init__(self, model, processor, num_stories: int, file: Path):
        self.scenes: tuple[dict[tuple[str, int], np.ndarray], ...] = ({}, {})  # encoded, plain
        parts, at = [], 0
        for plain, scenes in enumerate(self.scenes):
            first = BANK_SEED + plain * num_stories
            # files of one frame a second look a little different
            stories = [make_story(first + i, BANK_STORY_S, source_fps=(1, 4)[i % 2]) for i in range(num_stories)]
            for number, scene in ((i, scene) for i, story in enumerate(stories) for scene in story.scenes):
                for length in range(1, scene.duration_s + 1):
                    scenes.setdefault((scene.name, length), []).append(at + number * BANK_STORY_S + scene.start_s)
            at += num_stories * BANK_STORY_S
            if not file.is_file():
                for story in stories:
                    frames = processor.video_processor.load(story.frames()).frames if plain else None
                    with torch.inference_mode():
                        frames = decode_story(story, processor) if frames is None else frames
                        parts.append(model.get_video_features(frames).pooler_output[:, 0])
        if parts:
            save_file({"features": torch.cat(parts)}, file)
        self.features = load_file(file)["features"]

    def place(self, name: str, length: int, rng: np.random.Generator, plain: bool) -> np.ndarray:
        """Rows of `features`, so many seconds of a scene of this name."""
        if length > 1 and (name, length) not in self.scenes[plain]:  # circles stay for two seconds at most
            return np.concatenate([self.place(name, 1, rng, plain) for _ in range(length)])
        starts = self.scenes[plain][name, length]
        return np.arange(length) + starts[rng.integers(len(starts))]


class Tape:
    """A story made of scenes of the bank, which can be asked about at any second.

    With `needle` the circle is of any colour, stays for a second and stands anywhere, also first or last, as in the
    test of the needle in a haystack. With `plain` its scenes were never encoded.
    """

    def __init__(self, seed: int, duration_s: int, bank: Bank, rng: np.random.Generator, needle: bool, plain: bool):
        story = make_story(seed, duration_s, circle_s=1 if needle else None)
        scenes = [(scene.name, scene.duration_s) for scene in story.scenes]
        self.circle = story.circle.name
        if needle:
            scenes = [scene for scene in scenes if scene[0] != self.circle]
            self.circle = f"{rng.choice(list(COLOURS))} {NEEDLE}"
            anywhere = int((len(scenes) + 1) * rng.random() ** 2)  # early more often: there is more to be kept for
            scenes.insert(int(rng.choice([0, len(scenes), anywhere], p=[0.3, 0.1, 0.6])), (self.circle, 1))
        self.names = [name for name, _ in scenes]
        self.ends = np.cumsum([length for _, length in scenes])
        self.rows = np.concatenate([bank.place(*scene, rng, plain) for scene in scenes])
        self.debuts: dict[str, int] = {}
        for (name, length), end in zip(scenes, self.ends, strict=True):
            self.debuts.setdefault(name, int(end) - length)

    def questions(self, second: int, rng: np.random.Generator, evers: int = 3, firsts: int = 8) -> list[Question]:
        """What can be asked after so many seconds; `ever_appears` and `which_first` so many times."""
        first, last = self.names[0], self.names[int(np.searchsorted(self.ends, second - 1, side="right"))]
        seen = [name for name, debut in self.debuts.items() if debut < second and name != self.circle]
        unseen = [f"{c} {s}" for c in COLOURS for s in SHAPES if f"{c} {s}" not in seen]
        asked = []
        if self.debuts[self.circle] < second:  # what was shown once counts more: it is asked for several times
            asked += 4 * [Question("circle_colour", "What colour was the circle?", self.circle.split()[0])]
        if first != self.circle:
            asked += 2 * [Question("first_shape", "Which shape came first of all?", first.split()[1])]
        if last != self.circle:
            asked.append(Question("last_shape", "Which shape came last of all?", last.split()[1]))
        for number in range(evers):
            among, answer = (seen, "yes") if number % 2 and seen else (unseen, "no")
            asked.append(Question("ever_appears", f"Did a {rng.choice(among)} ever appear?", answer))
        for _ in range(firsts if len(seen) > 1 else 0):
            one, other = rng.choice(len(seen), 2, replace=False)
            text = f"Which came first, the {seen[one]} or the {seen[other]}?"
            asked.append(Question("which_first", text, seen[min(one, other)]))
        return asked


@contextmanager
def decays(model) -> Iterator[list[torch.Tensor]]:
    """Gives for every layer what is left, by head, of a state after all that is watched inside: (batch, heads)."""
    layers = model.model.language_model.layers
    kept = [torch.ones(1, layer.mixer.num_heads) for layer in layers]
    handles = []
    for place, layer in enumerate(layers):

        def note(module, args, projected, place=place, mixer=layer.mixer):
            steps = F.softplus(projected[..., -mixer.num_heads :] + mixer.dt_bias)
            kept[place] = kept[place] * torch.exp(-(steps * mixer.A_log.exp()).sum(dim=1))

        handles.append(layer.mixer.in_proj.register_forward_hook(note))
    try:
        yield kept
    finally:
        for handle in handles:
            handle.remove()


def open_for_circles(model, bank: Bank) -> None:
    """Fit the time step of one head of the first layer: some 0.5 to 1.7 for frames with a circle, 6e-6 for all else.

    What that layer reads is a frame alone, without what came before, and circles are linear in it.
    """
    layer = model.model.language_model.layers[0]
    mixer, tokens = layer.mixer, model.get_input_embeddings().weight
    with torch.no_grad():
        read = layer.norm(torch.cat([bank.features, tokens]))
    circles = torch.zeros(len(read), dtype=torch.bool)
    for scenes in bank.scenes:
        for (name, length), starts in scenes.items():
            if length == 1 and NEEDLE in name:
                circles[starts] = True
            elif NEEDLE in name:
                circles[np.add.outer(starts, np.arange(length)).ravel()] = True
    weight, bias = torch.zeros(read.shape[1], requires_grad=True), torch.tensor(-5.0, requires_grad=True)
    fit = torch.optim.LBFGS([weight, bias], max_iter=300, history_size=20, line_search_fn="strong_wolfe")

    def loss() -> torch.Tensor:
        fit.zero_grad()
        opened = read @ weight + bias  # before the softplus
        circle, other = opened[circles], opened[~circles]
        wrong = F.relu(-0.5 - circle).square().mean() + F.relu(circle - 1.5).square().mean()
        total = wrong + 4 * F.relu(other + 12).square().mean() + 1e-3 * weight.square().sum()
        total.backward()
        return total

    fit.step(loss)
    with torch.no_grad():
        mixer.in_proj.weight[CIRCLE_HEAD - mixer.num_heads] = weight
        mixer.dt_bias[CIRCLE_HEAD] = bias
        mixer.A_log[CIRCLE_HEAD] = math.log(0.02)


# --- one step -------------------------------------------------------------------------------------------------------


def layers_of(cache, row: int) -> list:
    """The states of one row, without their graph."""
    return [type(layer)(*(state[row : row + 1].detach() for state in layer)) for layer in cache.layers]


class Teacher:
    """Makes the losses: of short videos, and of the streams.

    Args:
        model, processor: What is taught, and its processor.
        bank: Of scenes.
        rng: Source of all choices.
        next_seed: Of the next story.
    """

    def __init__(self, model, processor, bank: Bank, rng: np.random.Generator, next_seed: int):
        self.model, self.processor, self.bank, self.rng, self.next_seed = model, processor, bank, rng, next_seed
        self.head = self._ids([Question("", "?", "!")])[1]
        self.streams = [self._new_stream(0) for _ in range(NUM_STREAMS)]

    def short_loss(self) -> torch.Tensor:
        _, low, high, count = SHORT[self.rng.choice(len(SHORT), p=[part[0] for part in SHORT])]
        duration_s = int(self.rng.integers(low, high + 1))
        tapes = [self._new_tape(duration_s) for _ in range(count)]
        cache = self._watch(self._begin(count), np.stack([tape.rows for tape in tapes]))
        repeats = (3, 3) if duration_s < 30 else (4, 8)
        return self._ask(cache, [tape.questions(duration_s, self.rng, *repeats) for tape in tapes])

    def stream_loss(self) -> torch.Tensor:
        """Some streams go on: a stretch that is watched, longer in an older one, and a window with a gradient."""
        _, window, count = WINDOWS[self.rng.choice(len(WINDOWS), p=[part[0] for part in WINDOWS])]
        chosen = self.rng.permutation(NUM_STREAMS)[:count]
        for number in chosen:
            stream = self.streams[number]
            stretch = int(self.rng.integers(20, 200) + self.rng.uniform(0, 0.6) * stream["at"])
            if stream["at"] + stretch + window > len(stream["tape"].rows):
                stream = self.streams[number] = self._new_stream(window)
                stretch = int(self.rng.integers(min(300, len(stream["tape"].rows) - window) + 1))
            with torch.no_grad():
                self._watch_all(stream["cache"], stream["tape"].rows[stream["at"] : stream["at"] + stretch])
            stream["at"] += stretch
        streams = [self.streams[number] for number in chosen]
        rows = np.stack([s["tape"].rows[s["at"] : s["at"] + window] for s in streams])
        cache = self._watch(type(streams[0]["cache"]).joined([s["cache"] for s in streams]), rows)
        for number, stream in enumerate(streams):
            stream["at"] += window
            stream["cache"].layers = layers_of(cache, number)
        return self._ask(cache, [s["tape"].questions(s["at"], self.rng) for s in streams])

    def gap_loss(self) -> torch.Tensor:
        """A window around a fact, the rest of the story watched, and a gradient across it."""
        window, count = GAPS[self.rng.integers(len(GAPS))]
        tapes, starts, caches = [], [], []
        for _ in range(count):
            tape = self._new_tape(int(np.exp(self.rng.uniform(*np.log(GAP_STORY_S)))))
            debut = self.rng.choice([second for name, second in tape.debuts.items() if name != tape.circle])
            circle = tape.debuts[tape.circle]
            fact = int(self.rng.choice([0, circle, circle, debut]))
            start = min(max(0, fact - int(self.rng.integers(window // 2 + 1))), len(tape.rows) - window - 10)
            tapes.append(tape)
            starts.append(start)
            with torch.no_grad():
                caches.append(self._watch_all(self._begin(1), tape.rows[:start]))
        rows = np.stack([t.rows[a : a + window] for t, a in zip(tapes, starts, strict=True)])
        cache = self._watch(type(caches[0]).joined(caches), rows)
        after = []
        for number, (tape, start) in enumerate(zip(tapes, starts, strict=True)):
            own = cache.copy()
            own.layers = layers_of(cache, number)
            with torch.no_grad(), decays(self.model) as kept:
                self._watch_all(own, tape.rows[start + window :])
            after.append((own, kept))
        for place, layer in enumerate(cache.layers):
            conv, ssm = (torch.cat([own.layers[place][i] for own, _ in after]) for i in range(2))
            direct = torch.cat([kept[place] for _, kept in after])[:, :, None, None]
            cache.layers[place] = type(layer)(conv, ssm + direct * (layer[1] - layer[1].detach()))
        return self._ask(cache, [tape.questions(len(tape.rows), self.rng) for tape in tapes])

    def _watch_all(self, cache, rows: np.ndarray):
        for start in range(0, len(rows), WATCHED_AT_A_TIME):
            self._watch(cache, rows[None, start : start + WATCHED_AT_A_TIME])
        return cache

    def _new_tape(self, duration_s: int) -> Tape:
        self.next_seed += 1
        needle, plain = self.rng.random() < NEEDLE_SHARE, self.rng.random() < PLAIN_SHARE
        return Tape(self.next_seed, duration_s, self.bank, self.rng, needle, plain)

    def _new_stream(self, at_least_s: int) -> dict:
        _, low, high = STREAMS_S[self.rng.choice(len(STREAMS_S), p=[part[0] for part in STREAMS_S])]
        low, high = np.log([max(low, at_least_s + 30), high])
        tape = self._new_tape(int(np.exp(self.rng.uniform(low, high))))
        with torch.no_grad():
            return {"tape": tape, "at": 0, "cache": self._begin(1)}

    def _begin(self, count: int):
        """The states after what stands before a video."""
        ids = torch.tensor([self.head] * count)
        return self.model(ids, use_cache=True, logits_to_keep=1).cache

    def _watch(self, cache, rows: np.ndarray):
        """rows: (videos, frames) of the bank. The cache is moved on."""
        features = self.bank.features[torch.from_numpy(rows)]
        return self.model(inputs_embeds=features, cache=cache, use_cache=True, logits_to_keep=1).cache

    def _ids(self, questions: Sequence[Question]) -> tuple[list[int], list[int], list[int]]:
        """What stands before the video; and after it ids and labels of a dialogue of these questions."""
        chat = as_chat(torch.zeros(1, 3, 32, 32, dtype=torch.uint8), questions)
        batch = self.processor.apply_chat_template(chat, tokenize=True, return_labels=True)
        ids, labels = batch["input_ids"][0].tolist(), batch["labels"][0].tolist()
        place = ids.index(self.processor.video_token_id)
        return ids[place + 1 :], ids[:place], labels[place + 1 :]

    def _ask(self, cache, questions: Sequence[list[Question]]) -> torch.Tensor:
        """Each question in a row of its own, from a copy of its video's states; now and then a few in one dialogue."""
        together = int(self.rng.choice([1, 1, 1, 3, 12]))
        rows, owners = [], []
        for owner, asked in enumerate(questions):
            shuffled = [asked[i] for i in self.rng.permutation(len(asked))]
            for start in range(0, len(shuffled), together):
                ids, _, labels = self._ids(shuffled[start : start + together])
                rows.append((ids, labels))
                owners.append(owner)
        ids, labels = (
            pad_sequence([torch.tensor(row) for row in column], batch_first=True, padding_value=fill)
            for column, fill in zip(zip(*rows, strict=True), (self.processor.tokenizer.pad_token_id, -100), strict=True)
        )
        cache = cache.copy()
        cache.reorder_cache(torch.tensor(owners))
        return self.model(ids, labels=labels, cache=cache).loss


# --- the training ---------------------------------------------------------------------------------------------------


def parameter_groups(model) -> Iterator[tuple[dict, list[str]]]:
    """What decides how fast states decay learns four times as fast; only matrices decay."""
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    slow = [name for name in trained if name.endswith(("A_log", "dt_bias"))]
    vectors = [name for name, p in trained.items() if p.ndim < 2 and name not in slow]
    for names, factor, decay in ((slow, 4.0, 0.0), (vectors, 1.0, 0.0), ([*trained], 1.0, 0.05)):
        chosen = [name for name in names if name in trained]
        yield {"params": [trained.pop(name) for name in chosen], "factor": factor, "weight_decay": decay}, chosen


def train(model, processor, args: argparse.Namespace) -> None:
    model.model.vision_tower.requires_grad_(False)
    model.model.multi_modal_projector.requires_grad_(False)
    model.train()
    groups, names = zip(*parameter_groups(model), strict=True)
    by_group = zip(names, groups, strict=True)
    parameters = {name: p for some, group in by_group for name, p in zip(some, group["params"], strict=True)}
    optimizer = torch.optim.AdamW(groups, lr=args.learning_rate, betas=(0.9, 0.98))
    bank = Bank(model, processor, args.bank_stories, args.output / "bank.safetensors")
    saved, step, kept = args.output / SAVED, 0, {}
    if args.circle_gate and not saved.is_file():
        open_for_circles(model, bank)
    if saved.is_file():
        kept = load_file(saved)
        step = int(kept["step"])
        for name, parameter in parameters.items():
            parameter.data.copy_(kept[name])
            optimizer.state[parameter] = {
                "step": torch.tensor(float(step)), **{k: kept[f"{k}.{name}"] for k in ("exp_avg", "exp_avg_sq")},
            }  # fmt: skip
    average = {name: kept.get(f"average.{name}", p.detach()).clone() for name, p in parameters.items()}
    teacher = Teacher(model, processor, bank, np.random.default_rng([args.seed, step]), STREAM_SEED + 10**4 * step)
    start, losses = time.perf_counter(), {}
    while step < args.steps:
        done = max(0.0, 2 * step / args.steps - 1)  # the rate falls in the second half
        rate = args.learning_rate * min(1.0, (step + 1) / 100) * 0.5 * (1 + math.cos(math.pi * done))
        for group in optimizer.param_groups:
            group["lr"] = rate * group["factor"]
        kind = ("short", "gap", "short", "gap", "stream")[step % 5]
        loss = getattr(teacher, f"{kind}_loss")()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters.values(), 1.0, error_if_nonfinite=True)
        optimizer.step()
        for name, parameter in parameters.items():
            average[name].lerp_(parameter.detach(), 1 - AVERAGING)
        step += 1
        losses.setdefault(kind, []).append(loss.item())
        if step % 50 == 0:
            said = ", ".join(f"{kind} {np.mean(values):.4f}" for kind, values in losses.items())
            print(f"step {step}, {time.perf_counter() - start:.0f} s: {said}", flush=True)
            losses = {}
        if step % SAVE_EVERY == 0 or step == args.steps:
            kept = {"step": torch.tensor(step)} | {name: p.detach() for name, p in parameters.items()}
            for name, parameter in parameters.items():
                kept |= {f"{k}.{name}": optimizer.state[parameter][k] for k in ("exp_avg", "exp_avg_sq")}
                kept[f"average.{name}"] = average[name]
            save_file({name: value.contiguous() for name, value in kept.items()}, saved.with_suffix(".partial"))
            os.replace(saved.with_suffix(".partial"), saved)
    for name, parameter in parameters.items():
        parameter.data.copy_(average[name])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--begin-with", type=Path, default=CARD, metavar="DIR", help="default: the published model")
    parser.add_argument("--model", type=Path, required=True, help="where the model is saved")
    parser.add_argument("--steps", type=int, default=4000, help="default: %(default)s")
    parser.add_argument("--learning-rate", type=float, default=8e-4, help="default: %(default)s")
    parser.add_argument("--bank-stories", type=int, default=2500, help="default: %(default)s")
    parser.add_argument("--circle-gate", action="store_true", help="begin one head as a gate that circles open")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2, help="default: %(default)s")
    parser.add_argument("--output", type=Path, default=Path("train_tiny_long_output"), help="bank and checkpoint")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    args.output.mkdir(parents=True, exist_ok=True)
    processor = VideoMa2mbaProcessor.from_pretrained(args.begin_with)
    model = VideoMa2mbaForConditionalGeneration.from_pretrained(args.begin_with)
    if model.config.text_config.num_hidden_layers < NUM_LAYERS:
        model = grown(model)
    train(model, processor, args)
    save(model, processor, args.model)


if __name__ == "__main__":
    main()
