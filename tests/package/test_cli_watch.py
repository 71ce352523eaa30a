"""`watch` that is interrupted, and `chat` in a terminal and in a pipe."""

import os
import pty
import re
import select
import signal
import subprocess
import sys
import time

import pytest

from video_ma2mba import VideoMemory
from video_ma2mba.cli import EXIT_UNREAD, main, watch, watching
from video_ma2mba.data.synthetic import make_story

from ..forked import run, run_killed

COMMAND = [sys.executable, "-m", "video_ma2mba.cli"]


@pytest.fixture(scope="module")
def longer(tmp_path_factory):
    """Forty seconds."""
    return str(make_story(seed=8, duration_s=40).render(tmp_path_factory.mktemp("longer") / "story.mp4"))


UNREAD = """
import os, sys
from video_ma2mba.cli import main

reader, writer = os.pipe()
os.close(reader)
for stream in sys.argv.pop(1).split(","):
    os.dup2(writer, int(stream))
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.parametrize("stream", ["1", "1,2"])
def test_what_nobody_reads_any_more(stream, longer, model_folder, tmp_path):
    ask = ["ask", longer, "What is it?", "--model", model_folder]
    assert run(UNREAD, [stream, *ask])[0] == [EXIT_UNREAD]
    codes, _, err = run(UNREAD, [stream, "watch", longer, "-o", tmp_path / "kept", "--model", model_folder])
    assert codes == [EXIT_UNREAD if "2" in stream else 0], err
    assert watching.is_memory(tmp_path / "kept")  # all the same: what was said last told of it


def test_an_interrupted_watch_is_taken_up_again(longer, model, processor, model_folder, tmp_path, monkeypatch, capsys):
    out, unfinished = tmp_path / "memory", tmp_path / ".memory.unfinished"
    monkeypatch.setattr(watch, "FRAMES_BETWEEN_SAVES", 12)
    options = ["watch", longer, "-o", str(out), "--model", model_folder]
    absorb, calls = VideoMemory._absorb, []

    def interrupted(self, pixels, timestamps_s):
        calls.append(len(pixels))
        if sum(calls) > 30:
            raise KeyboardInterrupt
        absorb(self, pixels, timestamps_s)

    monkeypatch.setattr(VideoMemory, "_absorb", interrupted)
    assert main(options) == 130
    assert "24 frames are kept, and --resume goes on there" in capsys.readouterr().err
    assert main(options) == 2
    assert "--resume goes on there, --restart begins anew" in capsys.readouterr().err
    assert not out.exists()
    assert VideoMemory.from_pretrained(unfinished, model, processor).num_frames == 24
    monkeypatch.setattr(VideoMemory, "_absorb", lambda *args: calls.append(0) or absorb(*args))
    calls.clear()
    assert main([*options, "--resume", "--fps", "2"]) == 2
    assert "from 0 s at 1 frames per second; give the same options" in capsys.readouterr().err
    calls.clear()
    assert main([*options, "--resume"]) == 0
    assert len(calls) == 4  # the sixteen frames that were left
    resumed, whole = VideoMemory.from_pretrained(out, model, processor), VideoMemory(model, processor)
    whole.watch(longer)
    assert (resumed.timestamps_s, resumed.sources) == (whole.timestamps_s, whole.sources)
    question = ["What is it?"]
    assert (
        resumed.generate(question, max_new_tokens=8)[0].tolist()
        == whole.generate(question, max_new_tokens=8)[0].tolist()
    )
    assert not unfinished.exists()
    assert main([*options, "--resume"]) == 2
    assert "no interrupted call" in capsys.readouterr().err


@pytest.mark.parametrize("moment", range(5))
def test_a_kill_leaves_the_old_memory_or_the_new_one(longer, video, model, processor, model_folder, tmp_path, moment):
    out = tmp_path / "memory"
    old = VideoMemory(model, processor)
    old.watch(video)
    old.save_pretrained(out)
    options = ["watch", longer, "-o", str(out), "--model", model_folder]
    steps = ("save_file", "_file_hash", "Path.replace", "_remove_leftovers")
    run_killed(options, *(f"video_ma2mba.modeling.video_memory_files:{step}" for step in steps), after=moment)
    assert VideoMemory.from_pretrained(out, model, processor).num_frames == (40 if moment == 4 else 10)
    assert main(options) == 0
    assert VideoMemory.from_pretrained(out, model, processor).num_frames == 40
    assert len(list(out.iterdir())) == 2


class Terminal:
    """A command in a terminal of its own."""

    def __init__(self, *arguments):
        self.pid, self.fd = pty.fork()
        if self.pid == 0:
            os.environ["TERM"] = "dumb"
            signal.signal(signal.SIGINT, signal.SIG_DFL)  # a test run in the background is started to ignore it
            os.execv(sys.executable, [*COMMAND, *arguments])
        self.seen = ""

    def wait_for(self, pattern, timeout_s=90):
        """Read until the output holds the pattern; returns what came up to there and forgets it."""
        end = time.monotonic() + timeout_s
        while not (match := re.search(pattern, self.seen)):
            ready, _, _ = select.select([self.fd], [], [], max(0, end - time.monotonic()))
            assert ready, f"no {pattern!r} in {self.seen!r}"
            self.seen += os.read(self.fd, 4096).decode(errors="replace")
        text, self.seen = self.seen[: match.end()], self.seen[match.end() :]
        return text

    def type(self, text):
        os.write(self.fd, text.encode())

    def say(self, line):
        """Type a line once the prompt is there; typed earlier it would be echoed before what is still printed."""
        self.wait_for("> ")
        self.type(f"{line}\n")

    def close(self):
        code = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        os.close(self.fd)
        return code


def test_chat_in_a_terminal(longer, model, processor, model_folder, tmp_path):
    terminal = Terminal(
        "chat", longer, "--model", model_folder, "--snapshots", "10", "20", "--max-new-tokens", "100000"
    )
    assert "40 frames up to 0:39" in terminal.wait_for(r"/quit\r\n")
    terminal.say("/stats")
    assert "snapshots at 10 s, 20 s" in terminal.wait_for(r"20 s\r\n")
    terminal.say("/seek 15")
    assert "11 frames up to 0:10" in terminal.wait_for(r"so far[^\r]*\r\n")
    terminal.say("/seek 5")
    terminal.wait_for("error: no snapshot at or before 5 s")
    terminal.say("/seek end")
    terminal.wait_for("40 frames up to 0:39")
    terminal.say("What was there to be seen, and to be told of it at great length?")
    terminal.wait_for(r"length\?\r\n[^\[]")  # the answer has begun
    terminal.type("\x03")  # stops the answer, and not the talk
    terminal.wait_for(r"\[stopped\]\r\n")
    terminal.say(f"/save {tmp_path / 'kept'}")
    terminal.wait_for(r"saved to [^\n]*kept\r\n")
    terminal.say("/dance")
    terminal.wait_for("the commands are /seek SECONDS")
    terminal.say("/quit")
    assert terminal.close() == 0
    assert VideoMemory.from_pretrained(tmp_path / "kept", model, processor).num_frames == 40


@pytest.fixture
def typed(monkeypatch):
    """A function that says what is typed, line by line: texts, and exceptions that end the reading of a line."""

    def script(*lines, in_terminal=True):
        left = iter(lines)

        def read(prompt):
            assert prompt == ("> " if in_terminal else "")
            line = next(left)
            if isinstance(line, BaseException):
                raise line
            return line

        monkeypatch.setattr("builtins.input", read)
        monkeypatch.setattr(sys.stdin, "isatty", lambda: in_terminal)

    return script


def test_an_interrupt_at_the_prompt_drops_the_line_and_not_the_talk(video, model_folder, typed, capsys):
    typed(KeyboardInterrupt(), "/stats", EOFError())
    assert main(["chat", video, "--model", model_folder]) == 0
    assert capsys.readouterr().out.count("10 frames up to 0:09") == 2  # at the beginning, and asked for after all


def test_an_interrupt_outside_a_terminal_ends_the_command(video, model_folder, typed):
    typed(KeyboardInterrupt(), in_terminal=False)
    assert main(["chat", video, "--model", model_folder]) == 130


def test_forget_begins_the_talk_anew_and_a_wrong_command_is_explained(video, model_folder, typed, capsys):
    typed("Who?", "/stats", "/forget", "/stats", "/help", "/seek soon", "/save", "/quit")
    assert main(["chat", video, "--model", model_folder, "--max-new-tokens", "2"]) == 0
    out, err = capsys.readouterr()
    assert "1 question(s) so far" in out
    assert out.count("0 question(s) so far") == 2
    assert out.count("/forget") == 2  # at the beginning, and by /help
    assert "error: /seek: say a time in seconds, or end" in err
    assert "error: /save: the commands are /seek SECONDS" in err


def test_chat_in_a_pipe_prints_only_answers(video, model, processor, model_folder, tmp_path):
    memory = VideoMemory(model, processor)
    memory.watch(video)
    memory.save_pretrained(tmp_path / "memory")
    expected = [memory.chat(question, max_new_tokens=6) for question in ("First?", "Second?")]
    done = subprocess.run(
        [*COMMAND, "chat", str(tmp_path / "memory"), "--model", model_folder, "--max-new-tokens", "6"],
        input="First?\n\nSecond?\n", capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    said = [line.strip() for line in done.stdout.splitlines()]
    assert said == [line.strip() for text in expected for line in text.splitlines()]
    assert len(said) >= 2
