"""Ids, labels and pixels against lists written by hand."""

import numpy as np
import pytest
import torch
from tokenizers.pre_tokenizers import ByteLevel

from video_ma2mba.processing import VideoMa2mbaProcessor, VideoMa2mbaVideoProcessor, VideoReadError

from .conftest import MERGES, make_tokenizer

EOS, PAD = 0, 1
SYSTEM = "You are a helpful assistant."


def _ids(text, fused=()):
    """The ids of a text with no other merges than those in `fused`, by the layout of `make_tokenizer`."""
    alphabet = sorted(ByteLevel.alphabet())
    ((pieces, _),) = ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str(text)
    tokens, position = [], 0
    merged = {left + right: 2 + 256 + number for number, (left, right) in enumerate(MERGES)}
    while position < len(pieces):
        token = next((each for each in fused if pieces.startswith(each, position)), pieces[position])
        tokens.append(merged[token] if token in merged else 2 + alphabet.index(token))
        position += len(token)
    return tokens


def _tag(role):
    return _ids(f"<|{role}|>", fused=["|>"])


def _user(text="What?", video=None, **entry):
    media = [] if video is None else [{"type": "video", "video": video, **entry}]
    return {"role": "user", "content": [*media, {"type": "text", "text": text}]}


def _assistant(text):
    return {"role": "assistant", "content": text}


def _frames(num_frames, value=9):
    return np.full((num_frames, 28, 28, 3), value, np.uint8)


def _encode(processor, conversation, **options):
    return processor.apply_chat_template(conversation, tokenize=True, **options)


def test_the_schema_of_the_paper(processor, video):
    conversation = [_user("What?", str(video)), _assistant("Yes."), _user("Why?")]
    text = processor.apply_chat_template(conversation, add_generation_prompt=True)
    assert text == (
        "<|system|>You are a helpful assistant.<|endoftext|><|user|><video>\nWhat?<|endoftext|><|assistant|>Yes."
        "<|endoftext|><|user|>Why?<|endoftext|><|assistant|>"
    )
    batch = _encode(processor, conversation, add_generation_prompt=True)
    frames = [processor.video_token_id] * 4
    assert batch["input_ids"].tolist() == [
        [
            *_tag("system"), *_ids(SYSTEM), EOS,
            *_tag("user"), *frames, *_ids("\nWhat?"), EOS,
            *_tag("assistant"), *_ids("Yes."), EOS,
            *_tag("user"), *_ids("Why?"), EOS,
            *_tag("assistant"),
        ]
    ]  # fmt: skip
    assert batch["attention_mask"].tolist() == [[1] * batch["input_ids"].shape[1]]
    assert batch["pixel_values_videos"].shape == (1, 4, 3, 28, 28)
    assert "pixel_values" not in batch


def test_tags_and_bodies_never_fuse(processor):
    """The trap: tokenised in one go, the last token of `<|assistant|>` swallows the bracket."""
    whole = processor.tokenizer("<|assistant|>(A)")["input_ids"]
    assert whole == _ids("<|assistant|>(A)", fused=["|>("])
    assert whole[: len(_tag("assistant"))] != _tag("assistant")
    for question, answer in [
        ("(A) or (B)?", "(A)"),
        ('"Hi" or not?', '"Hi"'),
        ("> or <?", ">"),
        ("\n\nSo?", "\n\nSo."),
    ]:
        conversation = [_user(question), _assistant(answer)]
        trained = _encode(processor, conversation)["input_ids"][0].tolist()
        prompt = _encode(processor, conversation[:1], add_generation_prompt=True)["input_ids"][0].tolist()
        alone = processor.tokenizer(answer)["input_ids"]
        assert trained == [*prompt, *alone, EOS]
        assert prompt[-len(_tag("assistant")) :] == _tag("assistant")


