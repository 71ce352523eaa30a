"""`video-ma2mba` in a process of a launcher, that writes down which videos it watched: `watched.py LOG LEFT RANK ...`.

The process of number RANK kills itself when it is to watch one more than LEFT videos.
"""

import os
import signal
import sys

from video_ma2mba import VideoMemory, processes
from video_ma2mba.cli import main

log, left, dying, *arguments = sys.argv[1:]
watch = VideoMemory.watch
left = int(left)


def watched(self, path, *args, **kwargs):
    global left
    if os.environ["RANK"] == dying:
        left -= 1
        if left < 0:
            os.kill(os.getpid(), signal.SIGKILL)
    result = watch(self, path, *args, **kwargs)
    with open(log, "a") as file:
        file.write(f"{os.environ['RANK']} {path.name}\n")
    return result


VideoMemory.watch = watched
processes.SILENT_AFTER_S = float(os.environ.get("SILENT_AFTER_S", "60"))
processes._SIGN_EVERY_S = processes.SILENT_AFTER_S / 10
sys.exit(main(arguments))
