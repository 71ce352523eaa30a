"""What only a GPU can tell, each measured by itself: launches, decoding, watching, and what offload costs.

    video-ma2mba bench device launches --device cuda --model 3.1b

- launches: kernels that the profiler sees of one layer, by tokens, beside the number that the planner goes by
- decode: new tokens a second, step by step and as a captured graph, and of mamba_ssm's own generation where it is there
- watch: frames a second of a video memory, pictures in memory
- offload: a training step with what crosses borders in host memory over the same step without

On a CPU a small model goes through the same, where all operators count as launches and nothing is captured.
"""

import argparse
import importlib
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from ..loading import TINY_MODEL, choose_device, natural
from ..modeling.checkpoint_costs import LAUNCHES
from .machine import clock, describe, timing
from .train import add_model_arguments, backbone_config, make_model, random_text, training_step

WHAT = ("launches", "decode", "watch", "offload")
MAMBA_SSM = "mamba_ssm.models.mixer_seq_simple"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("what", choices=WHAT)
    add_model_arguments(parser)
    parser.add_argument("--tokens", type=natural, nargs="+", default=[2048, 24576], help="of launches and offload")
    parser.add_argument("--new-tokens", type=natural, default=100, help="of decode (default: %(default)s)")
    parser.add_argument("--frames", type=natural, default=256, help="of watch (default: %(default)s)")
    parser.add_argument("--repeats", type=natural, default=3)


def run(args: argparse.Namespace) -> dict[str, Any]:
    device = choose_device(args.device)
    measured = {"launches": _launches, "decode": _decode, "watch": _watch, "offload": _offload}[args.what](args, device)
    return {"benchmark": "device", "what": args.what, "model": args.model, **measured, "machine": describe(device.type)}


# --- launches --------------------------------------------------------------------------------------------------------


def _count(work: Callable[[], Any], device: torch.device) -> int:
    work()  # compiles, and chooses among kernels
    kind = torch.autograd.DeviceType.CUDA if device.type == "cuda" else torch.autograd.DeviceType.CPU
    with torch.profiler.profile(activities=[getattr(torch.profiler.ProfilerActivity, kind.name)]) as profile:
        work()
        if device.type == "cuda":
            torch.cuda.synchronize()
    return sum(event.device_type() == kind for event in profile.profiler.kineto_results.events())


