"""Score a model on your own questions, or on a benchmark: videomme, longvideobench, mvbench, nextqa, activitynetqa,
videochatgpt, or niah.

Your own: `--task own --data questions.jsonl`, the file of the training, a line for each question: {"video", "question",
"answer", "options"}. With options it is a multiple choice; a free answer is right where it is the same text; without an
answer the model's is kept and not scored. Every further text in a line is a category. `video-ma2mba eval compare BEFORE
AFTER` puts the outputs of two models side by side.

Every video is watched once for all of its questions. Answers are kept as they come, and --resume goes on after them.

Several devices, also on several machines that share the output folder: start the same command by `torchrun`, as in
`torchrun --nproc-per-node 8 -m video_ma2mba.cli eval MODEL --task videomme`, or by `accelerate launch`. Without them
start it once for each shard, with --shard 1/4 to --shard 4/4, and then `video-ma2mba eval merge OUTPUT`, naming one
more folder for each machine that has its own.
"""

import argparse
import json
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..files import write_json, write_text
from ..loading import find_model, frame_rate, natural, number, output_folder, refuse, whole
from ..processes import Ranks, Share, files_of, launched
from . import watching
from .parser import parse_share
from .progress import progress_bars

if TYPE_CHECKING:
    from ..evaluation.run import Answer, Found
    from ..evaluation.tasks import Task

HELP = "score a model on your own questions, or on a benchmark"
TASK_NAMES = ("own", "videomme", "longvideobench", "mvbench", "activitynetqa", "videochatgpt", "nextqa", "niah")
SETTINGS = "settings.json"
MERGE, COMPARE = "merge", "compare"
# Options that niah alone has, and those that all other tasks have, with their defaults
OF_NIAH = {"minutes": [1, 5, 15, 60, 120, 240], "depths": [0.0, 0.25, 0.5, 0.75, 1.0], "haystacks": None}
OF_RUNS = {**dict.fromkeys(("task", "data", "media_root", "adapter", "fps", "frames", "limit", "shard")),
           "by_likelihood": False, "resume": False}  # fmt: skip
OF_QUESTIONS = {"limit": None, "by_likelihood": False, "media_root": None, "judge": None}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "model", metavar="MODEL", help="folder or Hub id; or `merge`, of the shards of a run; or `compare`, of two runs"
    )
    parser.add_argument(
        "folders",
        nargs="*",
        default=[],
        type=Path,
        metavar="OUTPUT",
        help="after `merge`: where the shards are; after `compare`: two",
    )
    parser.add_argument("--task", choices=TASK_NAMES, help="a benchmark, niah, or own: your own questions")
    parser.add_argument(
        "--data", metavar="FILE_DIR_OR_HUB_ID", help="the questions, as published (default: the task's on the Hub)"
    )
    parser.add_argument("--media-root", type=Path, metavar="DIR", help="the videos (default: the folder of --data)")
    parser.add_argument("-o", "--output", type=output_folder, metavar="DIR", help="default: evaluation/MODEL/TASK")
    watching.add_loading_arguments(parser)
    frames = parser.add_mutually_exclusive_group()
    frames.add_argument("--fps", type=frame_rate, help="frames per second of video (default: the model's, usually 1)")
    frames.add_argument("--frames", type=natural, metavar="N", help="at most N frames, spread evenly")
    parser.add_argument("--limit", type=natural, metavar="N", help="the first N questions only")
    parser.add_argument("--batch-size", type=natural, default=16, metavar="N", help="questions of a video at once")
    parser.add_argument("--by-likelihood", action="store_true", help="multiple choice: take the likeliest letter")
    parser.add_argument("--resume", action="store_true", help="go on after the answers that stand in the output")
    parser.add_argument(
        "--shard", type=parse_share, metavar="I/N", help="only the I-th part of the videos, dealt by length"
    )
    judge = parser.add_argument_group("free answers")
    judge.add_argument("--judge", metavar="URL", help="an OpenAI-compatible address; the key is $OPENAI_API_KEY")
    judge.add_argument("--judge-model", default="gpt-3.5-turbo-0125", help="default: the paper's, gpt-3.5-turbo-0125")
    niah = parser.add_argument_group("niah")
    niah.add_argument(
        "--minutes",
        type=number(1 / 60, 60000),
        nargs="+",
        default=OF_NIAH["minutes"],
        help="lengths of the haystacks (default: 1 5 15 60 120 240)",
    )
    niah.add_argument(
        "--depths",
        type=number(0, 1),
        nargs="+",
        default=OF_NIAH["depths"],
        help="where a needle lies, from 0, before everything, to 1 (default: 0 0.25 0.5 0.75 1)",
    )
    niah.add_argument("--haystacks", type=whole(1, 1000), metavar="N", help="of each length (default: one a needle)")


