"""What a question costs after minutes and after an hour of video: our memory against an attention model's.

Three things in one run, on synthetic videos and the tiny model (or --model):
- bytes of the memory and seconds of a second question, by minutes of video; and the same of a Llama of equal size from
  transformers with random weights, fed the very same embeddings, which keeps keys and values;
- the peak of resident memory of `watch` above the loaded model, one not so tiny, each length in a process of its own;
- whether decoding overlaps with reading: `watch` against decoding first and encoding then.
"""

import argparse
import json
import statistics
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import torch

from .. import VideoMa2mbaForConditionalGeneration, VideoMa2mbaProcessor, VideoMa2mbaVideoProcessor, VideoMemory
from ..data.synthetic import make_story
from ..files import new_figure, write_png
from ..loading import TINY_MODEL, find_model, natural, output_file
from ..planning.measured import peak_bytes, restart_peak
from .machine import clock, describe, in_measured_process, one_thread
from .train import small_config

QUESTION = "What colour was the circle?"
NEW_TOKENS = 8
OVERLAP_MINUTES = 10


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", default=str(TINY_MODEL), help="folder or Hub id (default: the tiny model)")
    parser.add_argument("--minutes", type=natural, nargs="+", default=[1, 5, 15, 30, 60])
    parser.add_argument(
        "--repeats", type=natural, default=21, help="timed questions of each, after one that is not timed"
    )
    parser.add_argument("--size", type=natural, default=320, help="pixels of a frame of the video for the overlap")
    parser.add_argument("--plot", type=output_file, metavar="PNG", help="draw bytes and seconds against minutes")


def run(args: argparse.Namespace) -> dict[str, Any]:
    args.model = find_model(args.model)
    model = VideoMa2mbaForConditionalGeneration.from_pretrained(args.model).eval()
    processor = VideoMa2mbaProcessor.from_pretrained(args.model)
    with tempfile.TemporaryDirectory() as folder:
        videos = {m: _video(Path(folder), 60 * m, 64) for m in args.minutes}
        rows = _ask(model, processor, videos, args.repeats)
        for row in rows:
            row["watch_peak_bytes"] = in_measured_process(__name__, args.model, videos[row["minutes"]])
        overlap = _overlap(processor, _video(Path(folder), 60 * OVERLAP_MINUTES, args.size))
    first, last = rows[0], rows[-1]
    result = {
        "benchmark": "memory-of-video",
        "model": Path(args.model).name,
        "num_parameters": model.num_parameters(),
        "rows": rows,
        "question_ratio": last["question_s"] / first["question_s"],
        "attention_question_ratio": last["attention_question_s"] / first["attention_question_s"],
        "overlap": overlap,
        "machine": describe("cpu"),
    }
    if args.plot is not None:
        _plot(rows, args.plot)
    return result


def _video(folder: Path, seconds: int, size: int) -> Path:
    path = folder / f"{seconds}s-{size}.mp4"
    return path if path.exists() else make_story(seed=1, duration_s=seconds, size=size).render(path)


def _ask(model: Any, processor: Any, videos: dict[int, Path], repeats: int) -> list[dict[str, Any]]:
    """Bytes and seconds per question of both models; the lengths are asked in turns, so that all see one machine."""
    attention = attention_of_size(model)
    memories, caches = {}, {}
    for minutes, video in videos.items():
        memories[minutes] = VideoMemory(model, processor)
        memories[minutes].watch(video)
        caches[minutes] = attention_cache(attention, model, processor, memories[minutes], video)
    times: dict[tuple[str, int], list[float]] = {}
    for turn in range(repeats + 1):
        for minutes in videos:
            works = {
                "ours": partial(memories[minutes].ask, QUESTION, max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS),
                "attention": partial(_ask_attention, attention, processor, *caches[minutes]),
            }
            for name, work in works.items():
                seconds = clock(work, "cpu").seconds
                if turn:
                    times.setdefault((name, minutes), []).append(seconds)
    return [
        {
            "minutes": minutes,
            "num_tokens": memories[minutes].num_tokens,
            "memory_bytes": memories[minutes].num_bytes,
            "attention_bytes": sum(layer.keys.nbytes + layer.values.nbytes for layer in caches[minutes][0].layers),
            "question_s": statistics.median(times["ours", minutes]),
            "attention_question_s": statistics.median(times["attention", minutes]),
        }
        for minutes in videos
    ]


