"""The watching half of `Memories`: videos wait in a queue, and one thread watches them, standing back for answers."""

import fcntl
import os
import queue
import shutil
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ..files import write_json
from ..modeling.video_memory import VideoMemory
from ..modeling.video_memory_files import CONFIG_NAME
from .media import MediaRules, Medium, TooLarge, check
from .prompts import Piece, prefix_hash

VIDEO_NAME = "video"  # of one that is kept to be shown
MAX_WAITING = 64  # videos that wait to be watched
FRAMES_BETWEEN_SAVES = 600
YIELD_S = 0.25  # so long a micro-batch of frames waits for questions to be answered


class TooManyVideos(Exception):
    """Too many videos wait already: come back later."""


class Stopped(Exception):
    """Nobody wants the memory any more, or the server ends."""


@dataclass(eq=False)
class Job:
    """A video being watched, or waiting for it.

    Attributes:
        done, expected: frames so far, and frames in all; None where nobody knows.
        media: files that came with the request, by the number of their piece.
        seen: the memory so far, once there is something in it.
        future: the `VideoMemory`, in the end.
    """

    id: str
    record: dict[str, Any]
    media: dict[int, Medium]
    done: int = 0
    expected: int | None = None
    status: str = "queued"
    stopped: bool = False
    seen: VideoMemory | None = None
    future: Future = field(default_factory=Future)


