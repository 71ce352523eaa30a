"""Where a record names its media, where they stand, and its system prompt: read right, or left out and named."""

import json

import pytest

from video_ma2mba.data.formats import FORMATS, detect
from video_ma2mba.data.prepare import prepare

from .test_adapters import SYSTEM, pair, write_lines


def prepared(tmp_path, root, rendered, *records):
    source = write_lines(tmp_path / "records.jsonl", *records)
    report = prepare(source, root, tmp_path / "out")
    return rendered(tmp_path / "out"), report


def contents(folder):
    rows = map(json.loads, (folder / "manifest.jsonl").read_text().splitlines())
    return [[[entry.get("path", entry.get("text")) for entry in message["content"]] for message in row["messages"]]
            for row in rows]  # fmt: skip


@pytest.mark.parametrize("key", ["video", "videos", "video_path", "video_paths", "video_file"])
@pytest.mark.parametrize("many", [True, False])
def test_the_keys_of_a_video(tmp_path, media, rendered, key, many):
    record = {"id": "x", key: ["a.mp4"] if many else "a.mp4", "conversations": pair("Which colour?", "blue")}
    said, report = prepared(tmp_path, media("a.mp4"), rendered, record)
    assert said == {"x": SYSTEM + "<|user|><video>\nWhich colour?<|endoftext|><|assistant|>blue<|endoftext|>"}
    assert report["watched_s"] == 6


@pytest.mark.parametrize("key", ["image", "images", "image_path", "image_file"])
def test_the_keys_of_an_image(tmp_path, media, rendered, key):
    plain = {"id": "x", key: "a.png", "question": "Which colour?", "answer": "red"}
    said, _ = prepared(tmp_path, media("a.png"), rendered, plain)
    assert said == {"x": SYSTEM + "<|user|><image>\nWhich colour?<|endoftext|><|assistant|>red<|endoftext|>"}


def test_each_picture_keeps_its_turn(tmp_path, media, rendered):
    conversations = [*pair("Look.\n<image>", "Yes."), *pair("And now?", "No."), *pair("<image><image> Here?", "So.")]
    record = {"id": "x", "images": ["1.png", "2.png", "3.png"], "conversations": conversations}
    prepared(tmp_path, media("1.png", "2.png", "3.png"), rendered, record)
    assert contents(tmp_path / "out") == [
        [["1.png", "Look."], ["Yes."], ["And now?"], ["No."], ["2.png", "3.png", "Here?"], ["So."]]
    ]


def test_one_medium_stands_where_it_is_marked_first(tmp_path, media, rendered):
    late = [*pair("Hello.", "Hi."), *pair("<image>\nWhat?", "A."), *pair("<video>\nAnd?", "B.")]
    prepared(tmp_path, media("a.mp4"), rendered, {"id": "x", "video": "a.mp4", "conversations": late})
    assert contents(tmp_path / "out") == [[["Hello."], ["Hi."], ["a.mp4", "What?"], ["A."], ["And?"], ["B."]]]


def test_several_videos_by_turn(tmp_path, media, rendered):
    turns = [*pair("<video>\nOne?", "A."), *pair("<video>\nTwo?", "B.")]
    prepared(
        tmp_path, media("a.mp4", "b.mp4"), rendered, {"id": 1, "videos": ["a.mp4", "b.mp4"], "conversations": turns}
    )
    assert contents(tmp_path / "out") == [[["a.mp4", "One?"], ["A."], ["b.mp4", "Two?"], ["B."]]]


@pytest.mark.parametrize("form", ["entries", "texts", "no place"])
def test_messages_with_their_media_beside(tmp_path, media, rendered, form):
    """As TRL and LLaMA-Factory have it."""
    first, second = {
        "entries": ([{"type": "text", "text": "A?"}, {"type": "image"}], [{"type": "image"}]),
        "texts": ("A?<image>", "<image>"),
        "no place": ("A?", "B?"),
    }[form]
    messages = [{"role": "user", "content": first}, {"role": "assistant", "content": "a"},
                {"role": "user", "content": second}, {"role": "assistant", "content": "b"}]  # fmt: skip
    record = {"id": "x", "messages": messages, "images": ["1.png", "2.png"]}
    prepared(tmp_path, media("1.png", "2.png"), rendered, record)
    wanted = {
        "entries": [["A?", "1.png"], ["a"], ["2.png"], ["b"]],
        "texts": [["1.png", "A?"], ["a"], ["2.png"], ["b"]],
        "no place": [["1.png", "2.png", "A?"], ["a"], ["B?"], ["b"]],
    }[form]
    assert contents(tmp_path / "out") == [wanted]