def run(args: argparse.Namespace) -> None:
    if args.model == MERGE:
        _merge(args)
        return
    if args.model == COMPARE:
        _compare(args)
        return
    if args.folders:
        raise ValueError(f"one model at a time: what is {args.folders[0]}? Folders follow `eval merge` alone")
    if args.task is None:
        raise ValueError(f"--task must be given; there are {', '.join(TASK_NAMES)}")
    if args.task == "own" and args.data is None:
        raise ValueError("--task own: name the file of your questions with --data")
    refuse(args, OF_QUESTIONS if args.task == "niah" else OF_NIAH, f"not for --task {args.task}; leave it out")
    share = args.shard or Share()
    if args.task == "niah" and share.count > 1:
        raise ValueError("--shard deals videos, and niah has one: give each machine --minutes and -o of its own")
    name = find_model(args.model)
    output = share.folder(args.output or Path("evaluation") / Path(name).name / args.task)
    settings = _settings(args, name)
    with launched() as ranks, _claimed(output, settings, args.resume, ranks):
        if args.task == "niah":
            _niah(args, output, ranks)
        else:
            _benchmark(args, settings, output, share, ranks)


def _settings(args: argparse.Namespace, name: str) -> dict[str, Any]:
    """What answers depend on: a run goes on only with the same."""
    how = f"{args.frames} frames each" if args.frames else f"{args.fps:g} FPS" if args.fps else "every second of them"
    settings = {"task": args.task, "model": Path(name).name, "data": args.data, "frames": how, "adapter": args.adapter}
    if args.task == "niah":
        return {**settings, "minutes": args.minutes, "depths": args.depths}
    return {**settings, "by_likelihood": args.by_likelihood, "limit": args.limit, "batch_size": args.batch_size}


@contextmanager
def _claimed(output: Path, settings: dict[str, Any], resume: bool, ranks: Ranks) -> Iterator[None]:
    """A folder of this run, made by the first process, or one that holds a run of the same settings.

    A start that fails leaves no folder behind; who interrupts is told what is kept.

    Raises:
        ValueError: It holds a run, and --resume was not given or the settings are others.
    """
    if not ranks.is_first:
        yield
        return
    new = [folder for folder in (output, *output.parents) if not folder.exists()]
    if going_on := (output / SETTINGS).exists():
        if not resume:
            raise ValueError(f"{output} holds a run already: --resume goes on with it, -o DIR takes another folder")
        earlier = _read_settings(output)
        if changed := [key for key in settings if settings[key] != earlier.get(key)]:
            raise ValueError(
                f"{output} holds a run with other settings ({', '.join(changed)}); the same ones go on, or take -o DIR"
            )
    else:
        output.mkdir(parents=True, exist_ok=True)
        write_json(output / SETTINGS, settings)
    try:
        yield
    except KeyboardInterrupt:
        print(
            f"stopped; what was answered is kept in {output}: the same command with --resume goes on", file=sys.stderr
        )
        raise
    except Exception:
        if not going_on:
            _forget(output, new)
        raise


def _forget(output: Path, new: Iterable[Path]) -> None:
    """Removes what a start wrote, and the folders it made, where nothing was answered."""
    from ..evaluation import niah, run

    kept = [file for name in (run.ANSWERS, niah.CELLS) for file in files_of(output / name)]
    if any(file.stat().st_size for file in kept):
        return
    for file in (*kept, *(output / name for name in (SETTINGS, run.MEDIA, run.QUESTIONS))):
        file.unlink(missing_ok=True)
    with suppress(OSError):  # there is something else in it
        for folder in new:
            folder.rmdir()


