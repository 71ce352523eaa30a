"""What clients send: OpenAI's chat completions, with parts of the type "memory" beside theirs. What cannot be honoured
is refused by its name."""

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, field_validator, model_validator

MAX_MEDIA = 256  # of a request
MAX_TEXT = 2**19  # characters of a conversation: more than the tokens that are read could say
MAX_ANSWERS = 16
MAX_NEW_TOKENS = 8192
MAX_FPS = 60.0


def _of_whole_characters(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError("it holds half of a character, a surrogate") from None
    return text


Text = Annotated[str, AfterValidator(_of_whole_characters)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid")


class TextPart(_Strict):
    type: Literal["text"]
    text: Text


class ImageUrl(_Strict):
    url: Text
    detail: Literal["auto", "low", "high"] = "auto"  # a frame has one size


class ImagePart(_Strict):
    type: Literal["image_url"]
    image_url: ImageUrl


class VideoUrl(_Strict):
    url: Text
    fps: float | None = Field(None, gt=0, le=MAX_FPS, allow_inf_nan=False)


class VideoPart(_Strict):
    type: Literal["video_url"]
    video_url: VideoUrl


class MemoryPart(_Strict):
    type: Literal["memory"]
    id: Text
    at_s: float | None = Field(None, ge=0, allow_inf_nan=False)
    so_far: bool = False  # of a video that is still being watched: ask about what was seen, and do not wait

    @model_validator(mode="after")
    def _one_time(self) -> "MemoryPart":
        if self.so_far and self.at_s is not None:
            raise ValueError("so_far: goes without at_s")
        return self


Part = Annotated[TextPart | ImagePart | VideoPart | MemoryPart, Field(discriminator="type")]


class Message(_Strict):
    role: Literal["system", "developer", "user", "assistant"]
    content: Text | list[Part]
    name: None = None

    @field_validator("role")
    @classmethod
    def _role(cls, role: str) -> str:
        return "system" if role == "developer" else role


class StreamOptions(_Strict):
    include_usage: bool = False
    include_obfuscation: bool | None = None


class VideoSampling(_Strict):
    num_frames: Literal[-1] | None = None  # all of them


class MediaSampling(_Strict):
    """What vLLM's clients may say of media, lmms-eval among them."""

    video: VideoSampling | None = None


class ChatRequest(_Strict):
    """`POST /v1/chat/completions`. Those of OpenAI's fields that change nothing are taken, the others are refused."""

    model: str | None = None
    messages: list[Message] = Field(min_length=1, max_length=1000)
    stream: bool = False
    stream_options: StreamOptions | None = None
    stop: Text | list[Text] | None = None
    n: int = Field(1, ge=1, le=MAX_ANSWERS)
    temperature: float | None = Field(None, ge=0, le=2, allow_inf_nan=False)
    top_p: float | None = Field(None, gt=0, le=1, allow_inf_nan=False)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    max_completion_tokens: int | None = Field(None, ge=1, le=MAX_NEW_TOKENS)
    max_tokens: int | None = Field(None, ge=1, le=MAX_NEW_TOKENS)
    logprobs: bool | None = False
    top_logprobs: int | None = Field(None, ge=0, le=20)
    ignore_eos: bool = False  # as vLLM has it: the answer is as long as it may be
    # what says nothing about the answer
    user: str | None = None
    metadata: dict[str, Any] | None = None
    store: Literal[False] | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    service_tier: Literal["auto", "default"] | None = None
    # taken at the value that changes nothing
    frequency_penalty: Literal[0] | None = None
    presence_penalty: Literal[0] | None = None
    logit_bias: dict[str, Any] | None = Field(None, max_length=0)
    tools: list[Any] | None = Field(None, max_length=0)
    tool_choice: Literal["none", "auto"] | None = None
    response_format: dict[str, Any] | None = None
    media_io_kwargs: MediaSampling | None = None
    modalities: list[Literal["text"]] | None = None

    @field_validator("frequency_penalty", "presence_penalty", mode="before")
    @classmethod
    def _neutral(cls, value: Any) -> Any:
        return 0 if isinstance(value, float) and value == 0 else value

    @model_validator(mode="after")
    def _together(self) -> "ChatRequest":
        stops = self.stops
        if len(stops) > 4 or not all(stops):
            raise ValueError("stop: up to 4 strings, none of them empty")
        if self.response_format not in (None, {"type": "text"}):
            raise ValueError('response_format: this server writes text alone, {"type": "text"}')
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs: needs logprobs to be true")
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options: needs stream to be true")
        if None not in (self.max_tokens, self.max_completion_tokens) and self.max_tokens != self.max_completion_tokens:
            raise ValueError("max_tokens: is the older name of max_completion_tokens; leave it out")
        parts = [part for message in self.messages if not isinstance(message.content, str) for part in message.content]
        if sum(not isinstance(part, TextPart) for part in parts) > MAX_MEDIA:
            raise ValueError(f"messages: at most {MAX_MEDIA} videos, images and memories")
        texts = [message.content for message in self.messages if isinstance(message.content, str)]
        texts += [part.text for part in parts if isinstance(part, TextPart)]
        if sum(map(len, texts)) > MAX_TEXT:
            raise ValueError(f"messages: at most {MAX_TEXT} characters of text")
        return self

    @property
    def stops(self) -> list[str]:
        return [self.stop] if isinstance(self.stop, str) else self.stop or []

    def conversation(self) -> list[dict[str, Any]]:
        """The messages as the chat schema has them: memories are videos; a medium is its part of the request."""

        def entry(part: Part) -> dict[str, Any]:
            if isinstance(part, TextPart):
                return {"type": "text", "text": part.text}
            kind = "image" if isinstance(part, ImagePart) else "video"
            return {"type": kind, kind: part}

        return [
            {"role": one.role, "content": one.content if isinstance(one.content, str) else [*map(entry, one.content)]}
            for one in self.messages
        ]


class MemoryRequest(_Strict):
    """`POST /v1/memories` as JSON: a file under an allowed folder, a URL where allowed, or a live source."""

    url: Text | None = None
    path: Text | None = None
    live: bool = False
    name: Text | None = Field(None, max_length=200)
    fps: float | None = Field(None, gt=0, le=MAX_FPS, allow_inf_nan=False)
    snapshots_s: list[Annotated[float, Field(ge=0, allow_inf_nan=False)]] = Field([], max_length=1000)
    start_s: float = Field(0.0, ge=0, allow_inf_nan=False)
    end_s: float | None = Field(None, gt=0, allow_inf_nan=False)
    stills: bool = False  # keep pictures of its time line, to be shown

    @model_validator(mode="after")
    def _one_source(self) -> "MemoryRequest":
        if [self.url is not None, self.path is not None, self.live].count(True) != 1:
            raise ValueError("give one of url, path and live, or send the file as multipart/form-data under `file`")
        if self.live and self.model_fields_set & {"fps", "snapshots_s", "start_s", "end_s", "stills"}:
            raise ValueError("live: goes with a name alone; frames bring their own times")
        if self.end_s is not None and self.end_s <= self.start_s:
            raise ValueError("end_s: must lie after start_s")
        return self


class FramesRequest(_Strict):
    """`POST /v1/memories/{id}/frames`: pictures as data URLs, and their times in seconds."""

    frames: list[Text] = Field(min_length=1, max_length=256)
    timestamps_s: list[Annotated[float, Field(ge=0, allow_inf_nan=False)]] | None = None
