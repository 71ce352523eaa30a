"""The paper's three stages in miniature, from published file formats to a model that answers, in 80 minutes on 2 cores.

    python examples/train_three_stages.py                         # all of it, into three_stages/
    python examples/train_three_stages.py --without-stage-1.5     # the same but for the long captioned videos

The parts that the paper takes ready-made are made first: a vision tower that tells coloured shapes apart, in place of
CLIP, and a Mamba-2 that has read stories and questions about them as text, in place of the pretrained one. Then

1.   alignment: pictures in the format of LLaVA-Pretrain and clips in that of WebVid; the projector alone learns;
1.5  long video knowledge: SceneWalk's format, scenes and captions interleaved; everything learns;
2.   instruction tuning: LLaVA-Video's format, all questions about a video in one conversation; everything learns.

Every set is written as its publishers do, prepared by `video-ma2mba data prepare`, and trained on by the recipe of its
stage, with other numbers where a tiny model needs them, and with Multi-Axis Gradient Checkpointing. Steps that are done
are not done again, and a training that was interrupted goes on.
"""

import argparse
import csv
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.nn import functional as F
from train_tiny import build_model, build_processor, evaluate_lengths
from transformers import set_seed

from video_ma2mba import VideoMa2mbaForConditionalGeneration, VideoMa2mbaProcessor
from video_ma2mba.data.synthetic import QUESTION_KINDS, Story, make_story

SHORTEST_S, LONGEST_S = 4, 90  # of the videos in training; a model is asked about 8 s and more
DESCRIBE, SUM_UP = "Describe the scene.", "Describe the video."
EVALUATION_SEED, NUM_QUESTIONS = 5, 500
# Seeds of stories: each set has its own, and none meets those of the evaluation.
SEEDS = {"tower": 10**6, "text": 2 * 10**6, "pictures": 3 * 10**6, "clips": 4 * 10**6, "scenes": 5 * 10**6,
         "questions": 6 * 10**6, "held out": 7 * 10**6}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--output", type=Path, default=Path("three_stages"))
    parser.add_argument("--without-stage-1.5", dest="without", action="store_true", help="leave that stage out")
    parser.add_argument("--scale", type=float, default=1.0, help="of data and steps: 0.01 tries the script out")
    parser.add_argument("--threads", type=int, default=2, help="default: 2")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    run = Run(args.output, args.scale, args.threads)
    run.once("parts", run.make_parts)
    run.once("data", run.make_data)
    first = run.stage("stage1", run.output / "parts", "stage1", ["pictures", "clips"], steps=300, batch=16, rate=3e-3)
    name, model = "stage2", first
    if not args.without:
        model = run.stage("stage1.5", first, "stage1.5", ["scenes"], steps=600, batch=8, rate=1e-3)
    else:
        name = "stage2-without-stage1.5"
    model = run.stage(name, model, "stage2", ["captions", "questions"], steps=9000, batch=8, rate=1e-3)
    run.report(name, model)