def attention_of_size(model: Any) -> Any:
    """A Llama with the hidden width of our backbone and about its number of parameters."""
    from transformers import LlamaConfig, LlamaForCausalLM

    ours, text = sum(p.numel() for p in model.model.language_model.layers.parameters()), model.config.text_config
    hidden, layers = text.hidden_size, text.num_hidden_layers
    # attention takes 4 h^2 of a layer, its feed-forward 3 h i
    intermediate = max(16, round((ours / layers - 4 * hidden**2) / (3 * hidden)))
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=hidden, num_hidden_layers=layers, intermediate_size=intermediate, vocab_size=text.vocab_size,
        num_attention_heads=max(1, hidden // 64), max_position_embeddings=2**20, tie_word_embeddings=True,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


@torch.no_grad()
def attention_cache(attention: Any, model: Any, processor: Any, memory: VideoMemory, video: Path) -> tuple[Any, int]:
    """Keys and values of the frames' embeddings, and how many tokens they are."""
    from transformers import DynamicCache

    cache = DynamicCache(config=attention.config)
    for start in range(0, memory.num_frames, 512):
        frames = processor.video_processor.load(video, start_s=float(start), end_s=float(start + 512)).frames
        embeddings = model.get_video_features(frames).pooler_output.flatten(0, 1)[None]
        attention(inputs_embeds=embeddings, past_key_values=cache, use_cache=True, logits_to_keep=1)
    return cache, cache.get_seq_length()


@torch.no_grad()
def _ask_attention(attention: Any, processor: Any, cache: Any, num_tokens: int) -> None:
    """As many steps as `ask` takes, greedy; then the cache is as it was."""
    ids = processor.tokenizer(f"\n{QUESTION}<|assistant|>", return_tensors="pt")["input_ids"]
    for _ in range(NEW_TOKENS):
        logits = attention(ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
        ids = logits[:, -1:].argmax(-1)
    cache.crop(num_tokens - cache.get_seq_length())


def _larger(tiny: Any) -> tuple[Any, Any]:
    """A model with random weights that takes about as long to read a frame as the decoder takes to give it."""
    torch.manual_seed(0)
    processor = VideoMa2mbaProcessor(tiny.tokenizer, VideoMa2mbaVideoProcessor(size=112), patch_size=14)
    tower = {"hidden_size": 192, "intermediate_size": 768, "num_hidden_layers": 4, "num_attention_heads": 3}
    tokenizer = processor.tokenizer
    config = small_config(
        192, tower | {"image_size": 112, "patch_size": 14}, 4,
        vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    config.video_token_id, config.image_token_id = processor.video_token_id, processor.image_token_id
    config.vision_chunk_size = 32
    return VideoMa2mbaForConditionalGeneration(config).eval(), processor


def _overlap(tiny: Any, video: Path) -> dict[str, Any]:
    """Seconds of `watch`, and of decoding all and encoding all after each other, by a model that is not so tiny."""
    model, processor = _larger(tiny)
    with one_thread():  # one thread reads and one decodes
        VideoMemory(model, processor).watch(video, 1.0, max_duration_s=30.0)  # not timed
        decode_s, _, loaded = clock(lambda: processor.video_processor.load(video, fps=1.0), "cpu")
        encode_s = clock(lambda: VideoMemory(model, processor).push_frames(loaded.frames), "cpu").seconds
        watch_s = clock(lambda: VideoMemory(model, processor).watch(video, 1.0), "cpu").seconds
    return {
        "minutes": OVERLAP_MINUTES, "decode_s": decode_s, "encode_s": encode_s, "watch_s": watch_s,
        "ratio": watch_s / (decode_s + encode_s),
    }  # fmt: skip


def _plot(rows: list[dict[str, Any]], path: Path) -> None:
    figure, (left, right) = new_figure(10, 4, 1, 2)
    minutes = [row["minutes"] for row in rows]
    for axes, ours, theirs, label, scale in (
        (left, "memory_bytes", "attention_bytes", "MiB kept", 2**20),
        (right, "question_s", "attention_question_s", "seconds per question", 1),
    ):
        axes.plot(minutes, [row[ours] / scale for row in rows], "o-", label="Mamba-2, video memory")
        axes.plot(minutes, [row[theirs] / scale for row in rows], "s--", label="attention of equal size")
        axes.set(xlabel="minutes of video", ylabel=label)
        axes.set_ylim(bottom=0)
        axes.legend()
    write_png(path, figure)


def _peak_of_watching(name: str, video: str) -> int:
    """The peak of memory of `watch` above the loaded model."""
    model, processor = _larger(VideoMa2mbaProcessor.from_pretrained(name))
    VideoMemory(model, processor).watch(video, end_s=50.0)  # loads what is loaded late
    before = restart_peak(model.device)
    VideoMemory(model, processor).watch(video)
    return peak_bytes(model.device) - before


if __name__ == "__main__":
    print(json.dumps(_peak_of_watching(*sys.argv[1:])))
