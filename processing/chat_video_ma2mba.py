"""The chat schema of the paper (Table 5), as text and as pieces to be tokenised apart.

    <|system|>You are a helpful assistant.<|endoftext|><|user|>[frames]
    question<|endoftext|><|assistant|>answer<|endoftext|><|user|>next question<|endoftext|><|assistant|>...

`<|system|>`, `<|user|>` and `<|assistant|>` are ordinary text. A byte-level BPE may fuse their closing `|>` with the
character after it: GPT-NeoX does so before `(`, `"`, `=` and `>`. An answer "(A)" would then be trained on ids that
never occur in generation, where the prompt ends with `<|assistant|>`. So tags and bodies are tokenised apart: `render`
is the one place that knows where they meet, and `chat_template` states the same schema in Jinja for all who only want
the text.
"""

import base64
import binascii
import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

TAGS = {role: f"<|{role}|>" for role in ("system", "user", "assistant")}
MEDIA_SOURCES = {"video": ("video", "path", "url"), "image": ("image", "path", "url")}

# How an entry may say which frames it wants: in our words, in Qwen's, and in Transformers'.
_ENTRY_OPTIONS = {
    "fps": "fps",
    "max_frames": "max_frames",
    "num_frames": "num_frames",
    "nframes": "num_frames",
    "do_sample_frames": "do_sample_frames",
    "start_s": "start_s",
    "video_start": "start_s",
    "start": "start_s",
    "end_s": "end_s",
    "video_end": "end_s",
    "end": "end_s",
    "strict": "strict",
    "timestamps": "timestamps",
    "video_metadata": "video_metadata",
}
_SQUARE = "Every frame becomes a square of the video processor's size."
_NOT_HONOURED = {
    "min_frames": "Give fps, or num_frames.",
    "sample_fps": "Give timestamps for frames in memory, and fps for a file.",
    "raw_fps": "Give timestamps for frames in memory, and fps for a file.",
    "resized_height": _SQUARE,
    "resized_width": _SQUARE,
    "total_pixels": _SQUARE,
    "max_pixels": _SQUARE,
    "min_pixels": _SQUARE,
}
_SAYS_NOTHING = {"type", "duration_s", "cache_control"}  # what manifests and servers write beside a medium


@dataclass(frozen=True)
class Segment:
    """A piece of a conversation that is tokenised on its own.

    Attributes:
        kind: "text"; "end" for the end-of-turn token; "video" or "image" for a placeholder, to be expanded.
        text: How the piece reads in the rendered text.
        supervised: Whether the model should learn to write it: answers and the end of their turns.
        entry: The content entry behind a "video" or "image".
    """

    kind: Literal["text", "end", "video", "image"]
    text: str
    supervised: bool = False
    entry: dict[str, Any] | None = None


