"""Commands in processes of their own, forked from one that has imported what they need: that spares seconds of each.

That one has done nothing else, so no command meets what another left behind. `tests/distributed` and
`test_two_processes_equal_one` start theirs as users do.
"""

import multiprocessing
import os
import signal
import socket
import tempfile
from multiprocessing.connection import wait
from pathlib import Path

from .killed import CODE

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(
    ["video_ma2mba.training.run", "video_ma2mba.evaluation.run", "video_ma2mba.data.prepare"]
)


# What a process does; it knows nothing of this file, and is given the names it uses.
COMMAND = """
import os, sys

os.chdir(where)
os.environ.clear()
os.environ.update(environment)
file = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
for stream in (1, 2):
    os.dup2(file, stream)
sys.argv[1:] = words
exec(code, {})
"""
WELL = "import sys; from video_ma2mba.cli import main; sys.exit(main(sys.argv[3:]))"


def run(arguments, count=1, places=(), after=0):
    """`video-ma2mba` with `arguments`, in `count` processes that reach each other; ends all where one fails.

    The call after the first `after` calls of `places`, each "module:name" or "module:Class.method", kills a process.

    Returns:
        The exit codes, and what was printed.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        together = {"WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count, "MASTER_ADDR": "127.0.0.1"}
        together["MASTER_PORT"] = free.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        said = Path(folder) / "said"
        started = []
        for rank in range(count):
            own = {**together, "RANK": rank, "LOCAL_RANK": rank} if count > 1 else {}
            environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", **{key: str(value) for key, value in own.items()}}
            words = [str(after), ",".join(places), *map(str, arguments)]
            given = {"where": Path.cwd(), "environment": environment, "said": said, "words": words}
            process = CONTEXT.Process(target=exec, args=(COMMAND, {**given, "code": CODE if places else WELL}))
            process.start()
            started.append(process)
        while alive := [process for process in started if process.exitcode is None]:
            wait([process.sentinel for process in alive])
            if any(process.exitcode for process in started):
                for process in alive:
                    process.terminate()
        return [process.exitcode for process in started], said.read_text(errors="replace")


def run_killed(arguments, *places, after):
    """As `run`, of a command that is killed there: at the same moment on a fast and on a slow machine."""
    codes, said = run(arguments, places=places, after=after)
    assert codes == [-signal.SIGKILL], said


def run_well(arguments, count=1):
    """As `run`, of a command that must succeed."""
    codes, said = run(arguments, count)
    assert codes == [0] * count, said[-3000:]
