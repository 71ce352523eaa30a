"""Score a model on a benchmark: videomme, longvideobench, mvbench, nextqa, activitynetqa, videochatgpt, or niah.

Every video is watched once for all of its questions. Answers are kept as they come, and --resume goes on after them.
"""

import argparse
import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

from ..files import write_json
from ..loading import find_model
from ..progress import progress_bars
from . import watching

HELP = "score a model on a benchmark"
TASK_NAMES = ("videomme", "longvideobench", "mvbench", "activitynetqa", "videochatgpt", "nextqa", "niah")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="folder or Hub id")
    parser.add_argument("--task", required=True, choices=TASK_NAMES)
    parser.add_argument("--data", metavar="DIR_OR_HUB_ID", help="the published files (default: the task's on the Hub)")
    parser.add_argument("--media-root", type=Path, metavar="DIR", help="the videos (default: the folder of --data)")
    parser.add_argument("-o", "--output", type=Path, metavar="DIR", help="default: evaluation/MODEL/TASK")
    watching.add_loading_arguments(parser)
    frames = parser.add_mutually_exclusive_group()
    frames.add_argument("--fps", type=float, help="frames per second of video (default: the model's, usually 1)")
    frames.add_argument("--frames", type=int, metavar="N", help="at most N frames, spread evenly")
    parser.add_argument("--limit", type=int, metavar="N", help="the first N questions only")
    parser.add_argument("--batch-size", type=int, default=16, metavar="N", help="questions of a video at once")
    parser.add_argument("--by-likelihood", action="store_true", help="multiple choice: take the likeliest letter")
    parser.add_argument("--resume", action="store_true", help="go on after the answers that stand in the output")
    judge = parser.add_argument_group("free answers")
    judge.add_argument("--judge", metavar="URL", help="an OpenAI-compatible address; the key is $OPENAI_API_KEY")
    judge.add_argument("--judge-model", default="gpt-3.5-turbo-0125", help="default: the paper's, gpt-3.5-turbo-0125")
    niah = parser.add_argument_group("niah")
    niah.add_argument("--minutes", type=float, nargs="+", default=[1, 5, 15, 60, 120, 240])
    niah.add_argument("--depths", type=float, nargs="+", default=[0.0, 0.25, 0.5, 0.75, 1.0])


def run(args: argparse.Namespace) -> None:
    for name in ("limit", "batch_size", "frames"):
        if (value := getattr(args, name)) is not None and value < 1:
            raise ValueError(f"--{name.replace('_', '-')} must be at least 1, got {value}")
    name = find_model(args.model)
    output = args.output or Path("evaluation") / Path(name).name / args.task
    settings = _settings(args, name)
    _claim(output, settings, args.resume)
    if args.task == "niah":
        _niah(args, output)
    else:
        _benchmark(args, settings, output)


def _settings(args: argparse.Namespace, name: str) -> dict[str, Any]:
    """What answers depend on: a run goes on only with the same."""
    how = f"{args.frames} frames each" if args.frames else f"{args.fps:g} FPS" if args.fps else "every second of them"
    settings = {"model": Path(name).name, "data": args.data, "frames": how, "adapter": args.adapter}
    if args.task == "niah":
        return {**settings, "minutes": args.minutes, "depths": args.depths}
    return {**settings, "by_likelihood": args.by_likelihood, "limit": args.limit, "batch_size": args.batch_size}


def _claim(output: Path, settings: dict[str, Any], resume: bool) -> None:
    """Make the folder, or go on in it if it holds a run of the same settings.

    Raises:
        ValueError: It holds a run, and --resume was not given or the settings are others.
    """
    output.mkdir(parents=True, exist_ok=True)
    file = output / "settings.json"
    if not file.exists():
        write_json(file, settings)
        return
    if not resume:
        raise ValueError(f"{output} holds a run already: --resume goes on with it, -o DIR takes another folder")
    try:
        earlier = dict(json.loads(file.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{file}: damaged, so the run cannot go on; take -o DIR") from error
    if changed := [key for key in settings if settings[key] != earlier.get(key)]:
        raise ValueError(
            f"{output} holds a run with other settings ({', '.join(changed)}); the same ones go on, or take -o DIR"
        )


def _benchmark(args: argparse.Namespace, settings: dict[str, Any], output: Path) -> None:
    from ..evaluation.report import flat, make_report, write_report
    from ..evaluation.run import answer_all, find
    from ..evaluation.tasks import TASKS, read_questions

    task = TASKS[args.task]
    data = args.data or task.hub[0]
    media_root = args.media_root or Path(data)
    if not media_root.is_dir():
        raise ValueError("name the folder of the videos with --media-root")
    judge = _judge(args, output) if task.read_answer is None else None
    found = find(read_questions(task, data), media_root, output, args.limit)
    if not found.questions:
        first = f"; the first: {found.problems[0].where}: {found.problems[0].message}" if found.problems else ""
        raise ValueError(f"not one question can be asked, {len(found.problems)} items were left out{first}")
    model, processor = watching.load_model_and_processor(args)
    with progress_bars() as show:
        answers = answer_all(
            model, processor, task, found, media_root, output, fps=args.fps, max_frames=args.frames,
            by_likelihood=args.by_likelihood, batch_size=args.batch_size, progress=partial(show, "Answering"),
        )  # fmt: skip
    report = make_report(task, found, answers, settings, judge)
    write_report(report, output)
    for title, scores in ((report["metric"], report["scores"]), ("accuracy", report.get("accuracy"))):
        for label, one in flat(scores) if scores else ():
            interval = "" if one["low"] is None else f"  ({one['low']:.3f} to {one['high']:.3f})"
            print(f"{title}, {label}: {one['mean']:.3f}{interval}, {one['num_questions']} questions")
    if report["num_problems"]:
        print(f"{report['num_problems']} items left out: {report['problems']}", file=sys.stderr)
    print(f"report.md, report.json, report.png and answers.jsonl are in {output}", file=sys.stderr)


def _judge(args: argparse.Namespace, output: Path) -> Any:
    from ..evaluation.judge import ChatJudge, StringJudge

    if args.judge:
        return ChatJudge(args.judge, args.judge_model, output / "judge_replies.jsonl")
    print("warning: no --judge: words in common are counted, which is not the published metric", file=sys.stderr)
    return StringJudge()


def _niah(args: argparse.Namespace, output: Path) -> None:
    from ..evaluation import niah

    model, processor = watching.load_model_and_processor(args)
    lengths = [round(60 * minutes) for minutes in args.minutes]
    if min(lengths) < 1 or not all(0 <= depth <= 1 for depth in args.depths):
        raise ValueError("--minutes must be positive, and --depths lie between 0 and 1")
    if args.data:
        folder = Path(args.data)
        needles = niah.read_needles(folder, processor)
        haystack = processor.video_processor.load(folder / "haystack.mp4", fps=args.fps, max_frames=max(lengths)).frames
    else:
        needles = niah.synthetic_needles(processor)
        haystack = niah.synthetic_haystack(processor, max(lengths))
    with progress_bars() as show:
        look = partial(show, "Looking for needles")
        cells = niah.find_needles(model, processor, haystack, needles, lengths, args.depths, output, look)
    rows = niah.summarise(cells)
    model_name = Path(args.model).name
    total = sum(cell["found"] for cell in cells) / len(cells)
    write_json(output / "report.json", {"task": "niah", "model": model_name, "found": total, "rows": rows})
    niah.draw(rows, f"{model_name}: {total:.0%} of needles found", output / "report.png")
    print(f"found {total:.1%} of {len(cells)} needles; report.json, report.png and cells.jsonl are in {output}")
