"""Train the tiny Video-Ma²mba of `model_cards/video-ma2mba-tiny` from random weights with the stock Trainer.

    python examples/train_tiny.py                           # train, evaluate, save: some half an hour on 2 CPU cores
    python examples/train_tiny.py --evaluate-only --seed 1  # ask it 200 fresh questions, and 200 at 4x the length

The videos are synthetic stories (`video_ma2mba.data.synthetic`): one coloured shape after another, among them one
circle. All questions about one story make one chat of several turns, in random order, as in the paper's stage 2: the
video is paid for once. The training begins with single pictures to be named, as the paper's begins with captions; then
videos grow from three seconds to three minutes. Part of them were encoded as H.264 and decoded by the processor, once,
before the training starts; the rest are drawn afresh for every step. The checkpoint that is kept took two more rounds
with `--continue-from`; its card has their commands.
"""

import argparse
import itertools
import json
import shutil
import tempfile
import time
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.utils.data import IterableDataset
from transformers import (
    CLIPVisionConfig,
    GenerationConfig,
    Mamba2Config,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
    set_seed,
)

from video_ma2mba import (
    VideoMa2mbaConfig,
    VideoMa2mbaForConditionalGeneration,
    VideoMa2mbaProcessor,
    VideoMa2mbaVideoProcessor,
    VideoMemory,
)
from video_ma2mba.data.synthetic import QUESTION_KINDS, Question, Story, make_story

CARD = Path(__file__).parents[1] / "model_cards" / "video-ma2mba-tiny"
FRAME_SIZE, PATCH_SIZE = 32, 16  # pixels: 2 x 2 patches, pooled to one token a frame
LONGEST_S = 180
H264_DURATIONS_S = (6, 15, 30, 60, 90, 120, 150, 180)
H264_SHARE = 0.4  # of the batches, where a cached video has the right length


class Stage(NamedTuple):
    """Part of the training, with videos of `shortest_s` to `longest_s` seconds; 0 means pictures to be named."""

    share_of_steps: float
    shortest_s: int
    longest_s: int
    batch_size: int


# Every batch costs about the same. Looks are learnt from pictures, recall from seconds, memory from minutes.
CURRICULUM = (
    Stage(0.09, 0, 0, 12),
    Stage(0.25, 3, 8, 10),
    Stage(0.26, 8, 30, 7),
    Stage(0.20, 30, 90, 5),
    Stage(0.20, 60, LONGEST_S, 4),
)
PICTURES_PER_CHAT = 6
# Seeds of stories: training counts up from 0, the H.264 videos from here, evaluations from twice this on.
H264_SEED, EVALUATION_SEED = 10**8, 2 * 10**8


# --- the model and its processor ----------------------------------------------------------------------------------


