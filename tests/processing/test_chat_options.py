"""What `apply_chat_template` of Transformers takes beside the conversation."""

import base64
import dataclasses
import io

import numpy as np
import pytest
import torch
from PIL import Image

TALK = [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "The (A)"}]
HEAD = "<|system|>You are a helpful assistant.<|endoftext|><|user|>"


def test_the_last_message_is_left_open(processor):
    text = processor.apply_chat_template(TALK, continue_final_message=True)
    assert text == HEAD + "What?<|endoftext|><|assistant|>The (A)"
    ids = processor.apply_chat_template(TALK, continue_final_message=True, tokenize=True)["input_ids"]
    whole = processor.apply_chat_template(TALK, tokenize=True)["input_ids"]
    assert ids.tolist() == whole[:, :-1].tolist()
    assert processor.apply_chat_template(TALK, continue_final_message=False) == text + "<|endoftext|>"
    for name in ("add_generation_prompt", "return_assistant_tokens_mask"):
        with pytest.raises(ValueError, match=f"continue_final_message and {name}"):
            processor.apply_chat_template(TALK[:1], continue_final_message=True, tokenize=True, **{name: True})
    with pytest.raises(ValueError, match="'reasoning'"):
        processor.apply_chat_template(TALK, continue_final_message="reasoning")
    with pytest.raises(ValueError, match="no text at its end"):
        processor.apply_chat_template([*TALK[:1], {"role": "assistant", "content": ""}], continue_final_message=True)


def test_the_template_marks_what_the_model_should_write(processor):
    """The marks that the tokenizer of Transformers, and TRL with it, makes its mask of."""
    rows = [[*TALK, *TALK], TALK]
    told = processor.tokenizer.apply_chat_template(
        rows, chat_template=processor.chat_template, return_assistant_tokens_mask=True, return_dict=True
    )
    marked = [
        processor.tokenizer.decode([id for id, mark in zip(ids, masks, strict=True) if mark])
        for ids, masks in zip(told["input_ids"], told["assistant_masks"], strict=True)
    ]
    ours = processor.apply_chat_template(rows, tokenize=True, return_assistant_tokens_mask=True)
    learned = [
        processor.tokenizer.decode(ids[mask.bool()])
        for ids, mask in zip(ours["input_ids"], ours["assistant_masks"], strict=True)
    ]
    assert marked == learned == ["The (A)<|endoftext|>" * 2, "The (A)<|endoftext|>"]


def test_variables_reach_the_template_and_nothing_else_is_swallowed(processor):
    template = "{{ greeting }}{% for message in messages %} {{ message.role }}{% endfor %}"
    said = processor.apply_chat_template(TALK, chat_template=template, greeting="Hello")
    assert said == "Hello user assistant"
    strange = [{"role": "tool", "content": "42"}]
    assert processor.apply_chat_template(strange, chat_template=template, greeting="") == " tool"
    processor.chat_template = {"default": processor.chat_template, "short": template}
    assert processor.apply_chat_template(TALK, chat_template="short", greeting="Hi") == "Hi user assistant"
    assert processor.apply_chat_template(TALK).startswith(HEAD)
    processor.chat_template = {"short": template}
    with pytest.raises(ValueError, match="chat_template: short"):
        processor.apply_chat_template(TALK)


@pytest.mark.parametrize("tokenize", [True, False])
def test_what_means_nothing_is_named(processor, tokenize):
    with pytest.raises(TypeError, match="no option 'greeting'"):
        processor.apply_chat_template(TALK, tokenize=tokenize, greeting="Hello")
    for name in ("tools", "documents"):
        processor.apply_chat_template(TALK, tokenize=tokenize, **{name: None})
        processor.apply_chat_template(TALK, tokenize=tokenize, **{name: []})
        with pytest.raises(ValueError, match=f"{name} is given"):
            processor.apply_chat_template(TALK, tokenize=tokenize, **{name: [{"title": "t", "text": "x"}]})
    with pytest.raises(ValueError, match="load_audio_from_video"):
        processor.apply_chat_template(TALK, tokenize=tokenize, load_audio_from_video=True)
    call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": {}}}]}
    with pytest.raises(ValueError, match="tool_calls"):
        processor.apply_chat_template([*TALK[:1], call], tokenize=tokenize)


def test_what_is_about_ids_needs_ids(processor):
    for name in ("return_assistant_tokens_mask", "sanitize_control_tokens"):
        with pytest.raises(ValueError, match="tokenize=True"):
            processor.apply_chat_template(TALK, **{name: True})


def test_placeholders_in_a_text_are_text_where_asked(processor):
    chat = [{"role": "user", "content": "What is <video>?"}]
    ids = processor.apply_chat_template(chat, tokenize=True, sanitize_control_tokens=True)["input_ids"][0]
    assert processor.video_token_id not in ids
    assert processor.tokenizer.decode(ids) == HEAD + "What is <video>?<|endoftext|>"


@dataclasses.dataclass
class Message:
    role: str
    content: list | str
    tool_calls: list | None = None


class Chat:
    def __init__(self, messages):
        self.messages = messages


def test_messages_may_be_objects(processor):
    wanted = processor.apply_chat_template(TALK)
    messages = [Message(**message) for message in TALK]
    assert processor.apply_chat_template(messages) == wanted
    assert processor.apply_chat_template([messages, TALK]) == [wanted] * 2
    assert processor.apply_chat_template([Chat(messages), Chat(TALK)]) == [wanted] * 2