@pytest.mark.parametrize("key", ["system", "system_prompt"])
@pytest.mark.parametrize("form", ["llava", "messages", "plain"])
def test_the_system_prompt_beside_the_turns(tmp_path, media, rendered, key, form):
    shape = {
        "llava": {"conversations": pair("Why?", "Parce que.")},
        "messages": {"messages": [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "Parce que."}]},
        "plain": {"question": "Why?", "answer": "Parce que."},
    }[form]
    record = {"id": "x", key: "Answer in French.", **shape}
    if form != "messages":
        record["video"] = "a.mp4"
    said, _ = prepared(tmp_path, media("a.mp4"), rendered, record)
    medium = "" if form == "messages" else "<video>\n"
    assert said == {
        "x": f"<|system|>Answer in French.<|endoftext|><|user|>{medium}Why?<|endoftext|><|assistant|>Parce que."
        "<|endoftext|>"
    }


def test_a_clip_of_a_record_and_of_an_entry(tmp_path, media, rendered):
    spans = [("start_s", "end_s"), ("video_start", "video_end"), ("start", "end"), ("start_time", "end_time")]
    whole = [{"id": a, "video": "a.mp4", a: 1, b: 3.5, "conversations": pair("Q?", a)} for a, b in spans]
    entries = [
        {"id": f"{a} in", "messages": [
            {"role": "user", "content": [{"type": "video_url", "video_url": {"url": "a.mp4"}, a: 1, b: 3.5}]},
            {"role": "assistant", "content": a}]}
        for a, b in spans
    ]  # fmt: skip
    for records in (whole, entries):
        _, report = prepared(tmp_path, tmp_path / "media" if records is entries else media("a.mp4"), rendered, *records)
        assert report["records"]["kept"] == 4
        (row,) = map(json.loads, (tmp_path / "out" / "manifest.jsonl").read_text().splitlines())
        (entry,) = (e for m in row["messages"] for e in m["content"] if e["type"] == "video")
        assert (entry["start_s"], entry["end_s"], row["watched_s"]) == (1.0, 3.5, 2.5)


TURNS = pair("What?", "That.")


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"video_url": "a.mp4", "conversations": TURNS}, "video_url may name a medium, and is not read"),
        ({"frames": ["1.png"], "question": "Q?", "answer": "A"}, "either a 'video' or an 'image'"),
        ({"clip": {"path": "a.mp4"}, "conversations": TURNS}, "clip may name a medium"),
        ({"audio": "a.wav", "messages": [{"role": "user", "content": "Q?"}]}, "audio may name a medium"),
        ({"video": "a", "video_path": "b", "conversations": TURNS}, "under one key, not under video and video_path"),
        ({"video": "a", "start": "00:01", "end": "00:02", "conversations": TURNS}, "both start and end, in seconds"),
        ({"conversations": [{"from": "human", "value": "Q?", "image": "a.png"}]}, "a turn names a medium under image"),
        ({"system": ["x"], "conversations": TURNS}, "'system' must be a text"),
        ({"system": "x", "conversations": [{"from": "system", "value": "y"}, *TURNS]}, "under 'system' and in the"),
        (
            {"images": ["1", "2"], "conversations": [{"from": "human", "value": "Q?"},
                                                      {"from": "gpt", "value": "<image><image>"}]},
            "not the user's",
        ),
        (
            {"images": ["1"], "messages": [{"role": "user", "content": [{"type": "image", "path": "2"}]}]},
            "in the messages and beside them",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "video", "path": "a", "nframes": 4}]}]},
            "nframes, which a manifest cannot keep",
        ),
        ({"messages": [{"role": "assistant", "content": "", "tool_calls": [{}]}]}, "tool_calls"),
    ],
)  # fmt: skip
def test_what_is_not_read_is_named(tmp_path, record, message):
    source = write_lines(tmp_path / "records.jsonl", record)
    (problem,) = FORMATS[detect(source)](source)
    assert problem.reason == "malformed"
    assert message in problem.message


def test_descriptions_beside_a_medium_that_is_read_are_no_matter(tmp_path, media, rendered):
    record = {"id": "x", "video": "a.mp4", "video_id": "17", "image_size": [3, 4], "conversations": TURNS}
    _, report = prepared(tmp_path, media("a.mp4"), rendered, record)
    assert report["records"] == {"read": 1, "kept": 1, "left_out": {}}
