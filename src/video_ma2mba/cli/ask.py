"""Answer questions about a video, which is watched once, or about a memory that `video-ma2mba watch` wrote.

Answers go to stdout, everything else to stderr.
"""

import argparse
import json
import re
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from ..modeling.video_memory import VideoMemory

HELP = "answer questions about a video"
TINY_MODEL = Path(__file__).resolve().parents[3] / "model_cards" / "video-ma2mba-tiny"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("video", metavar="VIDEO", help="path or URL of a video, or the folder of a memory")
    parser.add_argument("questions", metavar="QUESTION", nargs="+", help="each is answered on its own")
    add_watching_arguments(parser)
    parser.add_argument("--max-new-tokens", type=int, default=128, metavar="N", help="per answer (default: 128)")
    parser.add_argument("--json", action="store_true", help="print one object with answers, tokens, seconds, bytes")


def add_watching_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of every command that watches a video."""
    parser.add_argument("--model", metavar="DIR_OR_HUB_ID", help="default: the tiny model of the repository's clone")
    parser.add_argument("--fps", type=float, help="frames per second of video (default: the model's, usually 1)")
    parser.add_argument("--max-frames", type=int, metavar="N", help="watch at most N frames, spread evenly")
    parser.add_argument("--start", type=float, default=0.0, metavar="SECONDS", help="where in the video to begin")
    parser.add_argument("--end", type=float, metavar="SECONDS", help="where to stop (default: the end)")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto: cuda if there is one")
    parser.add_argument(
        "--dtype", choices=("auto", "float32", "bfloat16"), default="auto", help="auto: bfloat16 on cuda, else float32"
    )


def run(args: argparse.Namespace) -> None:
    start = time.perf_counter()
    for number, question in enumerate(args.questions, 1):
        if not question.strip():
            raise ValueError(f"question {number} is empty: write it in quotes after the video")
    name = find_model(args.model)

    import torch

    from .. import VideoMa2mbaForConditionalGeneration, VideoMa2mbaProcessor, VideoMemory
    from ..modeling.stopping import RepetitionStop
    from ..modeling.video_memory_files import CONFIG_NAME

    device = choose_device(args.device)
    dtype = ("bfloat16" if device.type == "cuda" else "float32") if args.dtype == "auto" else args.dtype
    processor = load(VideoMa2mbaProcessor, name)
    is_memory = (Path(args.video) / CONFIG_NAME).is_file()
    if not is_memory:
        # The video is opened before the weights are read: a wrong path shows at once, not after minutes.
        processor.video_processor.open_video(
            args.video, fps=args.fps, max_frames=args.max_frames, start_s=args.start, end_s=args.end
        ).close()
    model = load(VideoMa2mbaForConditionalGeneration, name, dtype=getattr(torch, dtype)).to(device).eval()
    if is_memory:
        memory = VideoMemory.from_pretrained(args.video, model, processor)
        watched = {"decode_s": 0.0, "encode_s": 0.0}
    else:
        memory = VideoMemory(model, processor)
        watched = watch(memory, args)

    answers = []
    for question in args.questions:
        begin = time.perf_counter()
        stop = RepetitionStop(prompt_length=memory.num_prompt_tokens(question))
        (ids,) = memory.generate([question], max_new_tokens=args.max_new_tokens, stopping_criteria=[stop])
        text = processor.decode(ids, skip_special_tokens=True).strip()
        seconds = time.perf_counter() - begin
        answers.append({"question": question, "answer": text, "tokens": len(ids), "seconds": seconds})
        if not args.json:
            print(text, flush=True)
    if args.json:
        report = {
            "video": args.video,
            "model": name,
            "device": device.type,
            "dtype": dtype,
            "answers": answers,
            "frames": memory.num_frames,
            "tokens": {"watched": memory.num_tokens, "answered": sum(one["tokens"] for one in answers)},
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


def watch(memory: "VideoMemory", args: argparse.Namespace) -> dict[str, Any]:
    """Watch `args.video` with a progress bar; returns frames, tokens, decode_s, encode_s."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("Watching"), BarColumn(), MofNCompleteColumn(), TextColumn("frames"), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task("watch", total=None)
        watched = memory.watch(
            args.video, args.fps, start_s=args.start, end_s=args.end, max_frames=args.max_frames,
            progress=lambda done, expected: progress.update(task, completed=done, total=expected),
        )  # fmt: skip
        progress.update(task, total=watched["num_frames"])  # a truncated file ends early
    return watched


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
