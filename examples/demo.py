"""Render a fresh H.264 video of ten minutes, ask the tiny model six questions about it, and check its answers.

    python examples/demo.py              # a new seed each time; `make demo` does the same, set-up included
    python examples/demo.py --seed 7     # one video again

The questions are put through the command line, as a user would. Exit code 0 means that at most one answer was wrong.
"""

import argparse
import json
import secrets
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from video_ma2mba.data.synthetic import Question, make_story

MAX_WRONG = 1


def ask(video: Path, questions: list[Question], model: str | None) -> dict:
    """Answer the questions with `video-ma2mba ask --json`, in a process whose peak memory is then the model's alone."""
    command = [sys.executable, "-m", "video_ma2mba.cli", "ask", "--json", str(video), *(q.text for q in questions)]
    if model is not None:
        command += ["--model", model]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        sys.exit(done.returncode)  # the command has said why
    return json.loads(done.stdout)


def print_report(console: Console, questions: list[Question], report: dict) -> int:
    """Print the table and return the number of right answers."""
    table = Table()
    for header in ("Question", "Answer", "Truth"):
        table.add_column(header)
    table.add_column("Right?", justify="center")
    table.add_column("Tokens", justify="right")
    table.add_column("Seconds", justify="right")
    num_right = 0
    for question, answer in zip(questions, report["answers"], strict=True):
        right = answer["answer"].strip().rstrip(".").lower() == question.answer
        num_right += right
        table.add_row(
            question.text,
            Text(answer["answer"]),  # not markup, whatever the model says
            question.answer,
            "[green]yes[/]" if right else "[red]no[/]",
            str(answer["tokens"]),
            f"{answer['seconds']:.2f}",
        )
    console.print(table)
    seconds = report["seconds"]
    console.print(
        f"Watched {report['frames']} frames as {report['tokens']['watched']:,} tokens: {seconds['decode_s']:.1f} s "
        f"to decode, {seconds['encode_s']:.1f} s to encode, {seconds['answer_s']:.1f} s for all answers. "
        f"Peak memory of the process: {report['peak_bytes'] / 2**20:,.0f} MiB."
    )
    console.print(f"[bold]{num_right} of {len(questions)} right[/]")
    return num_right


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seed", type=int, help="which video to render (default: a new one)")
    parser.add_argument("--duration", type=int, default=600, metavar="SECONDS", help="default: %(default)s")
    parser.add_argument("--model", metavar="DIR", help="model folder (default: the tiny model of this repository)")
    args = parser.parse_args()
    seed = secrets.randbelow(2**32) if args.seed is None else args.seed
    console = Console()
    story = make_story(seed, duration_s=args.duration)
    questions = story.questions(np.random.default_rng(seed))
    with tempfile.TemporaryDirectory() as folder:
        video = story.render(Path(folder) / f"story-{seed}.mp4")
        console.print(f"Rendered {args.duration} s of H.264 video, {video.stat().st_size / 1024:,.0f} KiB, seed {seed}")
        report = ask(video, questions, args.model)
    num_right = print_report(console, questions, report)
    gone_s = story.scenes[0].end_s
    console.print(f"What came first of all was gone after {gone_s} s, {args.duration - gone_s} s before the end.")
    return int(len(questions) - num_right > MAX_WRONG)


if __name__ == "__main__":
    sys.exit(main())
