"""Conversations that are longer than there is room for: what is refused, cut, or shown at a lower rate."""

import json

import pytest
import torch

from video_ma2mba.data import media_loader
from video_ma2mba.data.collator import INFO, VideoChatCollator
from video_ma2mba.data.manifest import load_manifest
from video_ma2mba.data.prepare import prepare

VIDEO = {"type": "video", "path": "six.mp4"}  # six seconds, so six frames of one token each


def turns(*entries):
    """A question about each entry, answered."""
    ask = {"type": "text", "text": "What?"}
    return [
        message
        for number, entry in enumerate(entries)
        for message in ({"role": "user", "content": [entry, ask]}, {"role": "assistant", "content": f"It is {number}."})
    ]


def clip(start_s, end_s):
    return {**VIDEO, "start_s": start_s, "end_s": end_s}


@pytest.fixture
def prepared(tmp_path, media):
    """A function from the entries of one conversation to its row of the manifest."""

    def make(*entries, **options):
        root = media("six.mp4", "a.png")
        source = tmp_path / "source.jsonl"
        source.write_text(json.dumps({"id": "x", "messages": turns(*entries)}))
        prepare(source, root, tmp_path / "out", **options)
        (row,) = load_manifest(tmp_path / "out")
        return row

    return make


def frames_of(batch):
    return batch["pixel_values_videos"][0]


def answered(processor, batch):
    ids = batch["labels"][0]
    return processor.decode(ids[ids != -100])


def test_without_limits_all_frames_and_an_image_are_taken(prepared, processor):
    row = prepared(VIDEO, {"type": "image", "path": "a.png"})
    batch = VideoChatCollator(processor, with_info=True, strict=True)([row])
    assert len(frames_of(batch)) == 6
    assert batch["pixel_values"].shape[:2] == (1, 1)
    (info,) = batch[INFO]
    assert info["frames"] == 7
    assert info["videos"] == ["six.mp4", "a.png"]
    assert "changed" not in info
    assert answered(processor, batch) == "It is 0.<|endoftext|>It is 1.<|endoftext|>"


@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize(
    ("too_long", "picked", "changed"),
    [("cut", [0, 1, 2], "cut from 6 to 3 frames"), ("lower_fps", [0, 2, 4], "6 frames spread over 3")],
)
def test_frames_that_find_room(prepared, processor, cached, too_long, picked, changed):
    cache = {"processor": processor.video_processor, "fps": 1.0, "encoding": "raw"}
    row = prepared(VIDEO, **({"cache": cache} if cached else {}))
    whole = frames_of(VideoChatCollator(processor)([row]))
    batch = VideoChatCollator(processor, max_frames=3, too_long=too_long, with_info=True)([row])
    assert torch.equal(frames_of(batch), whole[picked])
    assert batch[INFO][0]["changed"] == changed


@pytest.mark.parametrize("cached", [False, True])
def test_a_clip_between_two_frames_shows_one(prepared, processor, cached):
    cache = {"processor": processor.video_processor, "fps": 1.0, "encoding": "raw"}
    row = prepared(clip(3.2, 3.4), **({"cache": cache} if cached else {}))
    (frame,) = frames_of(VideoChatCollator(processor)([row]))
    place = row["media_root"] + "/six.mp4"
    shown = processor.video_processor.load(place, start_s=3.0 if cached else 3.3, max_frames=1).frames[0]
    assert torch.equal(frame, shown)  # of those that are stored, the one that is shown in its middle


def test_cut_leaves_out_turns_whose_frames_find_no_room(prepared, processor):
    row = prepared(clip(0.0, 4.0), clip(4.0, 6.0))
    batch = VideoChatCollator(processor, max_frames=4, too_long="cut")([row])
    assert len(frames_of(batch)) == 4
    assert answered(processor, batch) == "It is 0.<|endoftext|>"


def test_at_a_lower_rate_every_clip_keeps_a_frame(prepared, processor):
    row = prepared(clip(0.0, 1.0), clip(1.0, 2.0), clip(2.0, 6.0))
    whole = frames_of(VideoChatCollator(processor)([row]))
    batch = VideoChatCollator(processor, max_frames=3, too_long="lower_fps")([row])
    assert torch.equal(frames_of(batch), whole[:3])
    collator = VideoChatCollator(processor, max_frames=2, too_long="lower_fps", strict=True)
    with pytest.raises(ValueError, match="3 clips where there is room for 2 frames"):
        collator([row])