@dataclass(frozen=True)
class ChatSchema:
    """The words of the schema that a checkpoint may choose.

    Attributes:
        end_token: Closes every turn.
        video_token, image_token: Stand for a video or an image in rendered text.
        system_prompt: The first turn, unless the conversation brings a system message.
        media_separator: Stands between frames and the text that follows them.
    """

    end_token: str
    video_token: str
    image_token: str
    system_prompt: str
    media_separator: str

    def render(
        self,
        conversation: Sequence[dict],
        add_generation_prompt: bool = False,
        continue_final_message: bool = False,
        placeholders_are_text: bool = False,
    ) -> list[Segment]:
        """Cuts a conversation into segments; their texts, joined, are the rendered conversation.

        Args:
            conversation: Messages {"role", "content"}. Roles are "system" (first message only), "user" and "assistant".
                Content is a string, or a list of {"type": "text", "text"}, {"type": "video", "video" | "path" | "url"}
                and {"type": "image", "image" | "path" | "url"}, kept in the order given. Media belong to user turns.
            add_generation_prompt: End with the tag after which the model answers.
            continue_final_message: Leave the last turn open, for the model to go on with.
            placeholders_are_text: Take a placeholder within a text as text, in place of an error.

        Raises:
            ValueError: Not such a conversation; or nothing is asked where an answer is wanted.
        """
        _check_conversation(conversation)
        segments: list[Segment] = []
        if conversation[0]["role"] != "system":
            conversation = [{"role": "system", "content": self.system_prompt}, *conversation]
        for message in conversation:
            role = message["role"]
            segments.append(Segment("text", TAGS[role]))
            segments += self._body(message["content"], role, placeholders_are_text)
            segments.append(Segment("end", self.end_token, supervised=role == "assistant"))
        if add_generation_prompt:
            _check_question(conversation[-1])
            segments.append(Segment("text", TAGS["assistant"]))
        elif continue_final_message:
            segments.pop()
            if segments[-1].kind != "text" or segments[-1].text == TAGS[role]:
                raise ValueError("The last message has no text at its end to be continued. Give it one.")
        return segments

    def _body(self, content: str | Sequence[dict], role: str, placeholders_are_text: bool) -> list[Segment]:
        segments: list[Segment] = []
        text = ""
        for entry in _entries(content):
            kind = entry.get("type")
            if kind == "text":
                piece = entry["text"]
                for token in (self.video_token, self.image_token):
                    if token in piece and not placeholders_are_text:
                        raise ValueError(
                            f"The text {_shorten(piece)} holds the placeholder {token}. Remove it, and give the medium "
                            'as an entry of its own: {"type": "video", "path": ...}.'
                        )
                if piece and not text and segments:
                    text = self.media_separator
                text += piece
            elif kind in MEDIA_SOURCES:
                if role != "user":
                    raise ValueError(f"The {kind} in a turn of the role '{role}' is misplaced. Move it to a user turn.")
                if text:
                    segments.append(Segment("text", text))
                    text = ""
                token = self.video_token if kind == "video" else self.image_token
                segments.append(Segment(kind, token, entry=entry))
            else:
                raise ValueError(f"Unknown content type {kind!r}. Use 'text', 'video' or 'image'.")
        if text:
            segments.append(Segment("text", text, supervised=role == "assistant"))
        return segments

    def chat_template(self) -> str:
        """The same schema as a Jinja template, without the checks."""

        def literal(text: str) -> str:
            return json.dumps(text, ensure_ascii=False)

        end = "{{- " + literal(self.end_token) + " -}}"
        return (
            "{%- macro body(content) -%}"
            "{%- if content is string -%}{{- content -}}"
            "{%- else -%}"
            "{%- set state = namespace(after_media=false) -%}"
            "{%- for entry in content -%}"
            "{%- if entry['type'] == 'video' -%}"
            "{{- " + literal(self.video_token) + " -}}{%- set state.after_media = true -%}"
            "{%- elif entry['type'] == 'image' -%}"
            "{{- " + literal(self.image_token) + " -}}{%- set state.after_media = true -%}"
            "{%- elif entry['text'] -%}"
            "{%- if state.after_media -%}{{- " + literal(self.media_separator) + " -}}{%- endif -%}"
            "{{- entry['text'] -}}{%- set state.after_media = false -%}"
            "{%- endif -%}"
            "{%- endfor -%}"
            "{%- endif -%}"
            "{%- endmacro -%}"
            "{%- if messages[0]['role'] != 'system' -%}"
            "{{- '<|system|>' + " + literal(self.system_prompt) + " + " + literal(self.end_token) + " -}}"
            "{%- endif -%}"
            "{%- for message in messages -%}"
            "{{- '<|' + message['role'] + '|>' -}}"
            # what the model should learn to write, for those who mask by the template: TRL's assistant_only_loss
            "{%- if message['role'] == 'assistant' -%}"
            "{% generation %}{{- body(message['content']) -}}" + end + "{% endgeneration %}"
            "{%- else -%}"
            "{{- body(message['content']) -}}" + end + "{%- endif -%}"
            "{%- endfor -%}"
            "{%- if add_generation_prompt -%}{{- '<|assistant|>' -}}{%- endif -%}"
        )


def plain_messages(conversation: Any) -> list[Any]:
    """A conversation as dicts of our schema: objects become dicts, OpenAI's entries become entries of ours.

    `{"type": "image_url", "image_url": {"url": ...}}`, the same flat, `video_url` likewise, and media in base64, which
    become bytes. Keys whose value is None say nothing and go, as in Transformers, but for a content.
    """
    messages = getattr(conversation, "messages", conversation)
    plain = []
    for message in messages:
        message = _as_dict(message)
        if isinstance(message, dict):
            message = {key: value for key, value in message.items() if value is not None or key == "content"}
            if isinstance(message.get("content"), list | tuple):
                message["content"] = [_plain_entry(entry) for entry in message["content"]]
        plain.append(message)
    return plain


def _as_dict(value: Any) -> Any:
    if isinstance(value, Mapping):
        return dict(value)
    if hasattr(value, "model_dump"):  # pydantic
        return value.model_dump()
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    return value


