"""From tokens to what a client reads: text that is never taken back, stop strings, OpenAI's objects."""

import asyncio
import json
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from .engine import Row, Token

SETTLED_TOKENS = 64  # of an answer, whose text no longer changes


class Transcript:
    """The text of an answer as its tokens come.

    What `push` and `finish` give, joined, is the whole answer, stripped, up to the first of the stop strings. Held back
    is what may still change: bytes of half a character, white space at the end, the beginning of a stop string.

    Args:
        tokenizer: that of the model.
        stops: strings that end the answer and do not stand in it.
    """

    def __init__(self, tokenizer: Any, stops: Sequence[str] = ()):
        self.tokenizer, self.stops = tokenizer, stops
        self.ids: list[int] = []
        # a long answer is not decoded anew with each token: the text of ids[:place], those of them from `context` on
        # being decoded again, since how a token reads may depend on the one before
        self._settled, self._known, self._context, self._place = "", "", 0, 0
        self.given = 0  # characters
        self.is_stopped = False

    def push(self, ids: Sequence[int]) -> str:
        """The text that is certain now and was not before."""
        self.ids += ids
        text = self._text()
        if self.stops:
            found = [place for stop in self.stops if (place := text.find(stop)) >= 0]
            if found:
                self.is_stopped = True
                return self._new(text[: min(found)])
            text = text[: len(text) - max(_begun(text, stop) for stop in self.stops)]
        return self._new(text.rstrip("\ufffd"))

    def finish(self) -> str:
        """The rest of the text, once no more tokens come."""
        return "" if self.is_stopped else self._new(self._text())

    def _text(self) -> str:
        text = self._settled + self._decoded(self.ids[self._context :])[len(self._known) :]
        if len(self.ids) - self._place >= SETTLED_TOKENS and not text.endswith("\ufffd"):
            self._settled, self._context, self._place = text, self._place, len(self.ids)
            self._known = self._decoded(self.ids[self._context :])
        return text.lstrip()

    def _decoded(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=True)

    def _new(self, text: str) -> str:
        new = text.rstrip()[self.given :]
        self.given += len(new)
        return new


def _begun(text: str, stop: str) -> int:
    """How many characters at the end of a text are the beginning of a stop string."""
    return next((size for size in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:size])), 0)


class Deliveries:
    """Hands over what the engine's thread has to say to the event loop, once for every step."""

    def __init__(self) -> None:
        self.loop: asyncio.AbstractEventLoop | None = None
        self._pending: deque = deque()

    def listener(self, to: asyncio.Queue) -> Callable[[list[Token], Any], None]:
        return lambda tokens, ending: self._pending.append((to, tokens, ending))

    def notify(self) -> None:
        if self._pending and self.loop is not None and not self.loop.is_closed():
            self.loop.call_soon_threadsafe(self._flush)

    def _flush(self) -> None:
        while self._pending:
            to, tokens, ending = self._pending.popleft()
            to.put_nowait((tokens, ending))


class Overdue(Exception):
    """The answer took longer than this server's time-out."""


@dataclass(eq=False)
class Answer:
    """One answer of a request, being written.

    Attributes:
        index: its number among the answers.
        tokens: what it consists of so far, without the end of its turn.
        finish_reason: None, then "stop" or "length".
    """

    index: int
    row: Row
    queue: asyncio.Queue
    transcript: Transcript
    started: float = field(default_factory=time.monotonic)
    num_tokens: int = 0
    finish_reason: str | None = None

    async def parts(self) -> AsyncIterator[tuple[str, list[Token]]]:
        """Text and the tokens that it came with, until the answer ends. Left early, its slot is free."""
        try:
            while self.finish_reason is None:
                tokens, ending = await self.queue.get()
                if isinstance(ending, Exception):
                    raise ending
                if ending == "timeout":
                    raise Overdue
                self.num_tokens += len(tokens)
                if ending == "stop":
                    tokens = tokens[:-1]  # the end of the turn is no text
                text = self.transcript.push([token.id for token in tokens])
                if self.transcript.is_stopped:
                    self.finish_reason = "stop"
                elif ending is not None:
                    text += self.transcript.finish()
                    self.finish_reason = ending
                yield text, tokens
        finally:
            self.row.cancelled = True


def logprobs_object(tokenizer: Any, tokens: Sequence[Token]) -> dict[str, Any]:
    """OpenAI's `logprobs` of some tokens."""

    def said(token_id: int, logprob: float) -> dict[str, Any]:
        text = tokenizer.decode([token_id])
        whole = None if "\ufffd" in text else list(text.encode())
        return {"token": text, "logprob": logprob, "bytes": whole}

    content = [
        {**said(token.id, token.logprob or 0.0), "top_logprobs": [said(*one) for one in token.top]} for token in tokens
    ]
    return {"content": content, "refusal": None}


def usage_object(prompt_tokens: int, cached_tokens: int, completion_tokens: int) -> dict[str, Any]:
    return {
        "prompt_tokens": prompt_tokens, "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens, "prompt_tokens_details": {"cached_tokens": cached_tokens},
    }  # fmt: skip


def event(value: Any) -> str:
    """A server-sent event."""
    return f"data: {value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)}\n\n"