def test_the_text_leads_to_the_same_ids(processor, video):
    conversations = [
        [_user("(A) or (B)?", str(video)), _assistant('"(A)"'), _user("=> ?")],
        [{"role": "system", "content": "(Be brief.)"}, _user("|>( ?", _frames(3))],
    ]
    wanted = _encode(processor, conversations)
    texts = processor.apply_chat_template(conversations)
    batch = processor(text=texts, videos=[str(video), _frames(3)])
    assert batch.keys() == wanted.keys()
    for name in wanted:
        torch.testing.assert_close(batch[name], wanted[name], rtol=0, atol=0)


def test_pieces_are_the_ids_between_the_media(processor):
    content = [
        {"type": "image", "image": "not looked at"},
        {"type": "video", "video": None},
        {"type": "text", "text": "Then"},
        {"type": "video", "path": "elsewhere.mp4"},
        {"type": "text", "text": "which?"},
    ]
    head = [*_tag("system"), *_ids(SYSTEM), EOS, *_tag("user")]
    tail = [EOS, *_tag("assistant")]
    assert processor.pieces([{"role": "user", "content": content}, _assistant("This."), _user("Why?")]) == [
        head, content[0], content[1], _ids("\nThen"), content[3],
        [*_ids("\nwhich?"), *tail, *_ids("This."), EOS, *_tag("user"), *_ids("Why?"), *tail],
    ]  # fmt: skip
    with pytest.raises(ValueError, match="question is empty"):
        processor.pieces([{"role": "user", "content": content[:2]}])


def test_labels_cover_answers_and_the_ends_of_their_turns(processor):
    conversation = [_user("Q?", _frames(2)), _assistant("(A)"), _user("R?"), _assistant("No.")]
    batch = _encode(processor, conversation, return_labels=True)
    labels, ids = batch["labels"][0].tolist(), batch["input_ids"][0].tolist()
    answers = [*processor.tokenizer("(A)")["input_ids"], EOS, *_ids("No."), EOS]
    assert [label for label in labels if label != -100] == answers
    first = len(_tag("system")) + len(SYSTEM) + 1 + len(_tag("user")) + 2 + len("\nQ?") + 1 + len(_tag("assistant"))
    assert labels[:first] == [-100] * first
    assert labels[first] == ids[first] == _ids("(")[0]
    assert all(label in (-100, token) for label, token in zip(labels, ids, strict=True))


def test_padding_left_and_right(processor):
    rows = [[_user("Long question?"), _assistant("Yes.")], [_user("Q?"), _assistant("A")]]
    singles = [_encode(processor, row, return_labels=True) for row in rows]
    length = singles[0]["input_ids"].shape[1]
    short = singles[1]["input_ids"].shape[1]
    assert short < length
    fill = {"input_ids": PAD, "attention_mask": 0, "labels": -100}
    for side, real in (("left", slice(length - short, length)), ("right", slice(0, short))):
        batch = _encode(processor, rows, return_labels=True, padding_side=side)
        for name, value in fill.items():
            assert batch[name].shape == (2, length)
            assert batch[name].dtype == torch.int64
            assert batch[name][0].tolist() == singles[0][name][0].tolist()
            assert batch[name][1, real].tolist() == singles[1][name][0].tolist()
            padding = torch.ones(length, dtype=torch.bool)
            padding[real] = False
            assert set(batch[name][1, padding].tolist()) == {value}
    default = _encode(processor, rows)
    assert default["input_ids"][1, 0] == PAD
    lists = _encode(processor, rows, padding=False, return_tensors=None)
    assert [len(row) for row in lists["input_ids"]] == [length, short]
    assert isinstance(_encode(processor, rows, return_tensors="np")["input_ids"], np.ndarray)


