"""Watch once, ask forever: the states of a Mamba-2 after a video are all that questions about it need.

    memory = VideoMemory(model, processor)
    memory.watch("talk.mp4")
    memory.ask("What is on the last slide?")
    memory.save_pretrained("talk-memory")

A video is absorbed a few frames at a time by the one primitive (`run_layers`), so memory does not grow with its length.
Frames and text stand in the order of the chat template: an answer is what `generate` gives on the whole input.
"""

import math
import queue
import threading
import time
from contextlib import contextmanager
from itertools import islice, pairwise

import torch
from transformers import TextIteratorStreamer

from .video_memory_files import read_memory, write_memory

READ_AHEAD = 2  # micro-batches that are decoded while the model is at work


class VideoMemory:
    """What a model remembers of the video it has watched: one state per layer, of a size that never changes.

    Args:
        model: `VideoMa2mbaForConditionalGeneration`, in eval mode.
        processor: its `VideoMa2mbaProcessor`.

    Attributes:
        sources: for each call of `watch` or `push_frames`, what it watched: a dict of name and number of frames.
        timestamps_s: of every frame, in seconds of the whole that was watched.
        dialogue: the messages of `chat` so far.
    """

    def __init__(self, model, processor):
        self.model, self.processor = model, processor
        self.sources, self.timestamps_s, self.dialogue = [], [], []
        self._snapshots = {}  # duration_s -> (cache, number of frames)
        with torch.no_grad():
            self._cache = model(self._head().to(model.device), use_cache=True, logits_to_keep=1).cache_params

    # --- what there is -----------------------------------------------------------------------------------------------

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

    def at(self, seconds=None, minutes=None):
        """The memory as it was at a time for which `watch` was asked to keep a snapshot.

        Returns:
            A `VideoMemory` of its own, of the frames up to that time.

        Raises:
            ValueError: neither or both given, or no snapshot of that time; says which there are.
        """
        if (seconds is None) == (minutes is None):
            raise ValueError("say the time either in seconds or in minutes")
        wanted = float(seconds if minutes is None else 60 * minutes)
        if wanted not in self._snapshots:
            kept = ", ".join(f"{time_s:g}" for time_s in sorted(self._snapshots)) or "none"
            raise ValueError(f"no snapshot at {wanted:g} s; there are, in seconds: {kept}. Ask `watch` for it")
        cache, num_frames = self._snapshots[wanted]
        earlier = self._of(self.model, self.processor, cache.copy())
        earlier.timestamps_s = self.timestamps_s[:num_frames]
        earlier.sources = list(self.sources)
        earlier._snapshots = {time_s: kept for time_s, kept in self._snapshots.items() if time_s <= wanted}
        return earlier

    # --- watching ----------------------------------------------------------------------------------------------------

    def watch(self, source, fps=None, *, start_s=0.0, end_s=None, max_frames=None, snapshots_s=(), progress=None):
        """Watch a video file to its end, on from where the memory stands.

        Decoding runs ahead in a thread of its own while the model reads. Interrupted or failing, it leaves the memory
        as it was.

        Args:
            source: path or URL.
            fps: frames per second of video; None takes the processor's, usually 1.
            start_s, end_s, max_frames: which part; see `VideoMa2mbaVideoProcessor.open_video`.
            snapshots_s: times of the whole that was watched at which the memory is kept for `at`.
            progress: called with (frames so far, frames expected) after every micro-batch.

        Returns:
            A dict of num_frames, num_tokens, decode_s, encode_s.

        Raises:
            ValueError: the video cannot be read, or holds no frame.
        """
        frames = self.processor.video_processor.open_video(
            source, fps=fps, start_s=start_s, end_s=end_s, max_frames=max_frames
        )
        offset_s = self._next_start_s()
        seconds = {"decode_s": 0.0, "encode_s": 0.0}

        def batches():
            while True:
                begin = time.perf_counter()
                batch = list(islice(frames, self.model.config.vision_chunk_size))
                seconds["decode_s"] += time.perf_counter() - begin
                if not batch:
                    return
                pixels = torch.stack([torch.from_numpy(frame.pixels) for frame in batch]).permute(0, 3, 1, 2)
                yield pixels, [offset_s + frame.timestamp_s - start_s for frame in batch]

        with self._whole_or_not(snapshots_s) as absorb:
            count = 0
            for pixels, timestamps_s in _ahead(batches()):
                begin = time.perf_counter()
                absorb(pixels, timestamps_s)
                seconds["encode_s"] += time.perf_counter() - begin
                count += len(pixels)
                if progress is not None:
                    progress(count, frames.num_frames)
            if count == 0:
                raise ValueError(f"{source}: no frame of it could be read")
            self.sources = [*self.sources, {"name": str(source), "num_frames": count}]
        return {"num_frames": count, "num_tokens": count * self.model.config.tokens_per_frame, **seconds}

    def push_frames(self, frames, timestamps_s=None):
        """Watch frames that are at hand, as a live source gives them.

        Args:
            frames: (frames, 3, height, width) or (frames, height, width, 3) uint8, of any size: they are resized as the
                processor does.
            timestamps_s: seconds of the whole, one for each frame, rising; None goes on a second at a time.

        Raises:
            ValueError: frames of another dtype or form, or timestamps that do not fit or go backwards.
        """
        pixels = torch.as_tensor(frames)
        if pixels.dtype != torch.uint8 or pixels.ndim != 4 or 3 not in (pixels.shape[1], pixels.shape[-1]):
            raise ValueError(
                "frames must be uint8 and (frames, 3, height, width) or (frames, height, width, 3); got "
                f"{pixels.dtype} {tuple(pixels.shape)}"
            )
        pixels = self.processor.video_processor.load(pixels).frames
        if timestamps_s is None:
            first = self._next_start_s()
            timestamps_s = [first + i for i in range(len(pixels))]
        timestamps_s = [float(time_s) for time_s in timestamps_s]
        if len(timestamps_s) != len(pixels):
            raise ValueError(f"{len(timestamps_s)} timestamps for {len(pixels)} frames: there must be one for each")
        rising = [*self.timestamps_s[-1:], *timestamps_s]
        if not all(math.isfinite(time_s) for time_s in timestamps_s) or any(
            later <= earlier for earlier, later in pairwise(rising)
        ):
            raise ValueError(f"timestamps_s must rise, also from the {self.duration_s:g} s watched so far")
        size = self.model.config.vision_chunk_size
        with self._whole_or_not() as absorb:
            for start in range(0, len(pixels), size):
                absorb(pixels[start : start + size], timestamps_s[start : start + size])
            self.sources = [*self.sources, {"name": "frames", "num_frames": len(pixels)}]

    @contextmanager
    def _whole_or_not(self, snapshots_s=()):
        """Gives a function that absorbs frames; an exception inside leaves the memory as it was before."""
        before = self._cache, self.timestamps_s, self._snapshots, self.sources
        # states are replaced and never written in place, so keeping the old ones takes no copy
        self._cache, self.timestamps_s = self._cache.copy(), list(self.timestamps_s)
        self._snapshots = dict(self._snapshots)
        waiting = sorted(float(time_s) for time_s in snapshots_s)

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

    @torch.no_grad()
    def _absorb(self, pixels, timestamps_s):
        """pixels: (frames, 3, side, side) uint8."""
        if not len(pixels):
            return
        config, device = self.model.config, self.model.device
        ids = torch.full((1, len(pixels) * config.tokens_per_frame), config.video_token_id, device=device)
        self._cache = self.model(
            ids, pixel_values_videos=pixels[None].to(device), cache_params=self._cache, use_cache=True, logits_to_keep=1
        ).cache_params
        self.timestamps_s.extend(timestamps_s)

    def _next_start_s(self):
        return self.duration_s + 1.0 if self.timestamps_s else 0.0

    # --- asking ------------------------------------------------------------------------------------------------------

    def ask(self, question, *, stream=False, **generate_kwargs):
        """Answer from a copy of the states; the memory stays as it is.

        Args:
            question: one question, or a list of them, which are answered in one batch.
            stream: yield the text of the answer to one question as it is produced.
            generate_kwargs: for `generate`, such as max_new_tokens.

        Returns:
            The answer; a list of answers for a list; an iterator of pieces of text with `stream`.

        Raises:
            ValueError: an empty question, or a list to be streamed.
        """
        questions = [question] if isinstance(question, str) else list(question)
        for number, text in enumerate(questions, 1):
            if not isinstance(text, str) or not text.strip():
                raise ValueError(f"question {number} is empty")
        if not questions:
            return []
        dialogues = [[{"role": "user", "content": text}] for text in questions]
        if stream:
            if not isinstance(question, str):
                raise ValueError("only one question at a time can be streamed")
            return self._stream(dialogues[0], generate_kwargs)
        answers = [self._text(ids) for ids in self._generate(dialogues, generate_kwargs)]
        return answers[0] if isinstance(question, str) else answers

    def chat(self, message, *, stream=False, **generate_kwargs):
        """As `ask`, but what was said before stands in the prompt, and this is added to `dialogue`."""
        if not message.strip():
            raise ValueError("the message is empty")
        dialogue = [*self.dialogue, {"role": "user", "content": message}]
        if not stream:
            answer = self._text(self._generate([dialogue], generate_kwargs)[0])
            self.dialogue = [*dialogue, {"role": "assistant", "content": answer}]
            return answer

        def pieces():
            said = []
            for piece in self._stream(dialogue, generate_kwargs):
                said.append(piece)
                yield piece
            self.dialogue = [*dialogue, {"role": "assistant", "content": "".join(said).strip()}]

        return pieces()

    def num_prompt_tokens(self, question):
        """Tokens of the prompt after the video."""
        return len(self._tail([{"role": "user", "content": question}]))

    def generate(self, questions, **generate_kwargs):
        """The token ids of the answers to a list of questions: int64 (new tokens,) each."""
        return self._generate([[{"role": "user", "content": text}] for text in questions], generate_kwargs)

    @torch.no_grad()
    def _generate(self, dialogues, generate_kwargs):
        tails = [self._tail(dialogue) for dialogue in dialogues]
        longest = max(tail.shape[0] for tail in tails)
        pad = self.processor.tokenizer.pad_token_id
        ids = torch.full((len(tails), longest), pad, device=self.model.device)
        mask = torch.zeros_like(ids)
        for row, tail in enumerate(tails):
            ids[row, longest - len(tail) :] = tail.to(ids.device)
            mask[row, longest - len(tail) :] = 1
        cache = self._cache.copy()
        cache.batch_repeat_interleave(len(tails))
        sequences = self.model.generate(ids, attention_mask=mask, cache_params=cache, **generate_kwargs)
        return list(sequences[:, longest:])

    def _stream(self, dialogue, generate_kwargs):
        streamer = TextIteratorStreamer(self.processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
        failure = []

        def work():
            try:
                self._generate([dialogue], {**generate_kwargs, "streamer": streamer})
            except BaseException as error:  # handed to whoever reads the text
                failure.append(error)
                streamer.end()

        thread = threading.Thread(target=work, daemon=True)
        thread.start()
        for piece in streamer:
            if piece:
                yield piece
        thread.join()
        if failure:
            raise failure[0]

    def _text(self, ids):
        return self.processor.tokenizer.decode(ids, skip_special_tokens=True).strip()

    # --- the prompt --------------------------------------------------------------------------------------------------

    def _prompt(self, dialogue):
        """Token ids of a dialogue about a video of one frame, and where that frame stands."""
        side = self.processor.video_processor.side
        frame = {"type": "video", "video": torch.zeros(1, 3, side, side, dtype=torch.uint8)}
        first, *rest = dialogue
        content = [frame, {"type": "text", "text": first["content"]}]
        ids = self.processor.apply_chat_template(
            [{"role": "user", "content": content}, *rest],
            add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt",
        )["input_ids"][0]  # fmt: skip
        places = (ids == self.processor.video_token_id).nonzero().flatten()
        return ids, places[0], places[-1]

    def _head(self):
        ids, first, _ = self._prompt([{"role": "user", "content": "?"}])
        return ids[None, :first]

    def _tail(self, dialogue):
        ids, _, last = self._prompt(dialogue)
        return ids[last + 1 :]

    # --- keeping -----------------------------------------------------------------------------------------------------

    def save_pretrained(self, folder):
        """Write the memory to a folder, whole or not at all: safetensors and JSON.

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
        """A memory that `save_pretrained` wrote.

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


def _ahead(batches):
    """What `batches` yields, made in a thread at most `READ_AHEAD` items before it is asked for."""
    ready, stopped = queue.Queue(maxsize=READ_AHEAD), threading.Event()

    def put(item):
        while not stopped.is_set():
            try:
                return ready.put(item, timeout=0.1)
            except queue.Full:
                continue

    def work():
        try:
            for batch in batches:
                put((batch, None))
                if stopped.is_set():
                    return
            put((None, None))
        except BaseException as error:  # raised where the batches are read
            put((None, error))

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    try:
        while True:
            batch, error = ready.get()
            if error is not None:
                raise error
            if batch is None:
                return
            yield batch
    finally:
        stopped.set()
        thread.join()
