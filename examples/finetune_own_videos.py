"""Fine-tune on videos of your own: a folder of videos and a file of questions -> LoRA adapters -> an answer.

    python examples/finetune_own_videos.py --example my_videos      # makes a folder to try it with
    python examples/finetune_own_videos.py my_videos -o my_run --ask 0.mp4 "Is the circle bright?"

The folder holds the videos and `questions.jsonl`, a line for each question:

    {"video": "0.mp4", "question": "Is the circle bright?", "answer": "yes"}

These are the three commands that it runs; each can be run by hand, and has more to offer:

    video-ma2mba data prepare my_videos/questions.jsonl --media-root my_videos -o my_run/data
    video-ma2mba train finetune-lora --set model=MODEL --set data=my_run/data --set output=my_run
    video-ma2mba ask my_videos/0.mp4 "Is the circle bright?" --model MODEL --adapter my_run/model
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

from video_ma2mba.data.synthetic import make_story

TINY = Path(__file__).parents[1] / "model_cards" / "video-ma2mba-tiny"


QUESTION = "Is the circle bright?"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("videos", type=Path, nargs="?", help="folder with the videos and questions.jsonl")
    parser.add_argument("--example", type=Path, metavar="DIR", help="make such a folder, and do nothing else")
    parser.add_argument("-o", "--output", type=Path, default=Path("my_run"), help="default: %(default)s")
    parser.add_argument("--model", default=str(TINY), help="folder or Hub id (default: the tiny model)")
    parser.add_argument("--steps", type=int, default=40, help="default: %(default)s")
    parser.add_argument("--ask", nargs=2, metavar=("VIDEO", "QUESTION"), help="a question when it is done")
    args = parser.parse_args()
    if args.example is not None:
        make_example(args.example)
        return
    if args.videos is None or not (args.videos / "questions.jsonl").is_file():
        parser.error("say which folder holds the videos and questions.jsonl; --example DIR makes one")

    run("data", "prepare", args.videos / "questions.jsonl", "--media-root", args.videos, "-o", args.output / "data")
    changes = {
        "model": args.model, "data": args.output / "data", "output": args.output, "max_steps": args.steps,
        "learning_rate": 1e-2 if args.model == str(TINY) else 2e-4, "dtype": "float32", "logging_steps": 10,
    }  # fmt: skip
    run("train", "finetune-lora", *(word for key, value in changes.items() for word in ("--set", f"{key}={value}")))
    if args.ask:
        video, question = args.ask
        adapter = args.output / "model"
        run("ask", args.videos / video, question, "--model", args.model, "--adapter", adapter)


def make_example(folder: Path) -> None:
    """Twelve videos of six seconds, and a question that the tiny model has never met."""
    folder.mkdir(parents=True, exist_ok=True)
    words = {"red": "no", "green": "yes", "blue": "no", "yellow": "yes", "purple": "no", "white": "yes"}
    with (folder / "questions.jsonl").open("w", encoding="utf-8") as file:
        for seed in range(12):
            story = make_story(seed, 6)
            story.render(folder / f"{seed}.mp4")
            row = {"video": f"{seed}.mp4", "question": QUESTION, "answer": words[story.circle.colour]}
            file.write(json.dumps(row) + "\n")
    print(f"{folder}: 12 videos and questions.jsonl")


def run(*words: object) -> None:
    """One command of the library; ends the program if it fails."""
    print("$ video-ma2mba", *words, flush=True)
    done = subprocess.run([sys.executable, "-m", "video_ma2mba.cli", *map(str, words)])
    if done.returncode != 0:
        sys.exit(done.returncode)


if __name__ == "__main__":
    main()
