"""Watch a video once and answer questions about it. Answers go to stdout, everything else to stderr."""

import argparse
import json
import re
import sys
import time
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from ..modeling.mamba2 import Mamba2Cache
    from ..modeling.modeling_video_ma2mba import VideoMa2mbaForConditionalGeneration
    from ..processing.processing_video_ma2mba import VideoMa2mbaProcessor
    from ..processing.video_reader import VideoFrames

HELP = "answer questions about a video"
TINY_MODEL = Path(__file__).resolve().parents[3] / "model_cards" / "video-ma2mba-tiny"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("video", metavar="VIDEO", help="path or URL of a video")
    parser.add_argument("questions", metavar="QUESTION", nargs="+", help="each is answered on its own")
    parser.add_argument("--model", metavar="DIR_OR_HUB_ID", help="default: the tiny model of the repository's clone")
    parser.add_argument("--fps", type=float, help="frames per second of video (default: the model's, usually 1)")
    parser.add_argument("--max-frames", type=int, metavar="N", help="watch at most N frames, spread evenly")
    parser.add_argument("--start", type=float, default=0.0, metavar="SECONDS", help="where in the video to begin")
    parser.add_argument("--end", type=float, metavar="SECONDS", help="where to stop (default: the end)")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto: cuda if there is one")
    parser.add_argument(
        "--dtype", choices=("auto", "float32", "bfloat16"), default="auto", help="auto: bfloat16 on cuda, else float32"
    )
    parser.add_argument("--max-new-tokens", type=int, default=128, metavar="N", help="per answer (default: 128)")
    parser.add_argument("--json", action="store_true", help="print one object with answers, tokens, seconds, bytes")


def run(args: argparse.Namespace) -> None:
    start = time.perf_counter()
    for number, question in enumerate(args.questions, 1):
        if not question.strip():
            raise ValueError(f"question {number} is empty: write it in quotes after the video")
    name = find_model(args.model)

    import torch

    from .. import VideoMa2mbaForConditionalGeneration, VideoMa2mbaProcessor

    device = choose_device(args.device)
    dtype = ("bfloat16" if device.type == "cuda" else "float32") if args.dtype == "auto" else args.dtype
    processor = load(VideoMa2mbaProcessor, name)
    # The video is opened before the weights are read: a wrong path shows at once, not after minutes.
    frames = processor.video_processor.open_video(
        args.video, fps=args.fps, max_frames=args.max_frames, start_s=args.start, end_s=args.end
    )
    model = load(VideoMa2mbaForConditionalGeneration, name, dtype=getattr(torch, dtype)).to(device).eval()

    prompts = [split_prompt(processor, question) for question in args.questions]
    cache, watched = watch(model, prompts[0][0], frames)
    answers = []
    for question, (_, tail) in zip(args.questions, prompts, strict=True):
        answers.append({"question": question, **answer(model, processor, cache, tail, args.max_new_tokens)})
        if not args.json:
            print(answers[-1]["answer"], flush=True)
    if args.json:
        report = {
            "video": args.video,
            "model": name,
            "device": device.type,
            "dtype": dtype,
            "answers": answers,
            "frames": watched["frames"],
            "tokens": {"watched": watched["tokens"], "answered": sum(one["tokens"] for one in answers)},
            "seconds": {
                "decode_s": watched["decode_s"],
                "encode_s": watched["encode_s"],
                "answer_s": sum(one["seconds"] for one in answers),
                "total_s": time.perf_counter() - start,  # with imports and the loading of weights
            },
            "peak_bytes": peak_bytes(device),
        }
        print(json.dumps(report, indent=2))


def find_model(name: str | None) -> str:
    """The model to load: a folder that has what it takes, or a Hub id.

    Raises:
        ValueError: `name` is no such folder, or None where the tiny model is not at hand; the message says what to do.
    """
    if name is None:
        if not (TINY_MODEL / "config.json").is_file():
            raise ValueError("the tiny model is only at hand in a clone of the repository: name one with --model")
        name = str(TINY_MODEL)
    folder = Path(name).expanduser()
    if folder.is_dir():
        for file, part in (("config.json", "model"), ("processor_config.json", "processor")):
            if not (folder / file).is_file():
                raise ValueError(f"{name}: this folder has no {file}; write it with {part}.save_pretrained({name!r})")
        return str(folder)
    if not re.fullmatch(r"\w[\w.-]*/[\w.-]+", name):
        raise ValueError(f"{name}: there is no such folder, and a Hub id looks like owner/name")
    return name