def _launches(args: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    layer = make_model(args).model.language_model.layers[0]
    width, rows = layer.mixer.in_proj.in_features, []
    for tokens in (1, *args.tokens):
        hidden = torch.randn(1, tokens, width, device=device, dtype=torch.float32)
        state = layer.mixer.new_state(1)

        def forward(hidden: torch.Tensor = hidden, state: Any = state) -> torch.Tensor:
            return layer(hidden, state)[0]

        def both(hidden: torch.Tensor = hidden, forward: Any = forward) -> None:
            leaf = hidden.detach().requires_grad_()
            forward(leaf).sum().backward()

        row: dict[str, Any] = {"tokens": tokens}
        with torch.no_grad():
            row["forward"] = _count(forward, device)
        if tokens > 1:
            row["forward_backward"] = _count(both, device)
            row["with_recompute"] = row["forward"] + row["forward_backward"]
            row["planned"] = LAUNCHES
        rows.append(row)
    return {"rows": rows}


# --- decoding --------------------------------------------------------------------------------------------------------


@torch.no_grad()
def _decode(args: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    model = make_model(args).eval()
    token = torch.full((1, 1), 3, device=device)
    past = torch.randint(2, 500, (1, 64), device=device)
    cache = model(past, use_cache=True, logits_to_keep=1).cache
    ways: dict[str, Callable[[], Any]] = {"step by step": lambda: model(token, cache=cache, use_cache=True)}
    failures: dict[str, str] = {}
    for name, make in (("captured graph", _captured), ("mamba_ssm", _mamba_ssm)):
        try:
            ways[name] = make(model, past, token)
        except Exception as error:  # a way that is not to be had here: the others are still measured
            failures[name] = f"{type(error).__name__}: {error}"[:300]
    rows = []
    for name, step in ways.items():
        for _ in range(3):
            step()
        times = [clock(step, device.type).seconds for _ in range(args.new_tokens)]
        taken = timing("s_per_new_token", times)
        rows.append({"way": name, "tokens_per_s": 1 / taken["s_per_new_token"], **taken})
    return {"rows": rows, "failures": failures}


def _captured(model: Any, past: torch.Tensor, token: torch.Tensor) -> Callable[[], Any]:
    """One step as a graph, which writes the new states in the places of the old."""
    if token.device.type != "cuda":
        raise ValueError("graphs are captured on a GPU")
    backbone = model.model.language_model
    cache = model(past, use_cache=True, logits_to_keep=1).cache
    kept = [tuple(state.clone() for state in layer) for layer in cache.layers]
    embeds = backbone.embeddings(token)

    def step() -> torch.Tensor:
        cache.layers = [type(layer)(*states) for layer, states in zip(cache.layers, kept, strict=True)]
        logits = model.lm_head(backbone(embeds, cache))
        for states, layer in zip(kept, cache.layers, strict=True):
            for old, new in zip(states, layer, strict=True):
                if old is not new:
                    old.copy_(new)
        return logits

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


def _mamba_ssm(model: Any, past: torch.Tensor, token: torch.Tensor) -> Callable[[], Any]:
    """mamba_ssm's own model of this size, decoding as its `generate(cg=True)` does."""
    theirs = importlib.import_module(MAMBA_SSM)
    configured = importlib.import_module("mamba_ssm.models.config_mamba").MambaConfig
    generation = importlib.import_module("mamba_ssm.utils.generation")
    text = model.config.text_config
    config = configured(
        d_model=text.hidden_size, n_layer=text.num_hidden_layers, vocab_size=text.vocab_size,
        ssm_cfg={"layer": "Mamba2"}, pad_vocab_size_multiple=16,
    )  # fmt: skip
    peer = theirs.MambaLMHeadModel(config, device=token.device, dtype=model.dtype).eval()
    length = past.shape[1] + 100_000
    cache = generation.update_graph_cache(peer, None, 1, past.shape[1], length)
    position = torch.full_like(token, past.shape[1])
    return lambda: cache.run(token, position, past.shape[1])


# --- watching --------------------------------------------------------------------------------------------------------


@torch.no_grad()
def _watch(args: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    from .. import VideoMa2mbaProcessor, VideoMa2mbaVideoProcessor, VideoMemory

    vision = backbone_config(args.model).vision_config
    tokenizer = VideoMa2mbaProcessor.from_pretrained(TINY_MODEL).tokenizer
    processor = VideoMa2mbaProcessor(
        tokenizer, VideoMa2mbaVideoProcessor(size=vision.image_size), patch_size=vision.patch_size
    )
    ids = {"video_token_id": processor.video_token_id, "image_token_id": processor.image_token_id}
    model, rows = make_model(args, **ids).eval(), []
    frames = torch.randint(0, 256, (args.frames, 3, *2 * [vision.image_size]), dtype=torch.uint8)
    VideoMemory(model, processor).push_frames(frames[:16])
    for chunk in (8, 32, 64):
        model.config.vision_chunk_size = model.model.config.vision_chunk_size = chunk
        memory = VideoMemory(model, processor)
        seconds = clock(partial(memory.push_frames, frames), device.type).seconds
        rows.append({"vision_chunk_size": chunk, "frames_per_s": args.frames / seconds})
    return {"rows": rows}


# --- offload ---------------------------------------------------------------------------------------------------------


def _offload(args: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    model, rows = make_model(args), []
    for tokens in args.tokens:
        ids, labels = random_text(tokens, 64, device)
        seconds: dict[bool, list[float]] = {False: [], True: []}
        for turn in range(args.repeats + 1):
            for offload in seconds:
                model.gradient_checkpointing_enable(
                    order="sequence_major", sequence_interval=max(tokens // 8, 1), offload=offload
                )
                step_s, _ = training_step(model, ids, labels)
                if turn:
                    seconds[offload].append(step_s)
        taken = timing("step_s", seconds[False]) | timing("offload_step_s", seconds[True])
        rows.append({"tokens": tokens, **taken, "ratio": taken["offload_step_s"] / taken["step_s"]})
    return {"rows": rows}