# ---- the forms of a medium ----

PICTURE = np.random.default_rng(0).integers(0, 256, (28, 28, 3), dtype=np.uint8)


def png():
    buffer = io.BytesIO()
    Image.fromarray(PICTURE).save(buffer, "png")
    return buffer.getvalue()


@pytest.mark.parametrize("form", [
    "image_url", "flat image_url", "detail", "base64", "data base64", "bytes", "path and bytes", "only a path", "open",
    "PIL", "floats",
])  # fmt: skip
def test_the_forms_of_an_image(processor, tmp_path, form):
    path = tmp_path / "a.png"
    path.write_bytes(png())
    coded = base64.b64encode(png()).decode()
    entry, options = {
        "image_url": ({"type": "image_url", "image_url": {"url": str(path)}}, {}),
        "flat image_url": ({"type": "image_url", "image_url": str(path)}, {}),
        "detail": ({"type": "image_url", "image_url": {"url": str(path), "detail": "auto"}}, {}),
        "base64": ({"type": "image", "base64": coded}, {}),
        "data base64": ({"type": "image", "base64": f"data:image/png;base64,{coded}"}, {}),
        "bytes": ({"type": "image", "image": png()}, {}),
        "path and bytes": ({"type": "image", "image": {"path": "gone.png", "bytes": png()}}, {}),
        "only a path": ({"type": "image", "image": {"path": str(path), "bytes": None}}, {}),
        "open": ({"type": "image", "image": io.BytesIO(png())}, {}),
        "PIL": ({"type": "image", "image": Image.fromarray(PICTURE)}, {}),
        "floats": ({"type": "image", "image": PICTURE / 255}, {"do_rescale": False}),
    }[form]
    chat = [{"role": "user", "content": [entry, {"type": "text", "text": "Q?"}]}]
    assert processor.apply_chat_template(chat) == HEAD + "<image>\nQ?<|endoftext|>"
    pixels = processor.apply_chat_template(chat, tokenize=True, **options)["pixel_values"][0, 0]
    wanted = torch.from_numpy(PICTURE).permute(2, 0, 1)
    if form == "floats":
        video = processor.video_processor
        mean, std = (torch.tensor(v, dtype=torch.float64)[:, None, None] for v in (video.image_mean, video.image_std))
        torch.testing.assert_close(pixels.double(), (wanted / 255.0 - mean) / std, rtol=0, atol=1e-5)
    else:
        assert pixels.dtype == torch.uint8
        assert torch.equal(pixels, wanted)


@pytest.mark.parametrize("form", ["video_url", "flat video_url", "base64", "bytes", "path and bytes", "open"])
def test_the_forms_of_a_video(processor, video, form):
    data = video.read_bytes()
    entry = {
        "video_url": {"type": "video_url", "video_url": {"url": str(video), "fps": 2.0}, "end_s": 1.0},
        "flat video_url": {"type": "video_url", "video_url": str(video), "fps": 2.0, "end_s": 1.0},
        "base64": {"type": "video", "base64": base64.b64encode(data).decode(), "fps": 2.0, "end_s": 1.0},
        "bytes": {"type": "video", "video": data, "fps": 2.0, "end_s": 1.0},
        "path and bytes": {"type": "video", "video": {"path": None, "bytes": data}, "fps": 2.0, "end_s": 1.0},
        "open": {"type": "video", "video": io.BytesIO(data), "fps": 2.0, "end_s": 1.0},
    }[form]
    chat = [{"role": "user", "content": [entry]}]
    batch = processor.apply_chat_template(chat, tokenize=True, return_timestamps=True)
    assert batch["video_timestamps"] == [[[0.0, 0.5]]]
    wanted = processor.video_processor.load(video, fps=2.0, end_s=1.0).frames
    assert torch.equal(batch["pixel_values_videos"][0], wanted)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"type": "image", "base64": "&&&"}, "base64 of the image entry cannot be decoded"),
        ({"type": "image", "base64": "aaaa", "path": "a.png"}, "base64 and another source"),
        ({"type": "image", "image": {"file": "a.png"}}, 'needs "path" or "bytes"'),
        ({"type": "image", "image": b""}, "not one byte in it"),
        ({"type": "image_url", "image_url": {"url": "a.png", "detail": "low"}}, "'detail' of the image entry"),
        ({"type": "image", "path": "a.png", "max_pixels": 99}, "'max_pixels' of the image entry"),
        ({"type": "image", "image": np.zeros((28, 28, 3))}, "uint8|do_rescale=False"),
        ({"type": "video", "path": "a.mp4", "min_frames": 4}, "'min_frames' of the video entry"),
        ({"type": "video", "path": "a.mp4", "resized_height": 28}, "'resized_height' of the video entry"),
        ({"type": "video", "path": "a.mp4", "total_pixels": 28}, "'total_pixels' of the video entry"),
        ({"type": "video", "path": "a.mp4", "speed": 2}, "'speed' of the video entry.*Known are video, path, url"),
        ({"type": "video", "path": "a.mp4", "start": 1, "start_s": 1}, "says start_s twice"),
    ],
)
def test_entries_that_cannot_be_honoured(processor, entry, message):
    with pytest.raises(ValueError, match=message):
        processor.apply_chat_template([{"role": "user", "content": [entry]}], tokenize=True)