def load(cls: Any, name: str, **kwargs: Any) -> Any:
    """`cls.from_pretrained`, whose errors about a Hub id are pages long."""
    from huggingface_hub.errors import HfHubHTTPError
    from transformers import PreTrainedConfig

    try:
        model_type = PreTrainedConfig.get_config_dict(name)[0].get("model_type")
        if model_type != "video_ma2mba":
            raise ValueError(f"{name}: this is a model of type {model_type!r}; `ask` needs one of type 'video_ma2mba'")
        return cls.from_pretrained(name, **kwargs)
    except (HfHubHTTPError, OSError) as error:
        if Path(name).is_dir():
            raise
        raise ValueError(f"{name}: there is no such folder, and the Hub does not give it; check the name") from error


def choose_device(name: str) -> "torch.device":
    import torch

    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: torch finds no CUDA device here; use --device cpu")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


def split_prompt(processor: "VideoMa2mbaProcessor", question: str) -> tuple["torch.Tensor", "torch.Tensor"]:
    """Token ids of the prompt before and after the video's frames, int64 (1, tokens) each."""
    import numpy as np

    side = processor.video_processor.side
    content = [{"type": "video", "video": np.zeros((1, side, side, 3), np.uint8)}, {"type": "text", "text": question}]
    ids = processor.apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )["input_ids"]
    places = (ids[0] == processor.video_token_id).nonzero().flatten()
    return ids[:, : places[0]], ids[:, places[-1] + 1 :]


def watch(
    model: "VideoMa2mbaForConditionalGeneration", head: "torch.Tensor", frames: "VideoFrames"
) -> tuple["Mamba2Cache", dict[str, Any]]:
    """Decode a video and read it, a few frames at a time, so that memory does not grow with its length.

    Args:
        head: (1, tokens) int64, the prompt before the frames.
        frames: Frames of the model's size.

    Returns:
        The states after the last frame, and a dict of frames, tokens, decode_s, encode_s.
    """
    import numpy as np
    import torch
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    config, device = model.config, model.device
    columns = (TextColumn("Watching"), BarColumn(), MofNCompleteColumn(), TextColumn("frames"), TimeRemainingColumn())
    decode_s = encode_s = 0.0
    num_frames = 0
    with torch.no_grad(), Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task("watch", total=frames.num_frames)
        cache = model(head.to(device), use_cache=True, logits_to_keep=1).cache_params
        while True:
            begin = time.perf_counter()
            batch = [frame.pixels for frame in islice(frames, config.vision_chunk_size)]
            decoded = time.perf_counter()
            decode_s += decoded - begin
            if not batch:
                break
            pixels = torch.from_numpy(np.stack(batch)).permute(0, 3, 1, 2)[None].to(device)
            ids = torch.full((1, len(batch) * config.tokens_per_frame), config.video_token_id, device=device)
            cache = model(
                ids, pixel_values_videos=pixels, cache_params=cache, use_cache=True, logits_to_keep=1
            ).cache_params
            if device.type == "cuda":
                torch.cuda.synchronize(device)  # or the seconds would be those of the launches
            encode_s += time.perf_counter() - decoded
            num_frames += len(batch)
            progress.update(task, completed=num_frames)
        progress.update(task, total=num_frames)  # a truncated file ends early
    tokens = head.shape[1] + num_frames * config.tokens_per_frame
    return cache, {"frames": num_frames, "tokens": tokens, "decode_s": decode_s, "encode_s": encode_s}


def answer(
    model: "VideoMa2mbaForConditionalGeneration",
    processor: "VideoMa2mbaProcessor",
    cache: "Mamba2Cache",
    tail: "torch.Tensor",
    max_new_tokens: int,
) -> dict[str, Any]:
    """Answer one question, `tail` (1, tokens) int64, from the states after the video, which stay as they are."""
    from ..modeling.stopping import RepetitionStop

    begin = time.perf_counter()
    sequence = model.generate(
        tail.to(model.device),
        cache_params=cache,
        max_new_tokens=max_new_tokens,
        stopping_criteria=[RepetitionStop(prompt_length=tail.shape[1])],
    )[0]
    new = sequence[tail.shape[1] :]
    text = processor.decode(new, skip_special_tokens=True).strip()
    return {"answer": text, "tokens": len(new), "seconds": time.perf_counter() - begin}


def peak_bytes(device: "torch.device") -> int:
    """The most memory this process has held: allocated by torch on a CUDA device, resident on the CPU."""
    import resource

    import torch

    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")
    if status.exists():  # Linux: ru_maxrss would count what the parent held when it started this process
        return 1024 * int(re.search(r"^VmHWM:\s+(\d+) kB", status.read_text(), re.MULTILINE)[1])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