def _plain_entry(entry: Any) -> Any:
    entry = _as_dict(entry)
    if not isinstance(entry, dict):
        return entry
    entry = {key: value for key, value in entry.items() if value is not None}
    kind = entry.get("type")
    if kind in ("image_url", "video_url"):
        nested = entry.pop(kind, {})
        entry |= {"type": kind.removesuffix("_url"), **(nested if isinstance(nested, dict) else {"url": nested})}
        if entry.get("detail") == "auto":
            del entry["detail"]
    kind = entry.get("type")
    if kind in MEDIA_SOURCES and "base64" in entry:
        if any(key in entry for key in MEDIA_SOURCES[kind]):
            raise ValueError(f"The {kind} entry has base64 and another source too. Give one of them.")
        text = entry.pop("base64")
        try:  # also with "data:image/png;base64," in front
            entry[kind] = base64.b64decode(text.partition("base64,")[2] or text, validate=True)
        except (binascii.Error, ValueError, AttributeError) as error:
            raise ValueError(f"The base64 of the {kind} entry cannot be decoded: {error}.") from error
    return entry


def media_options(entry: dict) -> dict[str, Any]:
    """Which frames an entry wants for itself, in the words of `VideoMa2mbaVideosKwargs`.

    Raises:
        ValueError: A key that is not known or has no meaning here, or two that say the same.
    """
    kind = entry["type"]
    options: dict[str, Any] = {}
    for key, value in entry.items():
        if value is None or key in MEDIA_SOURCES[kind] or key in _SAYS_NOTHING:
            continue
        name = _ENTRY_OPTIONS.get(key) if kind == "video" else None
        if name is None:
            remedy = _NOT_HONOURED.get(key, f"Leave it out. Known are {', '.join(_known_keys(kind))}.")
            raise ValueError(f"The key {key!r} of the {kind} entry cannot be honoured. {remedy}")
        if name in options:
            raise ValueError(f"The {kind} entry says {name} twice, the second time by the key {key!r}. Leave one out.")
        options[name] = value
    return options


def _known_keys(kind: str) -> list[str]:
    return [*MEDIA_SOURCES[kind], "base64", *(_ENTRY_OPTIONS if kind == "video" else ())]


def media_source(entry: dict) -> Any:
    """What a video or image entry points to: a path, a URL, or frames in memory."""
    keys = MEDIA_SOURCES[entry["type"]]
    given = [key for key in keys if entry.get(key) is not None]
    if len(given) != 1:
        raise ValueError(
            f"The {entry['type']} entry needs exactly one of the keys {', '.join(keys)}; got {given or 'none'}."
        )
    return entry[given[0]]


def _entries(content: str | Sequence[dict]) -> Sequence[dict]:
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


def _check_conversation(conversation: Sequence[dict]) -> None:
    if not conversation:
        raise ValueError("The conversation is empty. Give at least one message with a role and a content.")
    for position, message in enumerate(conversation):
        for key in ("tool_calls", "tool_call_id", "reasoning_content"):
            if isinstance(message, dict) and message.get(key):
                raise ValueError(f"Message {position} has {key}, of which this model knows nothing. Leave them out.")
        if not isinstance(message, dict) or not {"role", "content"} <= message.keys():
            raise ValueError(f"Message {position} must be a dict with 'role' and 'content', got {_shorten(message)}.")
        role, content = message["role"], message["content"]
        if role not in TAGS:
            raise ValueError(f"Message {position} has the unknown role {role!r}. Use 'system', 'user' or 'assistant'.")
        if role == "system" and position > 0:
            raise ValueError(f"Message {position} has the role 'system'; only the first message may.")
        if not isinstance(content, str) and not (
            isinstance(content, list | tuple) and all(isinstance(entry, dict) for entry in content)
        ):
            raise ValueError(
                f"The content of message {position} must be a string or a list of dicts with a 'type', got "
                f"{_shorten(content)}."
            )
        for entry in _entries(content):
            if entry.get("type") == "text" and not isinstance(entry.get("text"), str):
                raise ValueError(f"A text entry of message {position} needs a string under 'text'.")
            if entry.get("type") in MEDIA_SOURCES:
                media_options(entry)


def _check_question(message: dict) -> None:
    if message["role"] != "user":
        raise ValueError(
            f"An answer is wanted, but the last turn is the {message['role']}'s. End with a user turn, or leave out "
            "add_generation_prompt."
        )
    if not any(entry["text"].strip() for entry in _entries(message["content"]) if entry["type"] == "text"):
        raise ValueError("The question is empty. Give the last user turn a text.")


def _shorten(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