def test_videos_and_images_of_a_row_come_in_order(processor):
    picture = np.full((28, 28, 3), 200, np.uint8)
    content = [
        {"type": "video", "video": _frames(2, 1)},
        {"type": "text", "text": "Then"},
        {"type": "image", "image": picture},
        {"type": "video", "video": _frames(1, 2)},
        {"type": "text", "text": "which"},
        {"type": "text", "text": " one?"},
    ]
    rows = [[{"role": "user", "content": content}], [_user("Q?", _frames(1, 3))], [_user("No video?")]]
    body = "<video>\nThen<image><video>\nwhich one?"
    assert processor.apply_chat_template(rows[0]).endswith(f"<|user|>{body}<|endoftext|>")
    batch = _encode(processor, rows, return_timestamps=True)
    pixels = batch["pixel_values_videos"]
    assert pixels.shape == (3, 3, 3, 28, 28)
    assert pixels[:, :, 0, 0, 0].tolist() == [[1, 1, 2], [3, 0, 0], [0, 0, 0]]
    assert batch["pixel_values"].shape == (3, 1, 3, 28, 28)
    assert batch["pixel_values"][:, 0, 0, 0, 0].tolist() == [200, 0, 0]
    assert batch["video_timestamps"] == [[None, None], [None], []]
    row = batch["input_ids"][0].tolist()
    first = len(_tag("system")) + len(SYSTEM) + 1 + len(_tag("user"))
    video, image = processor.video_token_id, processor.image_token_id
    assert row[first:] == [video, video, *_ids("\nThen"), image, video, *_ids("\nwhich one?"), EOS]
    counts = (batch["input_ids"] == video).sum(dim=1) // processor.tokens_per_frame
    assert counts.tolist() == [3, 1, 0]


def test_sampling_options_reach_the_file(processor, video):
    options = [
        ({}, [0, 1, 2, 3]),
        ({"fps": 2.0, "end_s": 1.0}, [0, 0.5]),
        ({"fps": 10.0, "max_frames": 2}, [0, 2]),
        ({"processor_kwargs": {"fps": 0.5}}, [0, 2]),
    ]
    for given, wanted in options:
        batch = _encode(processor, [_user("Q?", str(video))], return_timestamps=True, **given)
        assert batch["video_timestamps"] == [[wanted]]
        assert (batch["input_ids"] == processor.video_token_id).sum() == len(wanted)
    own = {"role": "user", "content": [{"type": "video", "path": str(video), "fps": 0.5, "start_s": 1}]}
    assert _encode(processor, [own], fps=3, return_timestamps=True)["video_timestamps"] == [[[1, 3]]]


def test_frames_may_bring_their_times(processor):
    batch = _encode(processor, [_user("Q?", _frames(2), timestamps=[0.5, 7])], return_timestamps=True)
    assert batch["video_timestamps"] == [[[0.5, 7]]]


@pytest.mark.parametrize("key", ["video", "path", "url"])
def test_the_keys_of_a_video(processor, video, key):
    place = video.as_uri() if key == "url" else video
    content = [{"type": "video", key: place, "text": None}, {"type": "text", "text": "Q?"}]  # datasets fill in None
    assert _encode(processor, [{"role": "user", "content": content}])["pixel_values_videos"].shape[1] == 4


def test_tokens_per_frame(tokenizer):
    def count(size, **options):
        return VideoMa2mbaProcessor(tokenizer, VideoMa2mbaVideoProcessor(size=size), **options).tokens_per_frame

    assert count(336) == 144
    assert count(384) == 196
    assert count(56, patch_size=8) == 16  # 7 x 7 patches, rounded up
    assert count(56, spatial_pool_stride=1) == 16
    processor = VideoMa2mbaProcessor(tokenizer, VideoMa2mbaVideoProcessor(size=56))
    batch = _encode(processor, [_user("Q?", np.zeros((3, 56, 56, 3), np.uint8))])
    assert (batch["input_ids"] == processor.video_token_id).sum() == 3 * 4