class Run:
    """The folder of one run, and what has been done in it."""

    def __init__(self, output: Path, scale: float, threads: int):
        self.output, self.scale, self.threads = output, scale, threads
        self.media = output / "media"
        self.media.mkdir(parents=True, exist_ok=True)
        self.steps: list[str] = []  # of this run: the one without stage 1.5 may share a folder with the whole one
        self.times_file = output / "seconds.json"
        self.times = json.loads(self.times_file.read_text()) if self.times_file.exists() else {}

    def scaled(self, number: int) -> int:
        return max(4, round(number * self.scale))

    def once(self, name: str, do, *args) -> None:
        """Does a step unless it is done, and keeps its seconds."""
        self.steps.append(name)
        if name in self.times:
            return
        print(f"--- {name}", flush=True)
        start = time.perf_counter()
        do(*args)
        self.times[name] = round(time.perf_counter() - start, 1)
        self.times_file.write_text(json.dumps(self.times, indent=2) + "\n")

    def command(self, *words: object) -> None:
        environment = {**os.environ, "OMP_NUM_THREADS": str(self.threads)}
        subprocess.run([sys.executable, "-m", "video_ma2mba.cli", *map(str, words)], env=environment, check=True)

    # --- the parts -----------------------------------------------------------------------------------------------

    def make_parts(self) -> None:
        """A model whose tower knows shapes and whose language model has read stories; the projector knows nothing."""
        set_seed(0)
        processor = build_processor()
        model = build_model(processor)
        teach_tower(model, processor, self.scaled(1500))
        folder = self.output / "untrained"
        model.save_pretrained(folder)
        processor.save_pretrained(folder)
        self.prepare("text", text_stories(self.scaled(20000)))
        self.train(
            "parts-text", folder, "stage2", ["text"], [], steps=2500, batch=8,
            rate=2e-3, more=["trains=[language_model]"],
        )  # fmt: skip
        (self.output / "parts-text" / "model").rename(self.output / "parts")

    # --- the data ------------------------------------------------------------------------------------------------

    def make_data(self) -> None:
        """Every set in the format of its publishers, and prepared; a tenth of it is held out."""
        for split, share, offset in (("", 1.0, 0), ("-held-out", 0.02, SEEDS["held out"])):
            counts = {name: max(4, self.scaled(int(share * number))) for name, number in COUNTS.items()}
            self.prepare(f"pictures{split}", pictures(self.media, counts["pictures"], offset))
            self.prepare(f"clips{split}", clips(self.media, counts["clips"], offset), "csv")
            self.prepare(f"scenes{split}", scenes(self.media, counts["scenes"], offset))
            self.prepare(f"captions{split}", captions(self.media, counts["captions"], offset))
            self.prepare(f"questions{split}", questions(self.media, counts["questions"], offset))

    def prepare(self, name: str, records: Iterator[dict], suffix: str = "jsonl") -> None:
        """Write the records as published, and prepare them with their frames stored."""
        file = self.output / "published" / f"{name}.{suffix}"
        file.parent.mkdir(exist_ok=True)
        rows = list(records)
        with file.open("w", encoding="utf-8", newline="") as stream:
            if suffix == "csv":
                writer = csv.DictWriter(stream, rows[0])
                writer.writeheader()
                writer.writerows(rows)
            else:
                stream.writelines(json.dumps(row) + "\n" for row in rows)
        self.command(
            "data", "prepare", file, "--media-root", self.media, "-o", self.output / "data" / name,
            "--cache-frames", "raw", "--model", self.output / "untrained",
        )  # fmt: skip

    # --- the stages ----------------------------------------------------------------------------------------------

    def stage(
        self, name: str, model: Path, recipe: str, data: list[str], *, steps: int, batch: int, rate: float
    ) -> Path:
        """Train by the recipe of a stage; returns the folder of its model."""
        held_out = [f"{one}-held-out" for one in data]
        self.once(name, lambda: self.train(name, model, recipe, data, held_out, steps=steps, batch=batch, rate=rate))
        return self.output / name / "model"

    def train(
        self, name: str, model: Path, recipe: str, data: list[str], held_out: list[str], *, steps: int, batch: int,
        rate: float, more: list[str] | None = None,
    ) -> None:  # fmt: skip
        folders = {key: [str(self.output / "data" / one) for one in names] for key, names in
                   (("data", data), ("evaluation_data", held_out))}  # fmt: skip
        values = {
            "model": model, "output": self.output / name, **{k: json.dumps(v) for k, v in folders.items()},
            # a model of half a million parameters wants larger steps than one of billions, and smaller batches
            "learning_rate": rate, "vision_learning_rate": rate / 10, "global_batch_size": batch,
            "device_batch_size": batch, "max_steps": self.scaled(steps), "adam_beta2": 0.98,
            "gradient_checkpointing": json.dumps({"sequence_interval": 256}),
            "save_steps": 1000, "logging_steps": 100, "num_workers": 0,
        }  # fmt: skip
        changes = [word for key, value in values.items() for word in ("--set", f"{key}={value}")]
        changes += [word for change in more or [] for word in ("--set", change)]
        self.command("train", f"0.7b-{recipe}", *changes, "--resume")

    # --- the answers ---------------------------------------------------------------------------------------------

    def report(self, name: str, folder: Path) -> None:
        """Ask fresh questions at the lengths of the training, and at four times its longest."""
        model = VideoMa2mbaForConditionalGeneration.from_pretrained(folder)
        processor = VideoMa2mbaProcessor.from_pretrained(folder)
        seconds = {step: self.times[step] for step in self.steps}
        result = {"seconds": seconds, "total_s": round(sum(seconds.values()), 1), "held_out_loss": {}}
        for stage in self.steps:
            file = self.output / stage / "train_report.json"
            if file.exists():
                result["held_out_loss"][stage] = json.loads(file.read_text())["held_out_loss"]
        result |= evaluate_lengths(model, processor, EVALUATION_SEED, LONGEST_S, NUM_QUESTIONS)
        (self.output / f"{name}.json").write_text(json.dumps(result, indent=2) + "\n")
        print(json.dumps(result, indent=2))