def test_a_clip_that_comes_again_is_decoded_once_where_there_is_room(prepared, processor, monkeypatch):
    row, other = prepared(VIDEO), prepared(clip(1, 4))
    (whole,) = VideoChatCollator(processor)([row])["pixel_values_videos"]
    monkeypatch.setattr(media_loader, "KEPT_BYTES", whole.nbytes)
    collator, opened = VideoChatCollator(processor, strict=True), []
    load = processor.video_processor.load
    monkeypatch.setattr(processor.video_processor, "load", lambda *args, **kw: opened.append(args) or load(*args, **kw))
    for _ in range(2):
        frames = frames_of(collator([row]))
        assert torch.equal(frames, whole)
        frames.zero_()  # what is given out is the caller's
        collator([other])
    assert sum(not isinstance(medium, torch.Tensor) for medium, *_ in opened) == 3  # row once, other twice


def test_the_text_takes_room_too(prepared, processor):
    row = prepared(VIDEO)
    num_tokens = VideoChatCollator(processor)([row])["input_ids"].shape[1]
    assert len(frames_of(VideoChatCollator(processor, max_tokens=num_tokens)([row]))) == 6
    batch = VideoChatCollator(processor, max_tokens=num_tokens - 2, too_long="cut")([row])
    assert len(frames_of(batch)) == 4
    assert batch["input_ids"].shape[1] == num_tokens - 2


def test_rows_that_are_built_alone_make_the_batch_of_all_at_once(prepared, processor, monkeypatch):
    """Of other lengths, other numbers of frames, and one without an image or a video."""
    row = prepared(VIDEO, clip(1.0, 3.0), {"type": "image", "path": "a.png"})
    start, second, third = (row["messages"][i : i + 2] for i in (0, 2, 4))
    text = [{**one, "content": [e for e in one["content"] if e["type"] == "text"]} for one in start]
    rows = [{**row, "messages": messages} for messages in (second, text, start + second + third, third)]
    built = []
    encode = type(processor).apply_chat_template

    def counted(self, conversation, **options):
        built.append(conversation)
        return encode(self, conversation, **options)

    monkeypatch.setattr(type(processor), "apply_chat_template", counted)
    batch = VideoChatCollator(processor, pad_to_multiple_of=8, with_info=True, strict=True)(rows)
    assert len(built) == len(rows)
    together = encode(
        processor, [chat for (chat,) in built], tokenize=True, return_labels=True, padding_side="right",
        pad_to_multiple_of=8,
    )  # fmt: skip
    infos = batch.pop(INFO)
    assert batch.keys() == together.keys()
    for name, tensor in together.items():
        assert torch.equal(batch[name], tensor), name
    assert [info["tokens"] for info in infos] == batch["attention_mask"].sum(1).tolist()
    assert [info["frames"] for info in infos] == [2, 0, 9, 1]


def test_refused_rows_leave_a_batch_that_moves_no_weight(prepared, processor):
    row = prepared(VIDEO)
    batch = VideoChatCollator(processor, max_frames=5, with_info=True)([row, row])
    assert [info["error"].partition(";")[0] for info in batch[INFO]] == [
        "6 frames (6 tokens) where there is room for 5"
    ] * 2
    assert (batch["labels"] == -100).all()
    assert not batch["pixel_values_videos"].any()
    with pytest.raises(ValueError, match=r"sample x \(six\.mp4\): 6 frames"):
        VideoChatCollator(processor, max_frames=5, strict=True)([row])
    with pytest.raises(ValueError, match="room for 0"):
        VideoChatCollator(processor, max_tokens=1, too_long="cut", strict=True)([row])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"too_long": "shrink"}, "too_long must be one of"),
        ({"max_tokens": 0}, "max_tokens must be at least 1"),
        ({"max_frames": -1}, "max_frames must be at least 1"),
    ],
)
def test_limits_that_make_no_sense(processor, options, message):
    with pytest.raises(ValueError, match=message):
        VideoChatCollator(processor, **options)
