"""Videos that were watched, kept on disk: the state where a video ends, under the hash of all that led to it.

    DIR/<id>/record.json   what is watched: the pieces that end with the video, and the memory they go on from
    DIR/<id>/media-<n>     its files, while they are needed
    DIR/<id>/unfinished    the memory so far, while it is watched
    DIR/<id>/memory        the memory, whole
    DIR/<id>/video         what was uploaded, where videos are kept
    DIR/<id>/stills        pictures to be shown, where they were asked for; see `shown.py`

An id is the hash of weights, file, sampling and whatever stands before the video in its conversation, so that nothing
is watched twice, also over restarts and by servers that share the folder. A memory is there whole or not at all; one
that was being watched when its server died is gone on with by the next.
"""

import itertools
import json
import os
import queue
import shutil
import threading
import time
import uuid
from collections import OrderedDict
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..files import write_json
from ..modeling.video_memory import VideoMemory
from ..modeling.video_memory_files import CONFIG_NAME, identity
from .media import MediaRules, Medium
from .prompts import prefix_hash
from .watching import VIDEO_NAME, Job, MemoryWatching, remove_what_is_done_with

MAX_LOADED_BYTES = 4 * 2**30  # of memories that are held, so that questions need not read them from disk
_LEFTOVER_AGE_S = 24 * 3600
_ID_LENGTH = 32


@dataclass(frozen=True, eq=False)
class _Loaded:
    """A memory that is held, and when it was saved."""

    memory: VideoMemory
    saved: int
    is_standard: bool

    @property
    def num_bytes(self) -> int:
        return self.memory.num_bytes * (1 + len(self.memory.snapshot_times_s))


class Memories(MemoryWatching):
    """The folder, the thread that watches, and the memories that were asked about lately.

    Args:
        folder: where they are kept; made if need be.
        model, processor: that watch.
        rules: bounds of the media.
        wait_for_turn: called before each micro-batch with seconds: the thread's chance to stand back.
        keeps_videos: keep what is uploaded, to be shown.
    """

    def __init__(
        self, folder: Path, model: Any, processor: Any, rules: MediaRules,
        wait_for_turn: Callable[[float], None] = lambda timeout_s: None, keeps_videos: bool = False,
    ):  # fmt: skip
        self.folder, self.model, self.processor, self.rules = Path(folder).absolute(), model, processor, rules
        self.wait_for_turn, self.keeps_videos = wait_for_turn, keeps_videos
        self.origin = prefix_hash("", [identity(model, processor)])
        # what snapshots take, of one memory
        self.max_snapshots = MAX_LOADED_BYTES // model.model.language_model.new_cache(1).num_bytes
        head = processor.pieces([{"role": "user", "content": [{"type": "video"}, _text("?")]}])[0]
        assert isinstance(head, list)  # the tokens before a medium
        self.head = head
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
        found = []
        for path in self.folder.glob("*/record.json"):
            with suppress(FileNotFoundError):  # deleted just now
                found.append((path.parent.stat().st_mtime, path.parent.name))
        return [name for _, name in sorted(found, reverse=True)]

    def describe(self, memory_id: str) -> dict[str, Any]:
        """What clients are told of a memory.

        Raises:
            KeyError: there is none of that id.
        """
        folder = self._folder_of(memory_id)
        job = self._jobs.get(memory_id)  # before the record, into which it writes how it ended
        try:
            record = _read(folder / "record.json")
        except (OSError, ValueError):
            raise KeyError(memory_id) from None
        last = record["pieces"][-1] if record["pieces"] else {}
        described = {
            "id": memory_id, "object": "memory", "created": record["created"], "name": record["name"],
            "live": record["live"], "fps": last.get("fps"), "start_s": last.get("start_s", 0.0),
            "standard": record["standard"], "has_stills": (folder / "stills").is_dir(),
            "error": record.get("error") or self._failures.get(memory_id),
        }  # fmt: skip
        if (whole := _described(folder / "memory")) is not None:
            described |= {name: whole[name] for name in ("num_frames", "num_tokens", "duration_s")}
            described["snapshots_s"] = [one["time_s"] for one in whole["snapshots"]]
            described["num_bytes"] = 0
            with suppress(FileNotFoundError):  # replaced just now
                described["num_bytes"] = (folder / "memory" / whole["states"]).stat().st_size
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
        while (saved := self._saved_at(memory_id)) is not None:
            with self._lock:
                loaded = self._loaded.get(memory_id)
                if loaded is not None:
                    self._loaded.move_to_end(memory_id)
            if loaded is not None and loaded.saved == saved:  # or another server that shares the folder changed it
                memory = loaded.memory
            else:
                try:
                    memory = VideoMemory.from_pretrained(
                        self._folder_of(memory_id) / "memory", self.model, self.processor
                    )
                except Exception:  # damage of any kind, or
                    if self._saved_at(memory_id) != saved:  # frames came meanwhile, or it was deleted
                        continue
                    raise
                self._hold(memory_id, memory, saved)
            return memory if at_s is None else memory.at(seconds=at_s)
        described = self.describe(memory_id)
        why = described["error"] or f"it is {described['status']}"
        raise ValueError(f"the memory {memory_id} is not ready: {why}")

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

    def rename(self, memory_id: str, name: str) -> None:
        """Call a memory otherwise.

        Raises:
            OSError: it cannot be written, or was deleted meanwhile.
        """
        path = self._folder_of(memory_id) / "record.json"
        with self._lock:
            modified = path.parent.stat().st_mtime_ns
            write_json(path, {**_read(path), "name": name})
            os.utime(path.parent, ns=(modified, modified))  # the list is by age, and it is no younger now
            if (job := self._jobs.get(memory_id)) is not None:
                job.record["name"] = name

    def video(self, memory_id: str) -> Medium | None:
        """The video of a memory, where it is still at hand: kept here, or under a folder that clients may name."""
        folder = self._folder_of(memory_id)
        pieces = _read(folder / "record.json")["pieces"]
        if not pieces:
            return None
        path, source = folder / VIDEO_NAME, pieces[-1]["path"]
        if source is None:
            return Medium(path, pieces[-1]["sha256"]) if path.is_file() else None
        with suppress(ValueError, OSError):
            medium = self.rules.open(source)
            if medium.sha256 == pieces[-1]["sha256"]:
                return medium
            medium.discard()
        return None

    @property
    def num_jobs(self) -> int:
        return len(self._jobs)

    def is_ready(self, memory_id: str) -> bool:
        return self._saved_at(memory_id) is not None

    def begin_live(self, name: str) -> str:
        """A memory to which frames are pushed; its id."""
        memory_id = uuid.uuid4().hex
        record = {
            "created": int(time.time()), "name": name, "live": True, "parent": None, "pieces": [], "standard": True,
        }  # fmt: skip
        folder = self._folder_of(memory_id)
        try:
            VideoMemory(self.model, self.processor).save_pretrained(folder / "memory")
            write_json(folder / "record.json", record)  # last: by this file a memory is there
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise
        return memory_id

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
                    shutil.rmtree(path) if path.is_dir() else path.unlink()
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
            if self.is_ready(memory_id):
                remove_what_is_done_with(self._folder_of(memory_id))
            elif not (record.get("error") or record["live"]):
                self._start(Job(memory_id, record, {}))


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


def _described(folder: Path) -> dict[str, Any] | None:
    """What a memory on disk says of itself; None where there is none."""
    try:
        return _read(folder / CONFIG_NAME)
    except (OSError, ValueError):
        return None


def _text(text: str) -> dict[str, str]:
    return {"type": "text", "text": text}
