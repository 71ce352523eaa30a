"""Memories whose process is killed before one file operation after another, in a process of its own:

python -m tests.serving.killed_while_saving MODEL VIDEO FOLDER EVERY
"""

import itertools
import os
import signal
import sys
from pathlib import Path

import torch

from video_ma2mba import VideoMa2mbaForConditionalGeneration, VideoMa2mbaProcessor, VideoMemory
from video_ma2mba.modeling import video_memory_files
from video_ma2mba.serving import watching
from video_ma2mba.serving.media import MediaRules
from video_ma2mba.serving.memories import Memories

watching.FRAMES_BETWEEN_SAVES = 8
CHANGES = ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.symlink", "half written")
OPENED_TO_WRITE = os.O_WRONLY | os.O_RDWR
NUM_PUSHED = 3


def half_written(tensors, path, real=video_memory_files.save_file):
    path.write_bytes(b"half")
    sys.audit("half written")
    real(tensors, path)


def forked(do):
    """The exit status of a copy of this process that does something."""
    pid = os.fork()
    if pid == 0:
        try:
            do()
            os._exit(0)
        except BaseException:
            sys.excepthook(*sys.exc_info())
            os._exit(1)
    return os.waitpid(pid, 0)[1]


def kill_before(number):
    """Kill this process before it changes something on disk for the time after `number` times."""
    left = number

    def hook(event, args):
        nonlocal left
        is_change = event in CHANGES or (
            event == "open" and isinstance(args[2], int) and bool(args[2] & OPENED_TO_WRITE)
        )
        left -= is_change
        if is_change and left == -1:
            os.kill(os.getpid(), signal.SIGKILL)

    video_memory_files.save_file = half_written
    sys.addaudithook(hook)


class Trial:
    """A video watched, and frames pushed to a live memory, in a folder of its own."""

    def __init__(self, model, processor, video, folder):
        self.model, self.processor, self.video, self.folder = model, processor, video, folder

    def store(self):
        return Memories(self.folder, self.model, self.processor, MediaRules((self.video.parent,)))

    def watched(self, store):
        medium = store.rules.open(str(self.video))
        piece = {"type": "video", "sha256": medium.sha256, "path": medium.source, "fps": 1.0, "snapshots_s": []}
        memory_id = store.ensure(None, [store.head, piece], {1: medium}, "a story")
        job = store.job(memory_id)
        return memory_id, store.load(memory_id) if job is None else job.future.result(60)

    def frames(self, number):
        side = self.processor.video_processor.side
        return torch.full((1, 3, side, side), 10 * number, dtype=torch.uint8)

    def work(self):
        store = self.store()
        self.watched(store)
        memory_id = store.begin_live("camera")
        for number in range(NUM_PUSHED):
            store.push(memory_id, self.frames(number), None).result(60)

    def check(self, answer, answers_live):
        """Each memory is whole or absent; the video is watched to its end, and the live source goes on."""
        store = self.store()
        memory_id, memory = self.watched(store)
        assert memory.ask("Why?", max_new_tokens=6) == answer
        left = {path.name for path in (self.folder / memory_id).iterdir()}
        assert left == {"lock", "memory", "record.json"}, left
        for other in set(store.ids()) - {memory_id}:
            described = store.describe(other)
            assert described["live"]
            assert described["status"] == "ready", described
            num_frames = store.load(other).num_frames
            if num_frames:
                assert store.load(other).ask("Why?", max_new_tokens=6) == answers_live[num_frames]
            store.push(other, self.frames(num_frames), None).result(60)
            assert store.load(other).ask("Why?", max_new_tokens=6) == answers_live[num_frames + 1]
        hidden = [path for name in store.ids() for path in (self.folder / name).rglob(".*")]
        assert not hidden, hidden
        store.close()


def main(model_folder, video, folder, every):
    torch.set_num_threads(1)
    model = VideoMa2mbaForConditionalGeneration.from_pretrained(model_folder).eval()
    processor = VideoMa2mbaProcessor.from_pretrained(model_folder)
    truth, live, answers_live = VideoMemory(model, processor), VideoMemory(model, processor), [None]
    truth.watch(video)
    for number in range(NUM_PUSHED + 1):
        live.push_frames(Trial(model, processor, None, None).frames(number))
        answers_live.append(live.ask("Why?", max_new_tokens=6))
    answer = truth.ask("Why?", max_new_tokens=6)
    for number in itertools.count(0, every):
        trial = Trial(model, processor, Path(video), Path(folder) / str(number))

        def killed(trial=trial, number=number):
            kill_before(number)
            trial.work()

        status = forked(killed)
        assert os.WIFSIGNALED(status) or status == 0, (number, status)
        assert forked(lambda trial=trial: trial.check(answer, answers_live)) == 0, number
        if status == 0:
            print(f"killed {number // every} times")
            return


if __name__ == "__main__":
    main(*sys.argv[1:4], int(sys.argv[4]))