def test_system_prompt_and_separator(tokenizer):
    processor = VideoMa2mbaProcessor(
        tokenizer, VideoMa2mbaVideoProcessor(size=28), system_prompt='Say "so"\n{{ it }} — 🎬', media_separator=""
    )
    conversation = [_user("Q?", _frames(1))]
    assert processor.apply_chat_template(conversation) == (
        '<|system|>Say "so"\n{{ it }} — 🎬<|endoftext|><|user|><video>Q?<|endoftext|>'
    )
    assert _encode(processor, conversation)["input_ids"].shape[1] > 0
    other = [{"role": "system", "content": [{"type": "text", "text": "Other."}]}, *conversation]
    assert processor.apply_chat_template(other).startswith("<|system|>Other.<|endoftext|><|user|>")


def test_special_tokens_in_a_question_are_ordinary_text(processor):
    batch = _encode(processor, [_user("What does <|endoftext|> mean?")], add_generation_prompt=True)
    assert (batch["input_ids"] == EOS).sum() == 2  # the ends of the system's and the user's turns


def test_pad_and_placeholder_tokens(tokenizer):
    assert tokenizer.pad_token is None
    size = len(tokenizer)
    processor = VideoMa2mbaProcessor(tokenizer, VideoMa2mbaVideoProcessor(size=28))
    assert (processor.image_token_id, processor.video_token_id) == (size, size + 1)  # 50277 and 50278 for GPT-NeoX
    assert (tokenizer.pad_token, tokenizer.pad_token_id) == ("<|padding|>", PAD)
    same = make_tokenizer(pad_token="<|endoftext|>")
    VideoMa2mbaProcessor(same, VideoMa2mbaVideoProcessor(size=28))
    assert same.pad_token_id == PAD
    without = make_tokenizer(special_tokens=["<|endoftext|>"])
    VideoMa2mbaProcessor(without, VideoMa2mbaVideoProcessor(size=28))
    assert without.pad_token_id not in (None, without.eos_token_id)
    own = make_tokenizer(special_tokens=["<|endoftext|>", "<|padding|>", "<own>"], pad_token="<own>")
    VideoMa2mbaProcessor(own, VideoMa2mbaVideoProcessor(size=28))
    assert own.pad_token == "<own>"
    with pytest.raises(ValueError, match="no end-of-sequence token"):
        VideoMa2mbaProcessor(make_tokenizer(eos_token=None), VideoMa2mbaVideoProcessor(size=28))


def test_decoding_is_the_tokenizers(processor):
    ids = _encode(processor, [_user("Q?", _frames(2))])["input_ids"]
    assert processor.decode(ids[0], skip_special_tokens=True).endswith("<|user|>\nQ?")
    assert processor.batch_decode(ids)[0].count("<video>") == 2


def test_return_dict_false_gives_ids(processor):
    ids = _encode(processor, [_user("Q?")], return_dict=False)
    assert ids.shape[0] == 1


# ---- what cannot be meant ----


@pytest.mark.parametrize(
    ("conversation", "message"),
    [
        ([], "conversation is empty"),
        ([[]], "conversation is empty"),
        ([{"role": "robot", "content": "Hi"}], "unknown role 'robot'"),
        ([_user(), {"role": "system", "content": "Late"}], "only the first message"),
        ([{"role": "user"}], "'role' and 'content'"),
        ([{"role": "user", "content": None}], "must be a string or a list"),
        ([{"role": "user", "content": ["Hi"]}], "must be a string or a list"),
        ([{"role": "user", "content": [{"type": "sound", "path": "a.mp3"}]}], "Unknown content type 'sound'"),
        ([{"role": "user", "content": [{"text": "Hi"}]}], "Unknown content type None"),
        ([{"role": "user", "content": [{"type": "text"}]}], "needs a string under 'text'"),
        ([{"role": "user", "content": [{"type": "video"}]}], "exactly one of the keys video, path, url; got none"),
        ([{"role": "user", "content": [{"type": "image", "path": "a", "url": "b"}]}], "exactly one of the keys image"),
        ([{"role": "assistant", "content": [{"type": "video", "path": "a.mp4"}]}], "Move it to a user turn"),
        ([_user("<video>\nWhat?")], "holds the placeholder <video>"),
        ([_user("What is <image>?")], "holds the placeholder <image>"),
    ],
)
def test_conversations_that_make_no_sense(processor, conversation, message):
    with pytest.raises(ValueError, match=message):
        _encode(processor, conversation)


