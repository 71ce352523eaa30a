"""What kills a command at a chosen moment: the same one on a fast and on a slow machine."""

# arguments: so many calls pass; of these places, "module:name" or "module:Class.method"; and those of the command
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
