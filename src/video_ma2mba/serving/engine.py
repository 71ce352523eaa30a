"""Answers everybody's questions together: one loop that takes a step for all rows.

A row is an answer being written. Its past is a state of fixed size, so a row joins and leaves between two steps by
being put beside the others or taken away; there is nothing to page. New questions are read in bounded pieces, side by
side, one piece between two steps: nobody waits for a long one.
"""

import math
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from ..modeling.mamba2 import Mamba2Cache

PIECE_TOKENS = 1024  # of questions that are read between two steps


class TooManyWaiting(Exception):
    """The queue is full: come back later."""


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen.

    Attributes:
        max_new_tokens: the answer ends at the latest here.
        temperature: 0 takes the likeliest token.
        top_p: sample from the likeliest tokens that together have this probability.
        seed: of the row's own generator; None for any.
        ignores_end: write on after the end of the turn.
        num_logprobs: give the log-probability of each token, and of so many of the likeliest; None for neither.
    """

    max_new_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    num_logprobs: int | None = None
    ignores_end: bool = False


@dataclass(frozen=True)
class Token:
    """A token of an answer, its natural log-probability, and the likeliest ones at its place with theirs."""

    id: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


@dataclass(eq=False)
class Row:
    """An answer being written.

    Attributes:
        ids: tokens of the prompt that are still to be read.
        cache: the states to go on from, of one row; never written in place.
        sampling: how tokens are chosen.
        deadline: on the clock of `time.monotonic`.
        every_s: hand over what is new this often, in seconds, the first token at once: 0 each token as it comes;
            infinity all of them at the end.
        listener: called in the engine's thread as (tokens, ending); ending is None, "stop", "length", "timeout" or an
            exception.
        cancelled: nobody wants the rest.
    """

    ids: list[int]
    cache: Mamba2Cache
    sampling: Sampling
    deadline: float
    every_s: float
    listener: Callable[[list[Token], Any], None]
    cancelled: bool = False
    tokens: list[Token] = field(default_factory=list)
    num_given: int = 0  # of the tokens: handed over
    given_at: float = -math.inf  # on the same clock
    generator: torch.Generator | None = None


class Engine:
    """The loop, in a thread of its own.

    Args:
        model: `VideoMa2mbaForConditionalGeneration`, in eval mode.
        num_slots: rows that are answered at once.
        max_waiting: rows that may wait for a slot.
        notify: called in the engine's thread after every step, once its listeners were.

    Attributes:
        steps, answered, generated, read: counts of steps, ended rows, tokens written and tokens read.
    """

    def __init__(
        self, model: Any, num_slots: int = 32, max_waiting: int = 256, notify: Callable[[], None] = lambda: None
    ):
        self.model, self.num_slots, self.max_waiting, self.notify = model, num_slots, max_waiting, notify
        config = model.generation_config
        ends = config.eos_token_id
        self._ends = set(ends if isinstance(ends, list) else [] if ends is None else [ends])
        self._device = model.device  # asked for once: the answer goes through all parameters
        self._suppressed = torch.tensor(config.suppress_tokens or [], dtype=torch.long, device=self._device)
        self._waiting: deque[Row] = deque()
        self._reading: list[Row] = []
        self._writing: list[Row] = []
        self._cache: Mamba2Cache | None = None  # of the rows that are writing, in their order
        self._changed = threading.Condition()
        self._idle = threading.Event()
        self._idle.set()
        self._closed = False
        self.steps = self.answered = self.generated = self.read = 0
        self._thread = threading.Thread(target=self._run, name="answers", daemon=True)
        self._thread.start()

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def num_busy(self) -> int:
        """Slots that are taken."""
        return len(self._reading) + len(self._writing)

    def submit(self, rows: Sequence[Row]) -> None:
        """Take rows, all or none.

        Raises:
            TooManyWaiting: there is no place for them.
        """
        with self._changed:
            if len(self._waiting) + len(rows) > self.max_waiting:
                raise TooManyWaiting
            for row in rows:
                if row.sampling.temperature > 0:
                    row.generator = torch.Generator(self.model.device)
                    if row.sampling.seed is None:
                        row.generator.seed()
                    else:
                        row.generator.manual_seed(row.sampling.seed)
            self._waiting.extend(rows)
            self._idle.clear()
            self._changed.notify()

    def wait_for_turn(self, timeout_s: float) -> None:
        """Return once there is nothing to answer, or after `timeout_s`: for work that is to stand back."""
        self._idle.wait(timeout_s)

    def close(self) -> None:
        """End the loop; what is not answered by now never is."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join()

    # --- the loop ----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def _run(self) -> None:
        while True:
            with self._changed:
                while not (self._closed or self._waiting or self._reading or self._writing):
                    self._idle.set()
                    self._changed.wait()
                if self._closed:
                    return
                self._expire()
                self._waiting = deque(row for row in self._waiting if not row.cancelled)
                self._leave()
                while self._waiting and self.num_busy < self.num_slots:
                    self._reading.append(self._waiting.popleft())
            self._guarded(self._read_piece, self._reading)
            self._leave()  # answers of one token have ended where they were read
            self._guarded(self._write_step, self._writing)
            self.steps += 1
            self.notify()

    def _guarded(self, take: Callable[[], None], rows: list[Row]) -> None:
        try:
            if rows:
                take()
        except Exception as error:  # out of memory, say: those rows are lost, the loop goes on
            for row in rows:
                if not row.cancelled:
                    self._end(row, error)

    def _expire(self) -> None:
        now = time.monotonic()
        for row in (*self._waiting, *self._reading, *self._writing):
            if not row.cancelled and now > row.deadline:
                self._end(row, "timeout")

    def _leave(self) -> None:
        """Rows that ended, or that nobody waits for, go; their slots are free."""
        self._reading = [row for row in self._reading if not row.cancelled]
        kept = [place for place, row in enumerate(self._writing) if not row.cancelled]
        if len(kept) < len(self._writing):
            self._writing = [self._writing[place] for place in kept]
            if self._cache is not None and kept:
                self._cache.reorder_cache(torch.tensor(kept))
            else:
                self._cache = None

    def _read_piece(self) -> None:
        """One call of the model for the next tokens of all questions that are being read."""
        rows = self._reading
        size = max(1, PIECE_TOKENS // len(rows))
        parts = [row.ids[:size] for row in rows]
        longest = max(len(part) for part in parts)
        ids = torch.zeros(len(rows), longest, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for place, part in enumerate(parts):
            ids[place, longest - len(part) :] = torch.tensor(part)
            mask[place, longest - len(part) :] = 1
        cache = rows[0].cache.joined([row.cache for row in rows])
        outputs = self._call(ids, mask, cache)
        self.read += sum(len(part) for part in parts)
        ready = []
        for place, row in enumerate(rows):
            row.ids = row.ids[size:]
            if row.ids:
                row.cache = _rows(outputs.cache, [place])
            else:
                ready.append(place)
        if ready:
            begun = [rows[place] for place in ready]
            self._reading = [row for row in rows if row.ids]
            states = outputs.cache if len(ready) == len(rows) else _rows(outputs.cache, ready)
            self._cache = states if self._cache is None else states.joined([self._cache, states])
            self._writing += begun
            self._choose(outputs.logits[ready, -1], begun)

    def _write_step(self) -> None:
        """The next token of all answers."""
        rows = self._writing
        ids = torch.tensor([[row.tokens[-1].id] for row in rows])
        assert self._cache is not None
        self._cache.own()  # its rows were copied when they joined
        outputs = self._call(ids, None, self._cache)
        self._cache = outputs.cache
        self._choose(outputs.logits[:, -1], rows)

    def _call(self, ids: torch.Tensor, mask: torch.Tensor | None, cache: Any) -> Any:
        mask = None if mask is None else mask.to(self._device)
        return self.model(ids.to(self._device), attention_mask=mask, cache=cache, use_cache=True, logits_to_keep=1)

    def _choose(self, logits: torch.Tensor, rows: list[Row]) -> None:
        """The next token of each row from its (vocabulary) logits; rows that end with it are told so."""
        allowed = logits.index_fill(1, self._suppressed, -torch.inf) if len(self._suppressed) else logits
        chosen = allowed.argmax(1).tolist()
        now = time.monotonic()
        for place, row in enumerate(rows):
            if row.generator is not None:
                chosen[place] = sample(allowed[place], row.sampling, row.generator)
            token = Token(chosen[place])
            if row.sampling.num_logprobs is not None:
                token = _with_logprobs(logits[place], chosen[place], row.sampling.num_logprobs)
            row.tokens.append(token)
            ending = None
            if token.id in self._ends and not row.sampling.ignores_end:
                ending = "stop"
            elif len(row.tokens) >= row.sampling.max_new_tokens:
                ending = "length"
            if ending is not None:
                self._end(row, ending)
            elif row.every_s < math.inf and now - row.given_at >= row.every_s:
                row.given_at = now
                self._hand_over(row, None)
        self.generated += len(rows)

    def _end(self, row: Row, ending: Any) -> None:
        row.cancelled = True
        self.answered += 1
        self._hand_over(row, ending)

    def _hand_over(self, row: Row, ending: Any) -> None:
        new, row.num_given = row.tokens[row.num_given :], len(row.tokens)
        row.listener(new, ending)


def sample(logits: torch.Tensor, sampling: Sampling, generator: torch.Generator) -> int:
    """A token drawn from (vocabulary) logits: of the likeliest ones that together have the probability `top_p`."""
    # of any temperature above 0, however small: the likeliest token stays at 0, and nothing is 0 / 0
    scaled = (logits.double() - logits.max()) / sampling.temperature
    probabilities, order = scaled.softmax(0).sort(descending=True, stable=True)
    before = probabilities.cumsum(0) - probabilities
    probabilities = torch.where(before < sampling.top_p, probabilities, 0.0)
    return int(order[torch.multinomial(probabilities, 1, generator=generator)])


def _with_logprobs(logits: torch.Tensor, chosen: int, count: int) -> Token:
    """The log-probabilities are those of the model, before temperature, top_p and what is never written."""
    logprobs = logits.float().log_softmax(0)
    values, ids = logprobs.topk(min(count, len(logprobs)))
    return Token(chosen, float(logprobs[chosen]), tuple(zip(ids.tolist(), values.tolist(), strict=True)))


def _rows(cache: Mamba2Cache, places: list[int]) -> Mamba2Cache:
    some = cache.copy()
    some.reorder_cache(torch.tensor(places))
    return some
