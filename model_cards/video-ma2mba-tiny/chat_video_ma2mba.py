"""The chat schema of the paper (Table 5), as text and as pieces to be tokenised apart.

    <|system|>You are a helpful assistant.<|endoftext|><|user|>[frames]
    question<|endoftext|><|assistant|>answer<|endoftext|><|user|>next question<|endoftext|><|assistant|>...

`<|system|>`, `<|user|>` and `<|assistant|>` are ordinary text. A byte-level BPE may fuse their closing `|>` with the
character after it: GPT-NeoX does so before `(`, `"`, `=` and `>`. An answer "(A)" would then be trained on ids that
never occur in generation, where the prompt ends with `<|assistant|>`. So tags and bodies are tokenised apart: `render`
is the one place that knows where they meet, and `chat_template` states the same schema in Jinja for all who only want
the text.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

TAGS = {role: f"<|{role}|>" for role in ("system", "user", "assistant")}
MEDIA_SOURCES = {"video": ("video", "path", "url"), "image": ("image", "path", "url")}


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

    def render(self, conversation: Sequence[dict], add_generation_prompt: bool = False) -> list[Segment]:
        """Cuts a conversation into segments; their texts, joined, are the rendered conversation.

        Args:
            conversation: Messages {"role", "content"}. Roles are "system" (first message only), "user" and "assistant".
                Content is a string, or a list of {"type": "text", "text"}, {"type": "video", "video" | "path" | "url"}
                and {"type": "image", "image" | "path" | "url"}, kept in the order given. Media belong to user turns.
            add_generation_prompt: End with the tag after which the model answers.

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
            segments += self._body(message["content"], role)
            segments.append(Segment("end", self.end_token, supervised=role == "assistant"))
        if add_generation_prompt:
            _check_question(conversation[-1])
            segments.append(Segment("text", TAGS["assistant"]))
        return segments

    def _body(self, content: str | Sequence[dict], role: str) -> list[Segment]:
        segments: list[Segment] = []
        text = ""
        for entry in _entries(content):
            kind = entry.get("type")
            if kind == "text":
                piece = entry["text"]
                for token in (self.video_token, self.image_token):
                    if token in piece:
                        raise ValueError(
                            f"The text {_shorten(piece)} holds the placeholder {token}. Remove it, and give the medium "
                            'as an entry of its own: {"type": "video", "path": ...}.'
                        )
                if piece and not text and segments:
                    text = self.media_separator
                text += piece
            elif kind in MEDIA_SOURCES:
                if role != "user":
                    raise ValueError(f"A {kind} stands in a turn of the role '{role}'. Move it to a user turn.")
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

        return (
            "{%- if messages[0]['role'] != 'system' -%}"
            "{{- '<|system|>' + " + literal(self.system_prompt) + " + " + literal(self.end_token) + " -}}"
            "{%- endif -%}"
            "{%- for message in messages -%}"
            "{{- '<|' + message['role'] + '|>' -}}"
            "{%- if message['content'] is string -%}{{- message['content'] -}}"
            "{%- else -%}"
            "{%- set state = namespace(after_media=false) -%}"
            "{%- for entry in message['content'] -%}"
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
            "{{- " + literal(self.end_token) + " -}}"
            "{%- endfor -%}"
            "{%- if add_generation_prompt -%}{{- '<|assistant|>' -}}{%- endif -%}"
        )


def media_source(entry: dict) -> Any:
    """What a video or image entry points to: a path, a URL, or frames in memory."""
    keys = MEDIA_SOURCES[entry["type"]]
    given = [key for key in keys if entry.get(key) is not None]
    if len(given) != 1:
        raise ValueError(
            f"A {entry['type']} entry needs exactly one of the keys {', '.join(keys)}; got {given or 'none'}."
        )
    return entry[given[0]]


def _entries(content: str | Sequence[dict]) -> Sequence[dict]:
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


def _check_conversation(conversation: Sequence[dict]) -> None:
    if not conversation:
        raise ValueError("The conversation is empty. Give at least one message with a role and a content.")
    for position, message in enumerate(conversation):
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