def build_processor() -> VideoMa2mbaProcessor:
    """A byte-level BPE tokenizer trained on the questions and answers, and frames of FRAME_SIZE pixels."""
    rng = np.random.default_rng(0)
    questions = [question for seed in range(300) for question in make_story(seed, 30).questions(rng)]
    texts = [text for question in questions for text in (question.text, question.answer)]
    texts += 100 * ["<|system|>", "<|user|>", "<|assistant|>", "You are a helpful assistant."]

    tokenizer = Tokenizer(models.BPE())
    words = Regex(r"<\|[a-z]+\|>| ?[A-Za-z]+|\s|[^\sA-Za-z]+")  # a chat tag, a word, a space, the rest
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(words, behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    special_tokens = ["<|endoftext|>", "<|padding|>", "<video>", "<image>"]
    tokenizer.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=480,
            special_tokens=special_tokens,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    return VideoMa2mbaProcessor(
        PreTrainedTokenizerFast(
            tokenizer_object=tokenizer, eos_token="<|endoftext|>", pad_token="<|padding|>", padding_side="left"
        ),
        VideoMa2mbaVideoProcessor(size=FRAME_SIZE, image_mean=[0.25] * 3, image_std=[0.25] * 3),
        patch_size=PATCH_SIZE,
        spatial_pool_stride=2,
    )


def build_model(processor: VideoMa2mbaProcessor) -> VideoMa2mbaForConditionalGeneration:
    """A Video-Ma²mba of 0.6 M parameters with random weights."""
    vocab_size = -(-len(processor.tokenizer) // 16) * 16
    config = VideoMa2mbaConfig(
        text_config=Mamba2Config(
            hidden_size=128,
            num_hidden_layers=4,
            num_heads=4,
            head_dim=32,
            state_size=64,
            n_groups=1,
            expand=1,
            time_step_min=0.003,  # at first heads forget after some 1 to 300 tokens: short recall is learnt quickly,
            time_step_max=0.3,  # and what to keep for longer follows
            chunk_size=64,
            vocab_size=vocab_size,
            tie_word_embeddings=True,
            bos_token_id=processor.tokenizer.eos_token_id,
            eos_token_id=processor.tokenizer.eos_token_id,
            pad_token_id=processor.tokenizer.pad_token_id,
        ),
        vision_config=CLIPVisionConfig(
            hidden_size=96,
            intermediate_size=192,
            num_hidden_layers=3,  # the last one is not used: features come from the penultimate layer
            num_attention_heads=3,
            image_size=FRAME_SIZE,
            patch_size=PATCH_SIZE,
            projection_dim=96,
        ),
        video_token_id=processor.video_token_id,
        image_token_id=processor.image_token_id,
        image_mean=processor.video_processor.image_mean,
        image_std=processor.video_processor.image_std,
        vision_chunk_size=256,
    )
    model = VideoMa2mbaForConditionalGeneration(config)
    model.generation_config = GenerationConfig(
        max_new_tokens=16,
        do_sample=False,
        bos_token_id=config.text_config.bos_token_id,
        eos_token_id=config.text_config.eos_token_id,
        pad_token_id=config.text_config.pad_token_id,
    )
    return model


# --- the data -----------------------------------------------------------------------------------------------------


def decode_story(story: Story, processor: VideoMa2mbaProcessor) -> torch.Tensor:
    """Encode a story as H.264, read it back at 1 FPS: uint8 (frames, 3, FRAME_SIZE, FRAME_SIZE)."""
    with tempfile.TemporaryDirectory() as folder:
        return processor.video_processor.load(story.render(Path(folder) / "story.mp4"), fps=1.0).frames


def cache_h264_stories(folder: Path, per_duration: int, processor: VideoMa2mbaProcessor) -> dict[int, list[Path]]:
    """Decode `per_duration` H.264 videos of each length once; later runs find them in the folder.

    Returns:
        For every length in seconds the files, one story each, uint8 (frames, 3, FRAME_SIZE, FRAME_SIZE).
    """
    folder.mkdir(parents=True, exist_ok=True)
    cache: dict[int, list[Path]] = {}
    for duration_s in H264_DURATIONS_S:
        for i in range(per_duration):
            story = make_story(H264_SEED + i, duration_s)
            path = folder / f"{duration_s}s-{i:04d}-{zlib.crc32(repr(story).encode()):08x}.npy"  # of this very story
            if not path.exists():
                frames = decode_story(story, processor)
                partial = path.with_suffix(".partial.npy")
                np.save(partial, frames.numpy())
                partial.replace(path)
            cache.setdefault(duration_s, []).append(path)
    return cache


def as_chat(frames: torch.Tensor | np.ndarray, questions: list[Question]) -> list[dict]:
    """Questions about one video as a chat: the video stands before the first question."""
    messages = []
    for question in questions:
        content = [{"type": "text", "text": question.text}]
        messages += [{"role": "user", "content": content}, {"role": "assistant", "content": question.answer}]
    messages[0]["content"].insert(0, {"type": "video", "video": frames})
    return messages


def draw_questions(story: Story, rng: np.random.Generator, most: int = 4) -> list[Question]:
    """Questions for one chat; a longer video bears more of them about its cast, up to `most` of a kind."""
    repeats = min(most, 2 + story.duration_s // 8)
    return story.questions(rng, dict.fromkeys(QUESTION_KINDS, 1) | {"ever_appears": repeats, "which_first": repeats})


class Chats(IterableDataset):
    """Endless batches of chats. Each batch keeps to one length, and the lengths grow with the steps done.

    Args:
        cache: Files of decoded frames by length in seconds, from `cache_h264_stories`.
        stages: Parts of the curriculum; their shares of the steps are brought to a sum of one.
        num_steps: Batches until the end of the last stage.
        most_questions: How many questions of one kind a chat may hold.
        seed: Of lengths and questions, and of the first fresh story.
    """

    def __init__(
        self, cache: dict[int, list[Path]], stages: Sequence[Stage], num_steps: int, most_questions: int, seed: int
    ):
        self.cache, self.stages, self.num_steps = cache, stages, num_steps
        self.most_questions, self.seed = most_questions, seed
        self.next_story = seed * 10**6

    def __iter__(self) -> Iterator[list[list[dict]]]:
        rng = np.random.default_rng([self.seed, 2])
        ends = np.cumsum([stage.share_of_steps for stage in self.stages])
        ends *= self.num_steps / ends[-1]
        for step in itertools.count():
            stage = self.stages[min(int(np.searchsorted(ends, step, side="right")), len(self.stages) - 1)]
            cached = [duration_s for duration_s in self.cache if stage.shortest_s <= duration_s <= stage.longest_s]
            if stage.longest_s == 0:
                yield [self._pictures(rng) for _ in range(stage.batch_size)]
                continue
            if cached and rng.random() < H264_SHARE:
                videos = (self._cached(int(rng.choice(cached)), rng) for _ in range(stage.batch_size))
            else:
                duration_s = int(rng.integers(stage.shortest_s, stage.longest_s + 1))
                stories = [make_story(self.next_story + i, duration_s) for i in range(1, stage.batch_size + 1)]
                videos = ((story, story.frames()) for story in stories)
                self.next_story += stage.batch_size
            yield [as_chat(frames, draw_questions(story, rng, self.most_questions)) for story, frames in videos]

    def _pictures(self, rng: np.random.Generator) -> list[dict]:
        """Seconds of one cached video, the circle's among them, as videos of one frame, each answered by its name."""
        duration_s = int(rng.choice(list(self.cache)))
        story, frames = self._cached(duration_s, rng)
        messages = []
        seconds = [story.circle.start_s, *rng.choice(duration_s, size=PICTURES_PER_CHAT - 1, replace=False).tolist()]
        for second in rng.permutation(seconds).tolist():
            scene = next(scene for scene in story.scenes if second < scene.end_s)
            picture = {"type": "video", "video": frames[second : second + 1]}
            messages += [{"role": "user", "content": [picture]}, {"role": "assistant", "content": scene.name}]
        return messages

    def _cached(self, duration_s: int, rng: np.random.Generator) -> tuple[Story, torch.Tensor]:
        number = int(rng.integers(len(self.cache[duration_s])))
        frames = torch.from_numpy(np.load(self.cache[duration_s][number]))
        return make_story(H264_SEED + number, duration_s), frames


# --- evaluation ---------------------------------------------------------------------------------------------------


def evaluate(
    model, processor, seed: int, shortest_s: int, longest_s: int, num_questions: int = 200
) -> dict[str, float]:
    """Ask fresh questions one by one, each in a prompt of its own, about H.264 videos; same number of each kind.

    A video is watched once, and all that is asked about it is answered from the states it left.

    Returns:
        Accuracy per kind of question, and "all".
    """
    model.eval()
    rng = np.random.default_rng([seed, 3])
    right: dict[str, list[bool]] = {kind: [] for kind in QUESTION_KINDS}
    for i in range(num_questions // len(QUESTION_KINDS)):
        duration_s = int(rng.integers(shortest_s, longest_s + 1))
        # hours are encoded at the rate at which they are watched: four times as many pictures would only take longer
        story = make_story(
            EVALUATION_SEED + seed * 10**6 + longest_s * 1000 + i, duration_s, source_fps=4 if duration_s < 3600 else 1
        )
        questions = [story.question(kind, rng) for kind in QUESTION_KINDS]
        memory = VideoMemory(model, processor)
        with tempfile.TemporaryDirectory() as folder:
            memory.watch(story.render(Path(folder) / "story.mp4"))
        for question, answer in zip(questions, memory.ask([question.text for question in questions]), strict=True):
            right[question.kind].append(answer == question.answer)
    accuracy = {kind: float(np.mean(values)) for kind, values in right.items()}
    return accuracy | {"all": float(np.mean([value for values in right.values() for value in values]))}


def evaluate_lengths(
    model, processor, seed: int, longest_s: int = LONGEST_S, num_questions: int = 200, beyond_s: Sequence[int] = ()
) -> dict:
    """Accuracy at the lengths of the training, from 8 s, at four times its longest, and beyond; prints a line each."""
    results: dict = {"seed": seed, "questions_per_length": num_questions}
    spans = {"training lengths": (8, longest_s), "four times the longest": (4 * longest_s, 4 * longest_s)}
    for name, span_s in (spans | {f"{video_s} s": (video_s, video_s) for video_s in beyond_s}).items():
        accuracy = evaluate(model, processor, seed, *span_s, num_questions)
        results[name] = {"video_s": span_s, "accuracy": accuracy}
        print(f"{name}:", ", ".join(f"{kind} {accuracy[kind]:.1%}" for kind in (*QUESTION_KINDS, "all")), flush=True)
    return results


# --- training and saving ------------------------------------------------------------------------------------------


def train(model, processor, args: argparse.Namespace) -> dict:
    """Train with the stock Trainer. The data set yields whole batches, so one of its items is a batch of the Trainer.

    Returns:
        Steps, wall-clock seconds and processor seconds, H.264 encoding and decoding included.
    """
    start_s, start_cpu_s = time.perf_counter(), time.process_time()
    # a further round needs no pictures, but all lengths again
    stages = CURRICULUM if args.continue_from is None else CURRICULUM[1:]
    cache = cache_h264_stories(args.output / "h264_frames", args.h264_videos, processor)

    def collate(items: list[list[list[dict]]]) -> dict[str, torch.Tensor]:
        (chats,) = items
        return processor.apply_chat_template(chats, tokenize=True, return_labels=True, padding_side="right").data

    Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=str(args.output / "checkpoints"),
            max_steps=args.steps,
            per_device_train_batch_size=1,
            learning_rate=args.learning_rate,
            lr_scheduler_type="cosine",
            warmup_steps=30,
            adam_beta2=0.98,
            weight_decay=0.05,
            max_grad_norm=1.0,
            logging_steps=50,
            save_steps=500,
            save_total_limit=1,
            remove_unused_columns=False,  # a chat has no columns
            accelerator_config={"dispatch_batches": False},
            dataloader_pin_memory=False,
            use_cpu=True,
            seed=args.seed,
        ),
        train_dataset=Chats(cache, stages, args.steps, args.most_questions, args.seed),
        data_collator=collate,
    ).train()
    return {
        "steps": args.steps,
        "parameters": model.num_parameters(),
        "wall_s": round(time.perf_counter() - start_s),
        "processor_s": round(time.process_time() - start_cpu_s),
        "threads": torch.get_num_threads(),
    }


def save(model, processor, folder: Path) -> None:
    """Write the Hub folder beside its place, then move it there: it is never half written. Its README.md is kept."""
    partial, old = (folder.with_name(folder.name + suffix) for suffix in (".partial", ".old"))
    shutil.rmtree(partial, ignore_errors=True)
    model.save_pretrained(partial)
    processor.save_pretrained(partial)
    if folder.exists():
        if (folder / "README.md").exists():
            shutil.copy(folder / "README.md", partial)
        folder.rename(old)
    partial.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--evaluate-only", action="store_true", help="do not train; ask the model in --model")
    parser.add_argument("--beyond", type=int, nargs="*", default=[], metavar="SECONDS", help="ask at these lengths too")
    parser.add_argument("--seed", type=int, default=0, help="of the weights and videos, or of the evaluation's videos")
    parser.add_argument("--steps", type=int, default=5000, help="default: %(default)s")
    parser.add_argument("--learning-rate", type=float, default=1e-3, help="default: %(default)s")
    parser.add_argument("--most-questions", type=int, default=4, help="of one kind in a chat, default: %(default)s")
    parser.add_argument("--continue-from", type=Path, metavar="DIR", help="a further round, from a trained model")
    parser.add_argument("--h264-videos", type=int, default=40, help="per length, default: %(default)s")
    parser.add_argument("--threads", type=int, default=2, help="default: %(default)s")
    parser.add_argument("--output", type=Path, default=Path("train_tiny_output"), help="frames, checkpoints, reports")
    parser.add_argument(
        "--model", type=Path, default=CARD, help="where the model is saved, or read for --evaluate-only"
    )
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    set_seed(args.seed)
    args.output.mkdir(parents=True, exist_ok=True)

    report = {}
    if args.evaluate_only:
        model = VideoMa2mbaForConditionalGeneration.from_pretrained(args.model)
        processor = VideoMa2mbaProcessor.from_pretrained(args.model)
    else:
        if args.continue_from is None:
            processor = build_processor()
            model = build_model(processor)
        else:
            processor = VideoMa2mbaProcessor.from_pretrained(args.continue_from)
            model = VideoMa2mbaForConditionalGeneration.from_pretrained(args.continue_from)
        report["training"] = train(model, processor, args)
        save(model, processor, args.model)
    report["evaluation"] = evaluate_lengths(model, processor, args.seed, beyond_s=args.beyond)
    name = "evaluation" if args.evaluate_only else "training"
    (args.output / f"{name}_seed{args.seed}.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(report))


if __name__ == "__main__":
    main()