@pytest.mark.parametrize(
    "content", ["", " \n", [], [{"type": "text", "text": " "}], [{"type": "video", "path": "a.mp4"}]]
)
def test_an_empty_question(processor, content):
    for tokenize in (True, False):
        with pytest.raises(ValueError, match="question is empty"):
            processor.apply_chat_template(
                [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=tokenize
            )


def test_an_answer_to_nobody(processor):
    with pytest.raises(ValueError, match="last turn is the assistant's"):
        _encode(processor, [_user(), _assistant("Yes.")], add_generation_prompt=True)


@pytest.mark.parametrize(
    ("text", "media", "message"),
    [
        ("<video> Q?", {}, r"1 <video> placeholder\(s\) for 0 video"),
        ("Q?", {"videos": _frames(1)}, r"0 <video> placeholder\(s\) for 1 video"),
        (["<video>", "<video> Q?"], {"videos": [_frames(1)] * 3}, r"2 <video> placeholder\(s\) for 3 video"),
        ("<image><image>", {"images": _frames(1)[0]}, r"2 <image> placeholder\(s\) for 1 image"),
    ],
)
def test_placeholders_must_match_media(processor, text, media, message):
    with pytest.raises(ValueError, match=message):
        processor(text=text, **media)


def test_calls_that_make_no_sense(processor, video):
    with pytest.raises(ValueError, match="needs a text"):
        processor(videos=str(video))
    with pytest.raises(ValueError, match="padding must be"):
        processor(text="Q?", padding="max_length")
    with pytest.raises(ValueError, match="padding_side must be"):
        processor(text="Q?", padding_side="top")
    with pytest.raises(ValueError, match="pad_to_multiple_of must be at least 1"):
        processor(text="Q?", pad_to_multiple_of=0)
    with pytest.raises(TypeError, match="truncation"):
        processor(text="Q?", truncation=True)
    with pytest.raises(VideoReadError, match=r"nowhere\.mp4.*no such file"):
        _encode(processor, [_user("Q?", "nowhere.mp4")])
    with pytest.raises(TypeError, match="must be a VideoMa2mbaVideoProcessor, got str"):
        VideoMa2mbaProcessor(processor.tokenizer, "video processor")
    with pytest.raises(TypeError):
        VideoMa2mbaProcessor("tokenizer", processor.video_processor)


def test_a_foreign_chat_template_is_for_text_only(processor):
    conversation = [_user("Q?")]
    template = "{% for message in messages %}{{ message['role'] }}: ...{% endfor %}"
    assert processor.apply_chat_template(conversation, chat_template=template) == "user: ..."
    with pytest.raises(ValueError, match="chat template gives another text"):
        _encode(processor, conversation, chat_template=template)


def test_generic_calls_take_nested_lists(processor, video):
    picture = np.full((28, 28, 3), 50, np.uint8)
    batch = processor(
        text=["<video>A<image>", "<image><image>B<video><video>"],
        videos=[[str(video)], [_frames(1), [picture, picture]]],
        images=[[picture], [picture, picture]],
    )
    assert batch["pixel_values_videos"].shape == (2, 4, 3, 28, 28)
    assert batch["pixel_values"].shape == (2, 2, 3, 28, 28)
    assert (batch["input_ids"] == processor.video_token_id).sum(dim=1).tolist() == [4, 3]
    assert (batch["input_ids"] == processor.image_token_id).sum(dim=1).tolist() == [1, 2]
    text_only = processor(text="Q?")
    assert sorted(text_only) == ["attention_mask", "input_ids"]


def test_what_the_model_takes_is_named(processor):
    batch = processor(text="<video><image>", videos=_frames(1), images=_frames(1)[0])
    assert sorted(batch) == sorted(processor.model_input_names)