def _read_settings(folder: Path) -> dict[str, Any]:
    file = folder / SETTINGS
    try:
        return dict(json.loads(file.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{file}: damaged, so the run cannot go on; take -o DIR") from error


def _benchmark(args: argparse.Namespace, settings: dict[str, Any], output: Path, share: Share, ranks: Ranks) -> None:
    from ..evaluation.run import answer_all, find, read_found, write_found
    from ..evaluation.tasks import TASKS, read_questions

    task = TASKS[args.task]
    data = args.data or (task.hub[0] if task.hub else "")
    media_root = args.media_root or (Path(data).parent if Path(data).is_file() else Path(data))
    if not media_root.is_dir():
        if task.hub is None and not Path(data).exists():
            raise ValueError(f"--data {data}: there is no such folder or file")
        raise ValueError("name the folder of the videos with --media-root")
    if ranks.is_first:
        found = find(read_questions(task, data), media_root, output, args.limit)
        if not found.questions:
            first = f"; the first: {found.problems[0].where}: {found.problems[0].message}" if found.problems else ""
            raise ValueError(f"not one question can be asked, {len(found.problems)} items were left out{first}")
        write_found(output, found)
    ranks.after_first("questions")
    found = read_found(output)
    if args.by_likelihood and (free := [one.where for one in found.questions if not one.options]):
        raise ValueError(
            f"--by-likelihood is for multiple choice, but {len(free)} have no options; the first: {free[0]}"
        )
    videos = share.of(found.durations_s) if share.count > 1 else None
    is_judged = task.read_answer is None or (args.judge and any(one.dimension for one in found.questions))
    judge = _judge(args, output) if ranks.is_first and share.count == 1 and is_judged else None
    model, processor = watching.load_model_and_processor(args)
    with progress_bars() as show:
        answers = answer_all(
            model, processor, task, found, media_root, output, videos=videos, ranks=ranks,
            fps=args.fps, max_frames=args.frames, by_likelihood=args.by_likelihood, batch_size=args.batch_size,
            progress=partial(show, "Answering") if ranks.is_first else None,
        )  # fmt: skip
    if not ranks.is_first:
        return
    if share.count == 1:
        _report(task, found, answers, settings, judge, output)
    else:
        whole = f"video-ma2mba eval merge {output.parent}"
        print(f"shard {share}: {len(answers)} questions about {len(videos or ())} videos; when all are done: {whole}")


def _merge(args: argparse.Namespace) -> None:
    from ..evaluation.run import ANSWERS, collect, read_found
    from ..evaluation.tasks import TASKS

    refuse(args, OF_RUNS, "for runs, and these are over; leave it out")
    places = args.folders or ([args.output] if args.output else [])
    shards = [shard for place in places for shard in sorted(place.glob("shard-*-of-*"))]
    if not shards:
        raise ValueError("eval merge OUTPUT: there is no folder shard-I-of-N; name what -o was when the shards ran")
    output = args.output or places[0]
    settings, found = _read_settings(shards[0]), read_found(shards[0])
    for shard in shards[1:]:
        if _read_settings(shard) != settings or read_found(shard).by_video != found.by_video:
            raise ValueError(f"{shards[0]} and {shard} are not of one run: their settings or questions differ")
    task = TASKS[settings["task"]]
    output.mkdir(parents=True, exist_ok=True)
    answers = collect([shard / ANSWERS for shard in shards], found, list(found.by_video), output / ANSWERS)
    is_judged = task.read_answer is None or (args.judge and any(one.dimension for one in found.questions))
    _report(task, found, answers, settings, _judge(args, output) if is_judged else None, output)


def _compare(args: argparse.Namespace) -> None:
    from ..evaluation.compare import compare, markdown

    if len(args.folders) != 2:
        raise ValueError("eval compare BEFORE AFTER: name the outputs of two runs over the same questions")
    refuse(args, OF_RUNS, "for runs, and these are over; leave it out")
    report = compare(*args.folders)
    page = markdown(report)
    if args.output is not None:
        args.output.mkdir(parents=True, exist_ok=True)
        write_json(args.output / "comparison.json", report)
        write_text(args.output / "comparison.md", page)
    print(page, end="")


def _report(
    task: "Task", found: "Found", answers: "list[Answer]", settings: dict[str, Any], judge: Any, output: Path
) -> None:
    from ..evaluation.report import flat, make_report, tables, write_report

    report = make_report(task, found, answers, settings, judge)
    write_report(report, output)
    for title, scores in tables(report):
        for label, one in flat(scores):
            interval = "" if one["low"] is None else f"  ({one['low']:.3f} to {one['high']:.3f})"
            print(f"{title}, {label}: {one['mean']:.3f}{interval}, {one['num_questions']} questions")
    if num := report.get("num_without_answer_key"):
        print(f"{num} questions have no answer to compare with; what the model said is kept", file=sys.stderr)
    if report["num_problems"]:
        print(f"{report['num_problems']} items left out: {report['problems']}", file=sys.stderr)
    print(f"report.md, report.json, report.png and answers.jsonl are in {output}", file=sys.stderr)


def _judge(args: argparse.Namespace, output: Path) -> Any:
    from ..evaluation.judge import ChatJudge, StringJudge

    if args.judge:
        return ChatJudge(args.judge, args.judge_model, output / "judge_replies.jsonl")
    print("warning: no --judge: words in common are counted, which is not the published metric", file=sys.stderr)
    return StringJudge()


def _niah(args: argparse.Namespace, output: Path, ranks: Ranks) -> None:
    from ..evaluation import niah

    lengths = [round(60 * minutes) for minutes in args.minutes]
    if args.haystacks is not None and args.data:
        raise ValueError("--haystacks: --data has one haystack")
    model, processor = watching.load_model_and_processor(args)
    if args.data:
        folder = Path(args.data)
        needles = niah.read_needles(folder, processor)
        film = processor.video_processor.load(folder / "haystack.mp4", fps=args.fps, max_frames=max(lengths)).frames
        haystacks: list[niah.Haystack] = [lambda num_frames: film[:num_frames]]
    else:
        needles = niah.synthetic_needles(processor)
        count = args.haystacks or len(needles)
        haystacks = [partial(niah.synthetic_haystack, processor, number) for number in range(count)]
    with progress_bars() as show:
        look = partial(show, "Looking for needles") if ranks.is_first else None
        cells = niah.find_needles(model, processor, haystacks, needles, lengths, args.depths, output, look, ranks)
    if not ranks.is_first:
        return
    rows = niah.summarise(cells)
    model_name = Path(args.model).name
    total = sum(cell["found"] for cell in cells) / len(cells)
    write_json(output / "report.json", {"task": "niah", "model": model_name, "found": total, "rows": rows})
    niah.draw(rows, f"{model_name}: {total:.0%} of needles found", output / "report.png")
    print(f"found {total:.1%} of {len(cells)} needles; report.json, report.png and cells.jsonl are in {output}")
