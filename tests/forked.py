"""Commands and modules in processes of their own, forked from one that has imported what they need: seconds less each.

That one has done nothing else, so no command meets what another left behind. Where it matters who ends the others of a
process, in `tests/distributed`, they are started as users do.
"""

import json
import multiprocessing
import os
import signal
import socket
import tempfile
import time
from multiprocessing.connection import wait
from pathlib import Path

from .killed import CODE

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(
    ["video_ma2mba.training.run", "video_ma2mba.evaluation.run", "video_ma2mba.data.prepare", "deepspeed"]
)


# What a process does; it knows nothing of this file, and is given the names it uses.
COMMAND = """
import os, sys

os.chdir(where)
sys.path.insert(0, where)
os.environ.clear()
os.environ.update(environment)
for stream, path in enumerate(said, start=1):
    os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream)
sys.argv[1:] = words
exec(code, {})
"""
WELL = "import sys; from video_ma2mba.cli import main; sys.exit(main(sys.argv[1:]))"
MODULE = "import runpy, sys; runpy.run_module(sys.argv.pop(1), run_name='__main__', alter_sys=True)"


def run(code, words, count=1, timeout_s=None, where=None, **environment):
    """`code` with `words` as arguments, in `count` processes that reach each other; one that fails or is late ends all.

    Returns:
        The exit codes, and what was printed, on the two streams.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        together = {"WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count, "MASTER_ADDR": "127.0.0.1"}
        together["MASTER_PORT"] = free.getsockname()[1]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", **environment}
    until = None if timeout_s is None else time.monotonic() + timeout_s
    with tempfile.TemporaryDirectory() as folder:
        paths = [str(Path(folder) / name) for name in ("out", "err")]
        given = {"where": str(where or Path.cwd()), "said": paths, "words": list(map(str, words)), "code": code}
        started, late = [], False
        for rank in range(count):
            own = {**together, "RANK": rank, "LOCAL_RANK": rank} if count > 1 else {}
            given["environment"] = {**environment, **{key: str(value) for key, value in own.items()}}
            process = CONTEXT.Process(target=exec, args=(COMMAND, dict(given)))
            process.start()
            started.append(process)
        while alive := [process for process in started if process.exitcode is None]:
            late |= not wait([process.sentinel for process in alive], until and max(0, until - time.monotonic()))
            if late or any(process.exitcode for process in started):
                for process in alive:
                    process.kill() if late else process.terminate()
        codes = [process.exitcode for process in started]
        out, err = (Path(path).read_text(errors="replace") for path in paths)
        return codes, out, f"{err}\nstill running after {timeout_s} s" if late else err


def run_killed(arguments, *places, after):
    """A command that the call after the first `after` calls of `places` kills, on a fast and on a slow machine.

    Args:
        places: each "module:name" or "module:Class.method".
    """
    codes, _, said = run(CODE, [after, ",".join(places), *arguments])
    assert codes == [-signal.SIGKILL], said[-3000:]


def said(code, *words, **environment):
    """What code that must succeed printed."""
    codes, out, err = run(code, words, **environment)
    assert codes == [0], err[-3000:]
    return out


def run_measured(module, *words):
    """In place of `benchmark.machine.in_measured_process`, where the figures themselves do not matter."""
    return json.loads(said(MODULE, module, *words).splitlines()[-1])


def run_well(arguments, count=1):
    """A command that must succeed, in `count` processes."""
    codes, _, said = run(WELL, arguments, count)
    assert codes == [0] * count, said[-3000:]
