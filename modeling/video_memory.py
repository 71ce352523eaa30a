"""Watch once, ask forever: the states of a Mamba-2 after a video are all that questions about it need.

    memory = VideoMemory(model, processor)
    memory.watch("talk.mp4")
    memory.ask("What is on the last slide?")
    memory.save_pretrained("talk-memory")

A video is absorbed a few frames at a time by the one primitive (`run_layers`), so memory does not grow with its length.
Frames and text stand in the order of the chat template: an answer is what `generate` gives on the whole input.
"""

import math
import os
import time
import warnings
from contextlib import contextmanager
from itertools import islice, pairwise

import torch

from .checkpoint_plan import format_bytes
from .host_copies import to_device
from .mamba2 import Mamba2Cache
from .read_ahead import read_ahead
from .video_memory_answers import VideoMemoryAnswers
from .video_memory_files import read_memory, write_memory

MAX_FRAMES_PER_CALL = 32  # of the model; more would only hold more memory


def format_clock(seconds):
    """Seconds as m:ss, from an hour on as h:mm:ss."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


class VideoMemory(VideoMemoryAnswers):
    """What a model remembers of the video it has watched: one state per layer, of a size that never changes.

    Args:
        model: `VideoMa2mbaForConditionalGeneration`, in eval mode.
        processor: its `VideoMa2mbaProcessor`.

    Attributes:
        sources: what was watched, one after another: dicts of name, num_frames, and for videos fps, start_s, end_s.
        timestamps_s: of every frame, in seconds of the whole that was watched.
        dialogue: the messages of `chat` so far.
    """

    def __init__(self, model, processor):
        self.model, self.processor = model, processor
        self.sources, self.timestamps_s, self.dialogue = [], [], []
        self._snapshots = {}  # duration_s -> (cache, number of frames)
        with torch.no_grad():
            self._cache = model(self._head().to(model.device), use_cache=True, logits_to_keep=1).cache

    # --- what there is -----------------------------------------------------------------------------------------------

    def __str__(self):
        return (
            f"{self.num_frames} frames up to {format_clock(self.duration_s)}, {self.num_tokens} tokens, "
            f"{format_bytes(self.num_bytes)} of states"
        )

    @property
    def num_frames(self):
        return len(self.timestamps_s)

    @property
    def num_tokens(self):
        """Tokens absorbed so far: those before the video, and those of its frames."""
        return self._cache.num_tokens

    @property
    def num_bytes(self):
        """Bytes of the states: the same for a minute and for a day."""
        return self._cache.num_bytes

    @property
    def duration_s(self):
        """Seconds from the start of the first frame to the start of the last one."""
        return self.timestamps_s[-1] if self.timestamps_s else 0.0

    @property
    def snapshot_times_s(self):
        """The times that `at` knows, in order."""
        return sorted(self._snapshots)

    def at(self, seconds=None, minutes=None):
        """The memory as it was at a time for which `watch` was asked to keep a snapshot.

        Args:
            seconds, minutes: of the whole that was watched; one of the two.

        Returns:
            A `VideoMemory` of its own, of the frames up to that time.

        Raises:
            ValueError: neither or both given, or no snapshot of that time; says which there are.
        """
        if (seconds is None) == (minutes is None):
            raise ValueError("say the time either in seconds or in minutes")
        wanted = float(seconds if minutes is None else 60 * minutes)
        if wanted not in self._snapshots:
            kept = ", ".join(f"{time_s:g}" for time_s in self.snapshot_times_s) or "none"
            raise ValueError(f"no snapshot at {wanted:g} s; there are, in seconds: {kept}. Ask `watch` for it")
        cache, num_frames = self._snapshots[wanted]
        earlier = self._fork(cache, num_frames)
        earlier._snapshots = {time_s: kept for time_s, kept in self._snapshots.items() if time_s <= wanted}
        return earlier

    def copy(self):
        """A memory of its own that goes on from here; the two share their states until one of them reads on."""
        return self._fork(self._cache, self.num_frames)

    def _fork(self, cache, num_frames):
        other = self._of(self.model, self.processor, cache.copy())
        other.timestamps_s, other.sources = self.timestamps_s[:num_frames], list(self.sources)
        other._snapshots = dict(self._snapshots)
        return other

    # --- watching ----------------------------------------------------------------------------------------------------

    def watch(
        self, source, fps=None, *, start_s=0.0, end_s=None, max_frames=None, max_duration_s=None, snapshots_s=(),
        progress=None,
    ):  # fmt: skip
        """Watch a video to its end, on from where the memory stands.

        Decoding runs ahead in a thread of its own while the model reads. Interrupted or failing, it leaves the memory
        as it was. A call that begins where the one before ended in the same video goes on in it seamlessly, and has
        nothing to watch where that was the end of it.

        Args:
            source: what `read_frames` takes (a path, URL, bytes, file object), or an iterator of frames, which may be
                endless: uint8 (3, height, width) or (height, width, 3), or PIL images.
            fps: frames per second of video; None takes the processor's, usually 1.
            start_s, end_s, max_frames: which part; see `VideoMa2mbaVideoProcessor.open_video`.
            max_duration_s: stop after so many seconds of video, whatever the source says of its length.
            snapshots_s: times of the whole that was watched at which the memory is kept for `at`.
            progress: called with (frames so far, frames expected or None) after every micro-batch. The memory then
                stands for what was watched so far, and can be saved.

        Returns:
            A dict of num_frames, num_tokens, decode_s, encode_s.

        Raises:
            ValueError: the video cannot be read, or holds no frame.
        """
        fps = self.processor.video_processor.fps if fps is None else fps
        if max_duration_s is not None:
            if not max_duration_s > 0:
                raise ValueError(f"max_duration_s must be positive, got {max_duration_s}")
            end_s = min(math.inf if end_s is None else end_s, start_s + max_duration_s)
        last = self.sources[-1] if self.sources else {}
        try:
            name, frames, expected = self._open(source, fps, start_s, end_s, max_frames)
        except ValueError as error:
            stood_here = (last.get("name"), last.get("fps"), last.get("end_s")) == (str(source), fps, start_s)
            if stood_here and (start_s == end_s or getattr(error, "beyond_the_end", False)):
                return {"num_frames": 0, "num_tokens": 0, "decode_s": 0.0, "encode_s": 0.0}
            raise
        goes_on = (last.get("name"), last.get("fps"), last.get("end_s")) == (name, fps, start_s)
        earlier, before = (self.sources[:-1], last["num_frames"]) if goes_on else (self.sources, 0)
        offset_s = last["offset_s"] if goes_on else self._next_start_s(1 / fps) - start_s
        seen = {"name": name, "fps": fps, "start_s": last["start_s"] if goes_on else start_s, "offset_s": offset_s}
        seconds = {"decode_s": 0.0, "encode_s": 0.0}

        def batches():
            while True:
                begin = time.perf_counter()
                batch = list(islice(frames, self._frames_per_call))
                seconds["decode_s"] += time.perf_counter() - begin
                if not batch:
                    return
                yield torch.stack([pixels for _, pixels in batch]), [offset_s + time_s for time_s, _ in batch]

        with self._whole_or_not(snapshots_s) as absorb:
            count = 0
            for pixels, timestamps_s in read_ahead(batches()):
                begin = time.perf_counter()
                absorb(pixels, timestamps_s)
                seconds["encode_s"] += time.perf_counter() - begin
                count += len(pixels)
                seen["num_frames"] = before + count
                seen["end_s"] = start_s + count / fps if max_frames is None else None  # spread frames have no next one
                self.sources = [*earlier, dict(seen)]
                if progress is not None:
                    progress(count, expected)
            if count == 0:
                raise ValueError(f"{name}: no frame of it could be read")
        return {"num_frames": count, "num_tokens": count * self.model.config.tokens_per_frame, **seconds}

    @classmethod
    def watch_together(cls, model, processor, sources, fps=None, *, progress=None):
        """Watch several videos side by side, as a batch: each micro-batch holds frames of all that go on.

        Args:
            sources: paths or URLs. fps: as of `watch`. progress: called with (frames so far, frames expected).

        Returns:
            A `VideoMemory` for each, as `watch` alone would have left it.

        Raises:
            ValueError: one of them cannot be read.
        """
        memories = [cls(model, processor) for _ in sources]
        if not memories:
            return []
        fps = processor.video_processor.fps if fps is None else fps
        opened = [memory._open(source, fps, 0.0, None, None) for memory, source in zip(memories, sources, strict=True)]
        expected, done, size = sum(count for _, _, count in opened), 0, memories[0]._frames_per_call
        batches = [read_ahead(_batches(frames, size)) for _, frames, _ in opened]
        try:
            while True:
                parts = [next(batch, None) for batch in batches]
                rows = [(memory, part) for memory, part in zip(memories, parts, strict=True) if part]
                if not rows:
                    break
                cls._absorb_rows(rows)
                done += sum(len(part) for _, part in rows)
                if progress is not None:
                    progress(done, expected)
        finally:
            for batch in batches:
                batch.close()
        for memory, (name, _, _) in zip(memories, opened, strict=True):
            end_s = memory.num_frames / fps
            seen = {"name": name, "fps": fps, "start_s": 0.0, "offset_s": 0.0}
            memory.sources = [{**seen, "num_frames": memory.num_frames, "end_s": end_s}]
        return memories

    @staticmethod
    @torch.no_grad()
    def _absorb_rows(rows):
        """One call of the model for a few frames of several memories; rows with fewer are padded."""
        model, processor = rows[0][0].model, rows[0][0].processor
        config, longest = model.config, max(len(part) for _, part in rows)
        ids = torch.full((len(rows), longest * config.tokens_per_frame), processor.tokenizer.pad_token_id)
        pixels = torch.zeros(len(rows), longest, *rows[0][1][0][1].shape, dtype=torch.uint8)
        for row, (_, part) in enumerate(rows):
            ids[row, : len(part) * config.tokens_per_frame] = config.video_token_id
            pixels[row, : len(part)] = torch.stack([frame for _, frame in part])
        mask, caches = ids == config.video_token_id, [memory._cache for memory, _ in rows]
        together = Mamba2Cache.joined(caches)
        together = model(
            to_device(ids, model.device), ids_on_host=ids, attention_mask=mask,
            pixel_values_videos=to_device(pixels, model.device), cache=together, use_cache=True, logits_to_keep=1,
        ).cache  # fmt: skip
        for row, (memory, part) in enumerate(rows):
            before, cache = memory._cache.num_tokens, together.copy()
            cache.reorder_cache(torch.tensor([row]))
            cache.num_tokens = before + len(part) * config.tokens_per_frame
            memory._cache = cache
            memory.timestamps_s.extend(time_s for time_s, _ in part)

    def _open(self, source, fps, start_s, end_s, max_frames):
        """Name, iterator of (seconds, (3, side, side) uint8), and number of frames expected (None: nobody knows)."""
        video_processor = self.processor.video_processor
        if isinstance(source, str | os.PathLike | bytes) or hasattr(source, "read"):
            opened = video_processor.open_video(
                source, fps=fps, start_s=start_s, end_s=None if end_s == math.inf else end_s, max_frames=max_frames
            )
            frames = ((frame.timestamp_s, torch.from_numpy(frame.pixels).permute(2, 0, 1)) for frame in opened)
            name = str(source) if isinstance(source, str | os.PathLike) else opened.info.path
            return name, frames, opened.num_frames
        if max_frames is not None or start_s:
            raise ValueError("start_s and max_frames are for files; cut the iterator of frames instead")
        limit = None if end_s is None else math.ceil(end_s * fps)
        frames = (
            (number / fps, video_processor.load([frame]).frames[0])
            for number, frame in enumerate(islice(source, limit))
        )
        return "frames", frames, limit

    def push_frames(self, frames, timestamps_s=None):
        """Watch frames that are at hand, as a live source gives them.

        Args:
            frames: (frames, 3, height, width) or (frames, height, width, 3) uint8, or a list of pictures, of any size:
                what `VideoMa2mbaVideoProcessor.load` takes, which resizes them.
            timestamps_s: seconds of the whole, one for each frame, rising; None goes on a second at a time.

        Raises:
            ValueError: frames of another dtype or form, or timestamps that do not fit or go backwards.
        """
        if hasattr(frames, "shape") and len(frames.shape) != 4:
            raise ValueError(f"frames must have four dimensions, (frames, 3, height, width); got {tuple(frames.shape)}")
        pixels = self.processor.video_processor.load(frames).frames if len(frames) else frames
        if timestamps_s is None:
            first = self._next_start_s(1.0)
            timestamps_s = [first + i for i in range(len(pixels))]
        timestamps_s = [float(time_s) for time_s in timestamps_s]
        if len(timestamps_s) != len(pixels):
            raise ValueError(f"{len(timestamps_s)} timestamps for {len(pixels)} frames: there must be one for each")
        rising = [*self.timestamps_s[-1:], *timestamps_s]
        if not all(math.isfinite(time_s) for time_s in timestamps_s) or any(
            later <= earlier for earlier, later in pairwise(rising)
        ):
            raise ValueError(f"timestamps_s must rise, also from the {self.duration_s:g} s watched so far")
        size = self._frames_per_call
        with self._whole_or_not() as absorb:
            for start in range(0, len(pixels), size):
                absorb(pixels[start : start + size], timestamps_s[start : start + size])
            self.sources = [*self.sources, {"name": "frames", "num_frames": len(pixels)}]

    @contextmanager
    def _whole_or_not(self, snapshots_s=()):
        """Gives a function that absorbs frames; an exception inside leaves the memory as it was before."""
        before = self._cache, self.timestamps_s, self._snapshots, self.sources
        # these states are replaced and not written in place, so keeping the old ones takes no copy
        self._cache, self.timestamps_s = self._cache.copy(), list(self.timestamps_s)
        self._snapshots = dict(self._snapshots)
        wanted = sorted({float(time_s) for time_s in snapshots_s})
        if not all(math.isfinite(time_s) and time_s >= 0 for time_s in wanted):
            raise ValueError(f"snapshots_s must be finite and not below 0, got {wanted}")
        begun_s = max(self.timestamps_s, default=0.0)
        waiting = [time_s for time_s in wanted if time_s >= begun_s]

        def absorb(pixels, timestamps_s):
            while waiting and waiting[0] < timestamps_s[-1]:
                # cut the micro-batch where the snapshot is due
                due = waiting.pop(0)
                count = sum(time_s <= due for time_s in timestamps_s)
                self._absorb(pixels[:count], timestamps_s[:count])
                self._snapshots[due] = self._cache.copy(), self.num_frames
                pixels, timestamps_s = pixels[count:], timestamps_s[count:]
            self._absorb(pixels, timestamps_s)
            while waiting and waiting[0] == timestamps_s[-1]:
                self._snapshots[waiting.pop(0)] = self._cache.copy(), self.num_frames

        try:
            yield absorb
        except BaseException:
            self._cache, self.timestamps_s, self._snapshots, self.sources = before
            raise
        if missed := [f"{time_s:g}" for time_s in wanted if time_s not in self._snapshots]:
            warnings.warn(
                f"no snapshot at {', '.join(missed)} s: watched were {begun_s:g} to {self.timestamps_s[-1]:g} s",
                stacklevel=4,
            )

    @torch.no_grad()
    def _absorb(self, pixels, timestamps_s):
        """pixels: (frames, 3, side, side) uint8."""
        if not len(pixels):
            return
        config, device = self.model.config, self.model.device
        ids = torch.full((1, len(pixels) * config.tokens_per_frame), config.video_token_id)
        self._cache = self.model(
            to_device(ids, device), ids_on_host=ids, pixel_values_videos=to_device(pixels[None], device),
            cache=self._cache, use_cache=True, logits_to_keep=1,
        ).cache  # fmt: skip
        self.timestamps_s.extend(timestamps_s)

    @property
    def _frames_per_call(self):
        return min(self.model.config.vision_chunk_size, MAX_FRAMES_PER_CALL)

    def _next_start_s(self, step_s):
        return self.duration_s + step_s if self.timestamps_s else 0.0

    # --- keeping -----------------------------------------------------------------------------------------------------

    def save_pretrained(self, folder):
        """Write the memory to `folder`, whole or not at all: safetensors and JSON.

        Raises:
            OSError: it cannot be written; what was there before is still there.
        """
        write_memory(
            folder, self.model, self.processor,
            caches={"states": self._cache, **{_label(time_s): cache for time_s, (cache, _) in self._snapshots.items()}},
            timestamps_s=self.timestamps_s,
            described={
                "num_tokens": self.num_tokens,
                "num_frames": self.num_frames,
                "duration_s": self.duration_s,
                "sources": self.sources,
                "dialogue": self.dialogue,
                "snapshots": [
                    {"time_s": time_s, "num_frames": count} for time_s, (_, count) in self._snapshots.items()
                ],
            },
        )  # fmt: skip

    @classmethod
    def from_pretrained(cls, folder, model, processor):
        """A memory that `save_pretrained` wrote to `folder`, for the `model` and `processor` it was made with.

        Raises:
            ValueError: no memory there, a damaged one, one of a newer format, or one of another model or processor.
        """
        described, caches, timestamps_s = read_memory(folder, model, processor)
        memory = cls._of(model, processor, caches["states"])
        memory.timestamps_s = timestamps_s
        memory.sources, memory.dialogue = described["sources"], described["dialogue"]
        memory._snapshots = {
            one["time_s"]: (caches[_label(one["time_s"])], one["num_frames"]) for one in described["snapshots"]
        }
        return memory

    @classmethod
    def _of(cls, model, processor, cache):
        memory = object.__new__(cls)
        memory.model, memory.processor, memory._cache = model, processor, cache
        memory.sources, memory.timestamps_s, memory.dialogue, memory._snapshots = [], [], [], {}
        return memory


def _label(time_s):
    return f"snapshot-{time_s!r}"


def _batches(items, size):
    """Lists of `size` items, the last one maybe shorter."""
    while batch := list(islice(items, size)):
        yield batch
