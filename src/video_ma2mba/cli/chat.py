"""Talk about a video, or about a memory of one: what was said before counts.

/help lists what may be typed beside questions; Ctrl-D ends the talk, Ctrl-C stops an answer.
"""

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..loading import natural, refuse
from . import watching

if TYPE_CHECKING:
    from ..modeling.video_memory import VideoMemory

HELP = "talk about a video or a memory"
PROMPT = "> "
COMMANDS = "/seek SECONDS, /save FOLDER, /stats, /forget, /help, /quit"
HELP_LINES = """\
/seek SECONDS  go back to the last snapshot at or before a time; `/seek end` is the whole video
/save FOLDER   keep the memory with the talk, to be gone on with by `chat FOLDER`
/stats         what the memory holds
/forget        begin the talk anew; the video stays
/help          this
/quit          end, as Ctrl-D does; Ctrl-C stops an answer, and drops what was typed"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "video",
        metavar="MEMORY_OR_VIDEO",
        help="folder of a memory, or path or URL of a video; with --server also a memory's id",
    )
    watching.add_arguments(parser)
    parser.add_argument("--server", metavar="URL", help="let a `video-ma2mba serve` watch and answer")
    parser.add_argument("--api-key-file", type=Path, metavar="FILE", help="the key of the server, in its first line")
    parser.add_argument(
        "--max-new-tokens", type=natural, default=128, metavar="N", help="most tokens of an answer (default: 128)"
    )


def run(args: argparse.Namespace) -> None:
    if not args.server:
        refuse(args, {"api_key_file": None}, "it holds the key of a --server; name that, or leave it out")
    memory: Any = watching.remote_memory(args) if args.server else watching.open_memory(args)[0]
    talk = Talk(memory, args.max_new_tokens)
    in_terminal = sys.stdin.isatty()
    if in_terminal:
        import readline  # noqa: F401 - gives `input` a history and editing

        print(talk.stats())
        print(COMMANDS)
    while True:
        try:
            line = input(PROMPT if in_terminal else "")
        except EOFError:
            return
        except KeyboardInterrupt:
            if not in_terminal:
                raise
            print()
            continue
        if line.strip() == "/quit":
            return
        if line.strip():
            try:
                talk.take(line.strip())
            except (ValueError, OSError) as error:
                print(f"error: {error}", file=sys.stderr)


class Talk:
    """A memory being talked about: `memory` as it is now, `whole` as it was in the beginning."""

    def __init__(self, memory: "VideoMemory", max_new_tokens: int):
        self.whole = self.memory = memory
        self.max_new_tokens = max_new_tokens

    def take(self, line: str) -> None:
        """One line of the user: a command that begins with "/", or a question."""
        if not line.startswith("/"):
            self.answer(line)
            return
        command, _, argument = line.partition(" ")
        if command == "/stats":
            print(self.stats())
        elif command == "/help":
            print(HELP_LINES)
        elif command == "/forget":
            self.memory.dialogue = []
        elif command == "/save" and argument.strip():
            if Path(argument.strip()).exists():
                raise ValueError(f"{argument.strip()} is there already: name another folder")
            self.memory.save_pretrained(argument.strip())
            print(f"saved to {argument.strip()}")
        elif command == "/seek":
            self.seek(argument.strip())
        else:
            raise ValueError(f"{line}: the commands are {COMMANDS}")

    def answer(self, question: str) -> None:
        """Print the answer as it comes; Ctrl-C ends it, and it then counts as not asked."""
        pieces = self.memory.chat(question, stream=True, max_new_tokens=self.max_new_tokens)
        try:
            for piece in pieces:
                print(piece, end="", flush=True)
        except KeyboardInterrupt:
            pieces.close()
            print(" [stopped]", end="")
        print(flush=True)

    def seek(self, time: str) -> None:
        """Go to the last snapshot at or before a time; "end" is the whole video. The talk begins anew there."""
        if time == "end":
            self.memory = self.whole
        else:
            try:
                wanted = float(time)
            except ValueError:
                raise ValueError("/seek: say a time in seconds, or end") from None
            kept = [time_s for time_s in self.whole.snapshot_times_s if time_s <= wanted]
            if not kept:
                raise ValueError(
                    f"no snapshot at or before {wanted:g} s; `--snapshots 600 1200` makes them while a video is watched"
                )
            self.memory = self.whole.at(seconds=max(kept))
        print(self.stats())

    def stats(self) -> str:
        snapshots = ", ".join(f"{time_s:g} s" for time_s in self.whole.snapshot_times_s)
        asked = f"{self.memory}, {len(self.memory.dialogue) // 2} question(s) so far"
        return f"{asked}; snapshots at {snapshots}" if snapshots else asked
