"""Videos that were watched, kept on disk: the state where a video ends, under the hash of all that led to it.

    DIR/<id>/record.json   what is watched: the pieces that end with the video, and the memory they go on from
    DIR/<id>/media-<n>     its files, while they are needed
    DIR/<id>/unfinished    the memory so far, while it is watched
    DIR/<id>/memory        the memory, whole

An id is the hash of weights, file, sampling and whatever stands before the video in its conversation, so that nothing
is watched twice, also over restarts and by servers that share the folder. A memory is there whole or not at all; one
that was being watched when its server died is gone on with by the next.
"""

import fcntl
import itertools
import json
import queue
import shutil
import threading
import time
import uuid
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
from ..modeling.video_memory_files import CONFIG_NAME, identity
from .media import MediaRules, Medium, TooLarge, check
from .prompts import Piece, prefix_hash, prompt_pieces

MAX_WAITING = 64  # videos that wait to be watched
MAX_LOADED_BYTES = 4 * 2**30  # of memories that are held, so that questions need not read them from disk
FRAMES_BETWEEN_SAVES = 600
YIELD_S = 0.25  # so long a micro-batch of frames waits for questions to be answered
_LEFTOVER_AGE_S = 24 * 3600
_ID_LENGTH = 32


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
        future: the `VideoMemory`, in the end.
    """

    id: str
    record: dict[str, Any]
    media: dict[int, Medium]
    done: int = 0
    expected: int | None = None
    status: str = "queued"
    stopped: bool = False
    future: Future = field(default_factory=Future)


@dataclass(frozen=True, eq=False)
class _Loaded:
    """A memory that is held, and when it was saved."""

    memory: VideoMemory
    saved: int
    is_standard: bool

    @property
    def num_bytes(self) -> int:
        return self.memory.num_bytes * (1 + len(self.memory.snapshot_times_s))


class Memories:
    """The folder, the thread that watches, and the memories that were asked about lately.

    Args:
        folder: where they are kept; made if need be.
        model, processor: that watch.
        rules: bounds of the media.
        wait_for_turn: called before each micro-batch with seconds: the thread's chance to stand back.
    """

    def __init__(
        self, folder: Path, model: Any, processor: Any, rules: MediaRules,
        wait_for_turn: Callable[[float], None] = lambda timeout_s: None,
    ):  # fmt: skip
        self.folder, self.model, self.processor, self.rules = Path(folder).absolute(), model, processor, rules
        self.wait_for_turn = wait_for_turn
        self.origin = prefix_hash("", [identity(model, processor)])
        self.head = prompt_pieces(processor, [{"role": "user", "content": [{"type": "video"}, _text("?")]}])[0]
        self.watched_frames = 0
        self._jobs: dict[str, Job] = {}
        self._failures: OrderedDict[str, str] = OrderedDict()  # of videos whose files are still to be watched
        self._loaded: OrderedDict[str, _Loaded] = OrderedDict()
        self._lock = threading.RLock()
        self._queue: queue.Queue[Any] = queue.Queue()
        self._closed = False
        self.folder.mkdir(parents=True, exist_ok=True)
        self._clean()
        self._take_up()
        self._thread = threading.Thread(target=self._work, name="watching", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop watching; what was seen since the last save is seen again next time."""
        self._closed = True
        for job in list(self._jobs.values()):
            job.stopped = True
        self._queue.put(None)
        self._thread.join()

    # --- what there is -----------------------------------------------------------------------------------------------

    def ids(self) -> list[str]:
        """All memories that are whole, being watched, waiting or that failed; the newest first."""
        found = [(path.parent.stat().st_mtime, path.parent.name) for path in self.folder.glob("*/record.json")]
        return [name for _, name in sorted(found, reverse=True)]

    def describe(self, memory_id: str) -> dict[str, Any]:
        """What clients are told of a memory.

        Raises:
            KeyError: there is none of that id.
        """
        folder = self._folder_of(memory_id)
        try:
            record = _read(folder / "record.json")
        except (OSError, ValueError):
            raise KeyError(memory_id) from None
        described = {
            "id": memory_id, "object": "memory", "created": record["created"], "name": record["name"],
            "live": record["live"], "fps": record["pieces"][-1].get("fps") if record["pieces"] else None,
            "standard": record["standard"], "error": record.get("error") or self._failures.get(memory_id),
        }  # fmt: skip
        job = self._jobs.get(memory_id)
        if (whole := _described(folder / "memory")) is not None:
            described |= {name: whole[name] for name in ("num_frames", "num_tokens", "duration_s")}
            described["snapshots_s"] = [one["time_s"] for one in whole["snapshots"]]
            described["num_bytes"] = sum(path.stat().st_size for path in (folder / "memory").glob("*.safetensors"))
            described["status"] = "ready"
        elif described["error"]:
            described["status"] = "failed"
        else:
            described["status"] = job.status if job is not None else "queued"
        if job is not None and described["status"] != "ready":
            described["progress"] = {"num_frames": job.done, "expected": job.expected}
        return described

    def load(self, memory_id: str, at_s: float | None = None) -> VideoMemory:
        """A whole memory, of now or at the time of a snapshot.

        Raises:
            KeyError: there is none of that id. ValueError: it is not whole yet, damaged, or has no such snapshot.
        """
        if (saved := self._saved_at(memory_id)) is None:
            described = self.describe(memory_id)
            why = described["error"] or f"it is {described['status']}"
            raise ValueError(f"the memory {memory_id} is not ready: {why}")
        with self._lock:
            loaded = self._loaded.get(memory_id)
            if loaded is not None:
                self._loaded.move_to_end(memory_id)
        if loaded is not None and loaded.saved == saved:  # or another server that shares the folder changed it
            memory = loaded.memory
        else:
            memory = VideoMemory.from_pretrained(self._folder_of(memory_id) / "memory", self.model, self.processor)
            self._hold(memory_id, memory, saved)
        return memory if at_s is None else memory.at(seconds=at_s)

    def is_loaded(self, memory_id: str) -> bool:
        """Whether `load` takes no time."""
        return memory_id in self._loaded

    def is_standard(self, memory_id: str) -> bool:
        """Whether nothing but the model's own system prompt and videos stand before its end."""
        loaded = self._loaded.get(memory_id)
        return self.describe(memory_id)["standard"] if loaded is None else loaded.is_standard

    def delete(self, memory_id: str) -> None:
        """Forget a memory, also while it is watched.

        Raises:
            KeyError: there is none of that id.
        """
        folder = self._folder_of(memory_id)
        with self._lock:
            if (job := self._jobs.pop(memory_id, None)) is not None:
                job.stopped = True
            self._loaded.pop(memory_id, None)
            self._failures.pop(memory_id, None)
            gone = self.folder / f".deleted-{uuid.uuid4().hex}"
            try:
                folder.rename(gone)  # in one stroke
            except FileNotFoundError:
                raise KeyError(memory_id) from None
        shutil.rmtree(gone, ignore_errors=True)

    @property
    def num_jobs(self) -> int:
        return len(self._jobs)

    def is_ready(self, memory_id: str) -> bool:
        return self._saved_at(memory_id) is not None

    # --- watching ----------------------------------------------------------------------------------------------------

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
            folder = self._folder_of(memory_id)
            folder.mkdir(exist_ok=True)
            try:
                for number, medium in media.items():
                    if medium.source is None:
                        medium.path = medium.path.replace(folder / f"media-{number}")
                write_json(folder / "record.json", record)
            except BaseException:
                for medium in media.values():
                    medium.discard()
                raise
            self._failures.pop(memory_id, None)
            self._start(Job(memory_id, record, media))
        return memory_id

    def job(self, memory_id: str) -> Job | None:
        """The watching of a memory that is not whole yet."""
        return self._jobs.get(memory_id)

    def begin_live(self, name: str) -> str:
        """A memory to which frames are pushed; its id."""
        memory_id = uuid.uuid4().hex
        record = {
            "created": int(time.time()), "name": name, "live": True, "parent": None, "pieces": [], "standard": True,
        }  # fmt: skip
        folder = self._folder_of(memory_id)
        folder.mkdir()
        write_json(folder / "record.json", record)
        memory = VideoMemory(self.model, self.processor)
        memory.save_pretrained(folder / "memory")
        return memory_id

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
                memory = None if _described(folder / "memory") is None else self.load(job.id)
                if memory is None:
                    job.status = "watching"
                    memory = self._watched(job, folder)
        except BaseException as error:
            self._fail(job, folder, error)
        else:
            self._hold(job.id, memory, self._saved_at(job.id))
            self._forget(job)
            job.future.set_result(memory)
            for path in folder.glob("media-*"):
                path.unlink(missing_ok=True)
            shutil.rmtree(folder / "unfinished", ignore_errors=True)
        for medium in job.media.values():
            if medium.file is not None:
                medium.file.close()

    def _fail(self, job: Job, folder: Path, error: BaseException) -> None:
        message = str(error)
        with self._lock:
            self._forget(job)
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
        piece, path, memory, start_s = job.record["pieces"][last], paths[last], None, 0.0
        check(path, "video", self.rules.max_duration_s)
        if _described(folder / "unfinished") is not None:
            with suppress(ValueError):  # one of other code, say: from the beginning, then
                memory = VideoMemory.from_pretrained(folder / "unfinished", self.model, self.processor)
                start_s = memory.sources[-1]["end_s"]
        if memory is None:
            before = self._parent(job.record["parent"])
            memory = self._after(before, job.record["pieces"][:last], paths)
        self._see(job, memory, piece, path, start_s, folder / "unfinished")
        memory.save_pretrained(folder / "memory")
        return memory

    def _see(self, job: Job, memory: VideoMemory, piece: dict, path: Path, start_s: float, unfinished: Path) -> None:
        saved, seen = memory.num_frames, round(start_s * piece["fps"])

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
            if memory.num_frames - saved >= FRAMES_BETWEEN_SAVES:
                memory.save_pretrained(unfinished)
                saved = memory.num_frames
            self.wait_for_turn(YIELD_S)

        job.done = seen
        memory.watch(path, piece["fps"], start_s=start_s, snapshots_s=piece["snapshots_s"], progress=progress)

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

    # --- the folder --------------------------------------------------------------------------------------------------

    def _folder_of(self, memory_id: str) -> Path:
        if len(memory_id) != _ID_LENGTH or not set(memory_id) <= set("0123456789abcdef"):
            raise KeyError(memory_id)
        return self.folder / memory_id

    def _saved_at(self, memory_id: str) -> int | None:
        try:
            return (self._folder_of(memory_id) / "memory" / CONFIG_NAME).stat().st_mtime_ns
        except OSError:
            return None

    def _hold(self, memory_id: str, memory: VideoMemory, saved: int | None) -> None:
        try:
            is_standard = self.describe(memory_id)["standard"]
        except KeyError:
            saved = None
        if saved is None:  # deleted meanwhile
            return
        with self._lock:
            self._loaded[memory_id] = _Loaded(memory, saved, is_standard)
            self._loaded.move_to_end(memory_id)
            held = list(itertools.accumulate(one.num_bytes for one in reversed(self._loaded.values())))
            for _ in range(sum(size > MAX_LOADED_BYTES for size in held[1:])):
                self._loaded.popitem(last=False)

    def _clean(self) -> None:
        """Remove what a server left when it was killed; another one may still be at what is new."""
        for path in self.folder.glob(".deleted-*"):
            shutil.rmtree(path, ignore_errors=True)
        for path in self.folder.glob("incoming-*"):
            with suppress(OSError):
                if time.time() - path.stat().st_mtime > _LEFTOVER_AGE_S:
                    path.unlink()
        for path in self.folder.iterdir():
            with suppress(OSError, KeyError):
                self._folder_of(path.name)
                is_old = time.time() - path.stat().st_mtime > _LEFTOVER_AGE_S
                if is_old and not (path / "record.json").exists():
                    shutil.rmtree(path, ignore_errors=True)

    def _take_up(self) -> None:
        """Go on with what was being watched."""
        for memory_id in reversed(self.ids()):
            try:
                record = _read(self._folder_of(memory_id) / "record.json")
            except (OSError, ValueError, KeyError):
                continue
            if not (record.get("error") or record["live"] or self.is_ready(memory_id)):
                self._start(Job(memory_id, record, {}))

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


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


def _described(folder: Path) -> dict[str, Any] | None:
    """What a memory on disk says of itself; None where there is none."""
    try:
        return _read(folder / CONFIG_NAME)
    except (OSError, ValueError):
        return None


def _without_path(piece: Piece) -> Piece:
    return {name: value for name, value in piece.items() if name != "path"} if isinstance(piece, dict) else piece


def _text(text: str) -> dict[str, str]:
    return {"type": "text", "text": text}