# --- the tower ----------------------------------------------------------------------------------------------------


def teach_tower(model, processor, steps: int) -> None:
    """Teach the tower to tell colours and shapes of single frames apart, as CLIP would have learnt it from captions."""
    rng = np.random.default_rng(0)
    frames, names = [], []
    for seed in range(SEEDS["tower"], SEEDS["tower"] + max(40, steps // 3)):
        story = make_story(seed, 30)
        for scene in story.scenes:
            second = int(rng.integers(scene.start_s, scene.end_s))
            frames.append(next(frame for i, frame in enumerate(story.iter_frames(1.0)) if i == second))
            names.append(scene.name)
    pixels = processor.video_processor.load(np.stack(frames)).frames
    classes = sorted(set(names))
    targets = torch.tensor([classes.index(name) for name in names])
    base = model.model
    head = torch.nn.Linear(base.config.vision_config.hidden_size, len(classes))
    parameters = [*base.vision_tower.parameters(), *head.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=1e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, total_steps=steps)
    for step in range(steps):
        picked = torch.from_numpy(rng.integers(len(pixels), size=64))
        logits = head(base._pooled_features(pixels[picked]).mean(dim=1))
        loss = F.cross_entropy(logits, targets[picked])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 100 == 99:
            right = (logits.argmax(dim=1) == targets[picked]).float().mean()
            print(f"tower, step {step + 1}: {right:.0%} of {len(classes)} classes right", flush=True)


# --- the sets, as they are published ------------------------------------------------------------------------------

COUNTS = {"pictures": 1500, "clips": 300, "scenes": 600, "captions": 8000, "questions": 8000}


def rendered(media: Path, name: str, story: Story) -> str:
    """The file of a story under the media root."""
    path = media / name
    if not path.exists():
        partial = path.with_name(f"partial-{path.name}")
        path.parent.mkdir(parents=True, exist_ok=True)
        story.render(partial)
        partial.replace(path)
    return name


def cast(story: Story) -> str:
    """Who came in, in order: what no question but `which_first` asks about all but the first."""
    debuts = [*story.debuts.items(), (story.circle.name, story.circle.start_s)]
    return ", ".join(name for name, _ in sorted(debuts, key=lambda debut: debut[1]))


def drawn_questions(story: Story, rng: np.random.Generator):
    """Questions for one conversation; a longer video bears more about its cast and about its order, learnt last."""
    appears, order = min(4, 2 + story.duration_s // 8), min(6, 2 + story.duration_s // 4)
    return story.questions(rng, dict.fromkeys(QUESTION_KINDS, 1) | {"ever_appears": appears, "which_first": order})


def text_stories(count: int) -> Iterator[dict]:
    """Stories told in words, a name for every second, then summed up or asked about: what a language model has read."""
    rng = np.random.default_rng(1)
    for i in range(count):
        story = make_story(SEEDS["text"] + i, int(rng.integers(3, 8 + 40 * i // count)))
        told = ", ".join(scene.name for scene in story.scenes for _ in range(scene.duration_s))
        turns = [(SUM_UP, cast(story))] if i % 2 else [(one.text, one.answer) for one in drawn_questions(story, rng)]
        messages = []
        for question, answer in turns:
            text = question if messages else f"{told}\n{question}"
            messages += [{"role": "user", "content": text}, {"role": "assistant", "content": answer}]
        yield {"id": f"text-{i}", "messages": messages}


def pictures(media: Path, count: int, offset: int) -> Iterator[dict]:
    """LLaVA-Pretrain: a picture and its caption."""
    rng = np.random.default_rng([2, offset])
    for i in range(count):
        story = make_story(SEEDS["pictures"] + offset + i, 6)
        number = int(rng.integers(len(story.scenes)))
        scene, frames = story.scenes[number], story.frames()
        name = f"images/{offset + i:09d}.png"
        (media / "images").mkdir(exist_ok=True)
        Image.fromarray(frames[scene.start_s]).save(media / name)
        turns = [{"from": "human", "value": "<image>\n"}, {"from": "gpt", "value": scene.name}]
        yield {"id": f"{offset + i:09d}", "image": name, "conversations": turns}


def clips(media: Path, count: int, offset: int) -> Iterator[dict]:
    """WebVid: short clips of the web, each with a caption."""
    for i in range(count):
        story = make_story(SEEDS["clips"] + offset + i, 3 + i % 4)
        video = str(offset + i)
        rendered(media, f"videos/000001_000050/{video}.mp4", story)
        yield {
            "videoid": video, "contentUrl": f"https://example.invalid/{video}.mp4",
            "duration": f"PT00H00M{story.duration_s:02d}S", "page_dir": "000001_000050",
            "name": ", ".join(scene.name for scene in story.scenes),
        }  # fmt: skip


def scenes(media: Path, count: int, offset: int) -> Iterator[dict]:
    """SceneWalk: long videos whose scenes have captions of their own."""
    rng = np.random.default_rng([3, offset])
    for i in range(count):
        # as many short videos as long ones, on a logarithmic scale
        duration_s = round(float(np.exp(rng.uniform(np.log(SHORTEST_S), np.log(LONGEST_S)))))
        story = make_story(SEEDS["scenes"] + offset + i, duration_s)
        video = rendered(media, f"yt_01/{offset + i}.mp4", story)
        rate = story.source_fps
        yield {
            "id": f"yt_01_{offset + i}", "video": video, "total_time": story.duration_s, "clip_num": len(story.scenes),
            "scenes": [{"start_frame": rate * scene.start_s, "end_frame": rate * scene.end_s, "start_fps": rate,
                        "end_fps": rate} for scene in story.scenes],
            "conversations": [turn for scene in story.scenes for turn in (
                {"from": "human", "value": f"<image>\n{DESCRIBE}"}, {"from": "gpt", "value": scene.name})],
        }  # fmt: skip


def instruction_video(media: Path, number: int) -> tuple[Story, str]:
    """A video of LLaVA-Video, which has a caption and questions; of all lengths alike."""
    duration_s = int(np.random.default_rng([4, number]).integers(SHORTEST_S, LONGEST_S + 1))
    story = make_story(SEEDS["questions"] + number, duration_s)
    rendered(media, f"stories/{number}.mp4", story)
    return story, f"{number}.mp4"


def captions(media: Path, count: int, offset: int) -> Iterator[dict]:
    """LLaVA-Video, captions: who came in, in order."""
    for number in range(offset, offset + count):
        story, video = instruction_video(media, number)
        turns = [{"from": "human", "value": f"<image>\n{SUM_UP}"}, {"from": "gpt", "value": cast(story)}]
        yield {"id": f"caption-{number}", "data_source": "stories", "video": video, "conversations": turns}


def questions(media: Path, count: int, offset: int) -> Iterator[dict]:
    """LLaVA-Video, open-ended: one record a question, several about each video."""
    rng = np.random.default_rng([5, offset])
    for number in range(offset, offset + count):
        story, video = instruction_video(media, number)
        for i, question in enumerate(drawn_questions(story, rng)):
            turns = [{"from": "human", "value": f"<image>\n{question.text}"}, {"from": "gpt", "value": question.answer}]
            yield {"id": f"open-{number}-{i}", "data_source": "stories", "video": video, "conversations": turns}


if __name__ == "__main__":
    main()
