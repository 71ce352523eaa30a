"""`POST /v1/chat/completions`: what a conversation begins with is watched or remembered, the rest is answered."""

import asyncio
import math
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from typing import Any

from ..modeling.mamba2 import Mamba2Cache
from ..modeling.video_memory import VideoMemory
from ..modeling.video_memory_answers import MAX_QUESTION_TOKENS
from .answers import Answer, Deliveries, Transcript, event, logprobs_object, usage_object
from .engine import Engine, Row, Sampling
from .guard import ApiError
from .media import Medium
from .memories import Memories
from .prompts import Entry, Piece, Shown
from .schema import ChatRequest, ImagePart, MemoryPart
from .watching import Stopped

Bring = Callable[[str], Awaitable[Medium]]

EVENTS_S = 0.05  # between two events of an answer, at least: faster than anybody reads; stop strings need every token
LONG_TEXT = 10_000  # characters that are tokenised in a thread of their own


@dataclass(frozen=True)
class Prompt:
    """Where an answer begins.

    Attributes:
        cache: the states to go on from. ids: tokens to be read first. num_cached: tokens that need not be read again.
    """

    cache: Mamba2Cache
    ids: list[int]
    num_cached: int


class Chat:
    """Answers requests.

    Args:
        name: of the model, as clients know it.
        bring: the medium of a URL, as `MediaRules.bring` has it.
        timeout_s: seconds that a request may take.
        max_new_tokens: of an answer where the request does not say.
        translate: turns an exception into an `ApiError`.
    """

    def __init__(
        self, name: str, model: Any, processor: Any, engine: Engine, memories: Memories, bring: Bring,
        deliveries: Deliveries, timeout_s: float, max_new_tokens: int, translate: Callable[[BaseException], ApiError],
    ):  # fmt: skip
        self.name, self.model, self.processor, self.engine = name, model, processor, engine
        self.memories, self.bring, self.deliveries = memories, bring, deliveries
        self.timeout_s, self.max_new_tokens, self.translate = timeout_s, max_new_tokens, translate
        config = model.generation_config
        self.temperature = (1.0 if config.temperature is None else config.temperature) if config.do_sample else 0.0
        self.top_p = 1.0 if config.top_p is None else config.top_p
        self.num_prompt_tokens = self.num_cached_tokens = self.num_first_tokens = 0
        self.first_token_s = 0.0  # summed over the answers

    # --- the beginning -----------------------------------------------------------------------------------------------

    async def prompt(self, request: ChatRequest) -> Prompt:
        """Watch what has to be watched, and say where the answer begins.

        Raises:
            ApiError: no such memory. ValueError: not a conversation of the schema; and as of `MediaRules.bring`.
        """
        conversation = request.conversation()
        size = sum(len(str(one["content"])) for one in conversation)
        if size > LONG_TEXT:
            pieces = await asyncio.to_thread(self.processor.pieces, conversation)
        else:
            pieces = self.processor.pieces(conversation)
        num_tokens = sum(len(piece) for piece in pieces if isinstance(piece, list))
        if num_tokens > MAX_QUESTION_TOKENS:
            raise ApiError(
                400, f"the text of the conversation has {num_tokens} tokens; at most {MAX_QUESTION_TOKENS} are taken",
                code="context_length_exceeded",
            )  # fmt: skip
        memory, memory_id, pieces = await self._remembered(pieces)
        num_cached = 0 if memory is None else memory.num_tokens
        *before, question = pieces
        if before:
            try:
                memory, num_cached = await self._watched(memory_id, num_cached, before)
            except KeyError:  # deleted between two steps
                raise Stopped("a memory that the question needs was deleted") from None
        ids = question if isinstance(question, list) else []  # a question is never a medium
        if memory is None:
            return Prompt(self.model.model.language_model.new_cache(1), ids, 0)
        return Prompt(memory._cache, ids, num_cached)

    async def _remembered(
        self, pieces: list[list[int] | Entry]
    ) -> tuple[VideoMemory | None, str | None, list[list[int] | Entry]]:
        """The memory that a conversation begins with, its id, and the pieces after it."""
        parts = [piece[piece["type"]] for piece in pieces if isinstance(piece, dict)]
        if not any(isinstance(part, MemoryPart) for part in parts):
            return None, None, pieces
        (part, *others) = parts
        if not isinstance(part, MemoryPart) or any(isinstance(other, MemoryPart) for other in others):
            raise ApiError(400, "a memory stands before all other media, and there is one at most", param="messages")
        if pieces[0] != self.memories.head:
            raise ApiError(
                400, "a memory is the first part of the first user's message, and goes without a message of the system",
                param="messages",
            )  # fmt: skip
        if part.at_s is not None and others:
            raise ApiError(400, "at_s: other media cannot follow the snapshot of a memory", param="messages")
        try:
            memory = await self._ready(part.id, part.at_s, part.so_far)
            if not self.memories.is_standard(part.id):
                raise ApiError(400, f"the memory {part.id} belongs to a message of the system", param="messages")
        except KeyError:
            raise ApiError(404, f"there is no memory {part.id!r}", code="memory_not_found") from None
        return memory, part.id, pieces[2:]

    async def _ready(self, memory_id: str, at_s: float | None = None, so_far: bool = False) -> VideoMemory:
        """A memory, once it is watched to its end; or what was seen `so_far`."""
        if (job := self.memories.job(memory_id)) is not None:
            if so_far and job.seen is not None:
                return job.seen
            if so_far:
                raise ApiError(409, "nothing of the video has been seen yet", code="nothing_seen")
            await asyncio.shield(asyncio.wrap_future(job.future))
        if self.memories.is_loaded(memory_id):
            return self.memories.load(memory_id, at_s)
        return await asyncio.to_thread(self.memories.load, memory_id, at_s)

    async def _watched(
        self, parent: str | None, num_cached: int, pieces: list[list[int] | Entry]
    ) -> tuple[VideoMemory, int]:
        """The memory of pieces that end with a medium, after `parent`; and the tokens that were remembered already."""
        group: list[Piece] = []
        media: dict[int, Medium] = {}
        try:
            for piece in pieces:
                if isinstance(piece, list):
                    group.append(piece)
                    continue
                part = piece[piece["type"]]
                url = part.image_url.url if isinstance(part, ImagePart) else part.video_url.url
                medium = await self.bring(url)
                media[len(group)] = medium
                shown: Shown = {"type": piece["type"], "sha256": medium.sha256, "path": medium.source}
                group.append(shown)
                if isinstance(part, ImagePart):
                    continue
                shown["fps"] = self.processor.video_processor.fps if part.video_url.fps is None else part.video_url.fps
                shown["snapshots_s"] = []
                handed, media = media, {}
                parent = await asyncio.to_thread(self.memories.ensure, parent, group, handed, "chat")
                is_new, group = not self.memories.is_ready(parent), []
                one = await self._ready(parent)
                num_cached = num_cached if is_new else one.num_tokens
            if not group:
                return one, num_cached
            handed, media = media, {}
            future = self.memories.absorbed(parent, group, handed)
            return await asyncio.shield(asyncio.wrap_future(future)), num_cached
        finally:
            for medium in media.values():
                medium.discard()

    # --- the answers -------------------------------------------------------------------------------------------------

    def begin(self, request: ChatRequest, prompt: Prompt, deadline: float) -> list[Answer]:
        """Hand the question to the engine, as often as answers are wanted.

        Raises:
            TooManyWaiting: there is no place.
        """
        answers, every_s = [], 0.0 if request.stops else EVENTS_S if request.stream else math.inf
        for index in range(request.n):
            queue: asyncio.Queue = asyncio.Queue()
            sampling = Sampling(
                request.max_completion_tokens or request.max_tokens or self.max_new_tokens,
                self.temperature if request.temperature is None else request.temperature,
                self.top_p if request.top_p is None else request.top_p,
                None if request.seed is None else (request.seed + index) % 2**63,
                (request.top_logprobs or 0) if request.logprobs else None,
                request.ignore_eos,
            )
            row = Row(prompt.ids, prompt.cache, sampling, deadline, every_s, self.deliveries.listener(queue))
            answers.append(Answer(index, row, queue, Transcript(self.processor.tokenizer, request.stops)))
        self.engine.submit([answer.row for answer in answers])
        self.num_prompt_tokens += prompt.cache.num_tokens + len(prompt.ids)
        self.num_cached_tokens += prompt.num_cached
        return answers

    def usage(self, prompt: Prompt, answers: list[Answer]) -> dict[str, Any]:
        written = sum(answer.num_tokens for answer in answers)
        return usage_object(prompt.cache.num_tokens + len(prompt.ids), prompt.num_cached, written)

    async def completion(self, request: ChatRequest, prompt: Prompt, answers: list[Answer]) -> dict[str, Any]:
        """The whole answer as one object."""

        async def choice(answer: Answer) -> dict[str, Any]:
            said, tokens = [], []
            async for text, some in answer.parts():
                self._first(answer)
                said.append(text)
                tokens += some
            return {
                "index": answer.index, "message": {"role": "assistant", "content": "".join(said), "refusal": None},
                "logprobs": logprobs_object(self.processor.tokenizer, tokens) if request.logprobs else None,
                "finish_reason": answer.finish_reason,
            }  # fmt: skip

        choices = await asyncio.gather(*map(choice, answers)) if len(answers) > 1 else [await choice(answers[0])]
        return {**self._head("chat.completion"), "choices": choices, "usage": self.usage(prompt, answers)}

    async def events(self, request: ChatRequest, prompt: Prompt, answers: list[Answer]) -> AsyncIterator[str]:
        """The answer as server-sent events, as its tokens come."""
        head = self._head("chat.completion.chunk")
        with_usage = request.stream_options is not None and request.stream_options.include_usage
        if with_usage:
            head["usage"] = None

        def chunk(index: int, delta: dict[str, Any], reason: str | None = None, logprobs: Any = None) -> str:
            one = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": reason}
            return event({**head, "choices": [one]})

        come: asyncio.Queue = asyncio.Queue(maxsize=64)  # a slow client holds up its answer's text, nobody else's

        async def pass_on(answer: Answer) -> None:
            try:
                async for text, tokens in answer.parts():
                    self._first(answer)
                    logprobs = logprobs_object(self.processor.tokenizer, tokens) if request.logprobs else None
                    if text or (logprobs and tokens):
                        await come.put(chunk(answer.index, {"content": text}, logprobs=logprobs))
                await come.put(chunk(answer.index, {}, answer.finish_reason))
            except Exception as error:
                await come.put(error)
            await come.put(None)

        tasks = [asyncio.create_task(pass_on(answer)) for answer in answers]
        try:
            for answer in answers:
                yield chunk(answer.index, {"role": "assistant", "content": ""})
            going = len(tasks)
            while going:
                one = await come.get()
                if isinstance(one, Exception):
                    yield event(self.translate(one).body())
                    return
                going -= one is None
                if one is not None:
                    yield one
            if with_usage:
                yield event({**head, "choices": [], "usage": self.usage(prompt, answers)})
            yield event("[DONE]")
        finally:
            for task, answer in zip(tasks, answers, strict=True):
                answer.row.cancelled = True
                task.cancel()

    def _first(self, answer: Answer) -> None:
        if answer.started:
            self.first_token_s += time.monotonic() - answer.started
            self.num_first_tokens += 1
            answer.started = 0.0

    def _head(self, kind: str) -> dict[str, Any]:
        made = {"id": f"chatcmpl-{secrets.token_hex(12)}", "object": kind, "created": int(time.time())}
        return {**made, "model": self.name}