class MemoryWatching:
    """Watches what `Memories` keeps; the attributes and methods declared here are its."""

    model: Any
    processor: Any
    rules: MediaRules
    keeps_videos: bool
    wait_for_turn: Callable[[float], None]
    origin: str
    head: list[int]
    watched_frames: int
    describe: Callable[[str], dict[str, Any]]
    load: Callable[[str], VideoMemory]
    is_ready: Callable[[str], bool]
    _jobs: dict[str, Job]
    _failures: OrderedDict[str, str]
    _lock: Any
    _queue: queue.Queue[Any]
    _closed: bool
    _folder_of: Callable[[str], Path]
    _saved_at: Callable[[str], int | None]
    _hold: Callable[[str, VideoMemory, int | None], None]

    def ensure(self, parent: str | None, pieces: Sequence[Piece], media: dict[int, Medium], name: str) -> str:
        """The id of the memory of what `pieces` show after `parent`; it is watched unless it is there or coming.

        Args:
            parent: id of the memory to go on from; None for the beginning of a conversation.
            pieces: token ids, and media as dicts of type, sha256, path and how to sample; the last one is a video.
            media: the files, by the number of their piece. They are taken over, or discarded.

        Raises:
            TooManyVideos: no place to wait.
        """
        memory_id = prefix_hash(parent or self.origin, [_without_path(piece) for piece in pieces])
        with self._lock:
            known = memory_id in self._jobs or self.is_ready(memory_id)
            folder, last = self._folder_of(memory_id), media.get(len(pieces) - 1)
            if known:
                self._keep(last, folder)
            if known or len(self._jobs) >= MAX_WAITING:
                for medium in media.values():
                    medium.discard()
                if known:
                    return memory_id
                raise TooManyVideos
            standard = list(pieces[:-1]) == [self.head] if parent is None else len(pieces) == 1
            if parent is not None:
                standard = standard and self.describe(parent)["standard"]
            record = {
                "created": int(time.time()), "name": name, "live": False, "parent": parent, "pieces": list(pieces),
                "standard": standard,
            }  # fmt: skip
            folder.mkdir(exist_ok=True)
            self._keep(last, folder)
            try:
                for number, medium in media.items():
                    if medium.source is None:
                        medium.path = medium.path.replace(folder / f"media-{number}")
                write_json(folder / "record.json", record)
            except BaseException:
                for medium in media.values():
                    medium.discard()
                with suppress(OSError):
                    folder.rmdir()
                raise
            self._failures.pop(memory_id, None)
            self._start(Job(memory_id, record, media))
        return memory_id

    def _keep(self, medium: Medium | None, folder: Path) -> None:
        """An uploaded video under a second name, which stays once it is watched."""
        if self.keeps_videos and medium is not None and medium.source is None:
            with suppress(OSError):  # it is kept already, or this disk knows no second names
                os.link(medium.path, folder / VIDEO_NAME)

    def job(self, memory_id: str) -> Job | None:
        """The watching of a memory that is not whole yet."""
        return self._jobs.get(memory_id)

    def push(self, memory_id: str, pixels: torch.Tensor, timestamps_s: list[float] | None) -> Future:
        """Watch frames of a live source; the future is the memory after them, which is then on disk.

        Raises:
            KeyError: there is none of that id. ValueError: it is of a file. TooManyVideos: no place to wait.
        """
        if not self.describe(memory_id)["live"]:
            raise ValueError("frames are pushed to live memories alone; this one is of a file")

        def absorb() -> VideoMemory:
            memory = self.load(memory_id).copy()
            memory.push_frames(pixels, timestamps_s)
            memory.save_pretrained(self._folder_of(memory_id) / "memory")
            self._hold(memory_id, memory, self._saved_at(memory_id))
            self.watched_frames += len(pixels)
            return memory

        return self.later(absorb)

    def absorbed(self, parent: str | None, pieces: Sequence[Piece], media: dict[int, Medium]) -> Future:
        """The memory of pieces that end with an image: nothing of it is kept."""

        def absorb() -> VideoMemory:
            try:
                return self._after(self._parent(parent), pieces, {number: one.path for number, one in media.items()})
            finally:
                for medium in media.values():
                    medium.discard()

        return self.later(absorb)

    def later(self, do: Callable[[], Any]) -> Future:
        """Let the thread that watches do something."""
        if self._queue.qsize() >= MAX_WAITING:
            raise TooManyVideos
        future: Future = Future()
        self._queue.put((future, do))
        return future

    # --- in the thread -----------------------------------------------------------------------------------------------

    def _work(self) -> None:
        while (item := self._queue.get()) is not None and not self._closed:
            if isinstance(item, Job):
                self._watch(item)
                continue
            future, do = item
            if future.set_running_or_notify_cancel():
                self.wait_for_turn(YIELD_S)
                try:
                    future.set_result(do())
                except BaseException as error:
                    future.set_exception(error)
        while not self._queue.empty():
            item = self._queue.get()
            if item is not None:
                (item.future if isinstance(item, Job) else item[0]).cancel()

    def _start(self, job: Job) -> None:
        self._jobs[job.id] = job
        self._queue.put(job)

    def _watch(self, job: Job) -> None:
        folder = self._folder_of(job.id)
        try:
            with self._alone(folder) as is_alone:
                if not is_alone:  # another server that shares the folder is at it
                    threading.Timer(1.0, self._queue.put, [job]).start()
                    return
                memory = None if self._saved_at(job.id) is None else self.load(job.id)
                if memory is None:
                    job.status = "watching"
                    memory = self._watched(job, folder)
        except BaseException as error:
            self._fail(job, folder, error)
        else:
            self._hold(job.id, memory, self._saved_at(job.id))
            remove_what_is_done_with(folder)
            self._forget(job)
            job.future.set_result(memory)
        for medium in job.media.values():
            if medium.file is not None:
                medium.file.close()

    def _fail(self, job: Job, folder: Path, error: BaseException) -> None:
        message = str(error)
        with self._lock:  # what went wrong is known before the job is forgotten: whoever finds no job finds that
            if job.stopped or self._closed:
                error = Stopped(f"{job.record['name']}: nobody waits for it any more")
            elif isinstance(error, ValueError):  # it is the video's fault: another time would end the same way
                message = message.replace(str(folder) + "/", "")
                with suppress(OSError):
                    write_json(folder / "record.json", {**job.record, "error": message})
                for path in folder.glob("media-*"):
                    path.unlink(missing_ok=True)
            else:
                message = "no space or no access on the server" if isinstance(error, OSError) else type(error).__name__
                self._failures[job.id] = message
                while len(self._failures) > 1000:
                    self._failures.popitem(last=False)
            self._forget(job)
        job.status = "failed"
        job.future.set_exception(error)

    def _forget(self, job: Job) -> None:
        if self._jobs.get(job.id) is job:  # the same video may have come again, after it was deleted
            del self._jobs[job.id]

    def _watched(self, job: Job, folder: Path) -> VideoMemory:
        """Watch what a job is about, on from where an earlier server came; the memory is then on disk."""
        paths = {}
        for number, piece in enumerate(job.record["pieces"]):
            if not isinstance(piece, dict):
                continue
            path = folder / f"media-{number}"  # one name over restarts, wherever the file is
            if piece["path"] is not None:
                medium = job.media.get(number) or self.rules.open(piece["path"])
                job.media[number] = medium
                if medium.sha256 != piece["sha256"]:
                    raise ValueError(f"{job.record['name']}: the file was changed before it was watched to its end")
                path.unlink(missing_ok=True)
                path.symlink_to(medium.path)
            paths[number] = path
        last = len(job.record["pieces"]) - 1
        piece, path, memory = job.record["pieces"][last], paths[last], None
        start_s = piece.get("start_s", 0.0)
        check(path, "video", self.rules.max_duration_s)
        if (folder / "unfinished" / CONFIG_NAME).is_file():
            with suppress(ValueError):  # one of other code, say: from the beginning, then
                memory = VideoMemory.from_pretrained(folder / "unfinished", self.model, self.processor)
                start_s = memory.sources[-1]["end_s"]
        if memory is None:
            before = self._parent(job.record["parent"])
            memory = self._after(before, job.record["pieces"][:last], paths)
        self._see(job, memory, piece, path, start_s, folder / "unfinished")
        memory.sources = [*memory.sources[:-1], {**memory.sources[-1], "name": job.record["name"]}]  # it may travel
        memory.save_pretrained(folder / "memory")
        return memory

    def _see(self, job: Job, memory: VideoMemory, piece: dict, path: Path, start_s: float, unfinished: Path) -> None:
        saved, seen = memory.num_frames, round((start_s - piece.get("start_s", 0.0)) * piece["fps"])

        def progress(done: int, expected: int | None) -> None:
            nonlocal saved
            self.watched_frames += seen + done - job.done
            job.done, job.expected = seen + done, None if expected is None else seen + expected
            if job.stopped or self._closed:
                raise Stopped
            if job.done > self.rules.max_duration_s * piece["fps"] + 1:
                raise TooLarge(
                    f"the video lasts longer than the {self.rules.max_duration_s:g} s that this server takes"
                )
            job.seen = memory.copy()
            if memory.num_frames - saved >= FRAMES_BETWEEN_SAVES:
                memory.save_pretrained(unfinished)
                saved = memory.num_frames
            self.wait_for_turn(YIELD_S)

        job.done = seen
        memory.watch(
            path, piece["fps"], start_s=start_s, end_s=piece.get("end_s"), snapshots_s=piece["snapshots_s"],
            progress=progress,
        )  # fmt: skip

    def _after(self, memory: VideoMemory, pieces: Sequence[Piece], paths: dict[int, Path]) -> VideoMemory:
        """A memory moved on over token ids and images."""
        memory, config, device = memory.copy(), self.model.config, self.model.device
        for number, piece in enumerate(pieces):
            pixels = None
            if isinstance(piece, dict):
                check(paths[number], "image", self.rules.max_duration_s)
                pixels = self.processor.video_processor.load_image(paths[number])[None].to(device)
                piece = [config.image_token_id] * config.tokens_per_frame
            with torch.no_grad():
                memory._cache = self.model(
                    torch.tensor([piece], device=device), pixel_values=pixels, cache=memory._cache, use_cache=True,
                    logits_to_keep=1,
                ).cache  # fmt: skip
        return memory

    def _parent(self, memory_id: str | None) -> VideoMemory:
        if memory_id is not None:
            return self.load(memory_id)
        return VideoMemory._of(self.model, self.processor, self.model.model.language_model.new_cache(1))

    @contextmanager
    def _alone(self, folder: Path) -> Iterator[bool]:
        """Whether no other server is at this memory; the system gives the lock up for one that is killed."""
        with open(folder / "lock", "w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                yield False
                return
            yield True


def remove_what_is_done_with(folder: Path) -> None:
    """Of a memory that is whole: the files it was watched from, and what it was before."""
    for path in folder.glob("media-*"):
        with suppress(OSError):
            path.unlink()
    shutil.rmtree(folder / "unfinished", ignore_errors=True)


def _without_path(piece: Piece) -> list[int] | dict[str, Any]:
    return {name: value for name, value in piece.items() if name != "path"} if isinstance(piece, dict) else piece
