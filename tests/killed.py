"""A command in a process of its own that is killed at a chosen moment: the same one on a fast and on a slow machine."""

import subprocess
import sys

CODE = """
import importlib, os, signal, sys
from video_ma2mba.cli import main

calls, places, *arguments = sys.argv[1:]
left = int(calls)

def deadly(do):
    def call(*args, **kwargs):
        global left
        left -= 1
        if left < 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return do(*args, **kwargs)
    return call

for place in places.split(","):
    module, _, path = place.partition(":")
    *owners, name = path.split(".")
    owner = importlib.import_module(module)
    for part in owners:
        owner = getattr(owner, part)
    setattr(owner, name, deadly(getattr(owner, name)))
sys.exit(main(arguments))
"""


def run_killed(arguments, *places, after):
    """Run `video-ma2mba` with `arguments`; the call after the first `after` calls of `places` kills it.

    A place is "module:name" or "module:Class.method".
    """
    command = [sys.executable, "-c", CODE, str(after), ",".join(places), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == -9, done.stderr
