"""Answering: tokens per second of prefill, seconds per new token by the length of the context, frames per second.

The past of the model is a state of one size, so a new token must cost the same after a thousand tokens as after a
million. Contexts are random text, prefilled in chunks. New tokens of all contexts are timed in turns, one by one, and
their median is given.
"""

import argparse
from functools import partial
from typing import Any

import torch

from ..loading import natural
from .machine import clock, describe, timing
from .train import add_model_arguments, make_model


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_arguments(parser)
    parser.add_argument("--contexts", type=natural, nargs="+", default=[2**10, 2**14], metavar="TOKENS")
    parser.add_argument(
        "--new-tokens", type=natural, default=50, help="timed after each context (default: %(default)s)"
    )
    parser.add_argument("--frames", type=natural, default=16, help="through the tower (default: %(default)s)")


@torch.inference_mode()
def run(args: argparse.Namespace) -> dict[str, Any]:
    model = make_model(args).eval()
    rows, caches = [], {}
    for context in args.contexts:
        ids = torch.randint(2, 500, (1, context), device=args.device)
        model(ids[:, :64], use_cache=True)  # warms up
        seconds, _, output = clock(partial(model, ids, use_cache=True, logits_to_keep=1), args.device)
        caches[context] = output.cache
        rows.append({"context_tokens": context, "prefill_s": seconds, "prefill_tokens_per_s": context / seconds})
    token = torch.full((1, 1), 3, device=args.device)
    times: dict[int, list[float]] = {context: [] for context in caches}
    for turn in range(args.new_tokens + 3):
        for context, cache in caches.items():
            took = clock(partial(model, token, cache=cache, use_cache=True), args.device)
            if turn >= 3:
                times[context].append(took.seconds)
    for row in rows:
        row |= timing("s_per_new_token", times[row["context_tokens"]])
        row["cache_bytes"] = caches[row["context_tokens"]].num_bytes
    size = 1, args.frames, 3, *2 * [model.config.vision_config.image_size]
    pixels = torch.randint(0, 256, size, dtype=torch.uint8, device=args.device)
    model.get_video_features(pixels[:, :1])
    seconds = clock(partial(model.get_video_features, pixels), args.device).seconds
    return {
        "benchmark": "generate",
        "model": args.model,
        "dtype": str(model.dtype).removeprefix("torch."),
        "rows": rows,
        "longest_over_shortest_context": rows[-1]["s_per_new_token"] / rows[0]["s_per_new_token"],
        "frames_per_s": args.frames / seconds,
        "machine": describe(args.device),
    }
