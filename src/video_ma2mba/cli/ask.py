"""Answer questions about a video, which is watched once, or about a memory that `video-ma2mba watch` wrote.

Answers go to stdout, everything else to stderr.
"""

import argparse
import json
import time
from pathlib import Path

from ..loading import find_model, natural
from . import watching

HELP = "answer questions about a video"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("video", metavar="VIDEO", help="path or URL of a video, or the folder of a memory")
    parser.add_argument("questions", metavar="QUESTION", nargs="+", help="in quotes; each is answered on its own")
    watching.add_arguments(parser, snapshots=False)
    parser.add_argument(
        "--max-new-tokens", type=natural, default=128, metavar="N", help="most tokens of an answer (default: 128)"
    )
    parser.add_argument(
        "--json", action="store_true", help="print one JSON object with answers, tokens, seconds, bytes"
    )


def run(args: argparse.Namespace) -> None:
    start = time.perf_counter()
    for number, question in enumerate(args.questions, 1):
        if not question.strip():
            raise ValueError(f"question {number} is empty: write it in quotes after the video")
        if Path(question).is_file():
            raise ValueError(
                f"question {number} is the path of a file: one call asks about one video. Ask about the other in a "
                "call of its own, or keep the memory of each with `watch`"
            )
    name = find_model(args.model)

    from ..modeling.stopping import RepetitionStop
    from ..planning.measured import peak_bytes

    memory, watched = watching.open_memory(args)
    processor, device = memory.processor, memory.model.device
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
            "dtype": str(memory.model.dtype).removeprefix("torch."),
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
