"""Videos in a row, and the questions about each at the end."""

import numpy as np
import pytest
from datasets import Dataset, Features, Value

from video_ma2mba.data.collator import VideoChatCollator
from video_ma2mba.data.joining import JoiningOptions, join
from video_ma2mba.data.manifest import clean_messages, features
from video_ma2mba.data.synthetic import make_story

BLANK = dict.fromkeys(("type", "text", "path", "start_s", "end_s", "duration_s"))


def entry(**values):
    return {**BLANK, **values}


def video(path, duration_s):
    return entry(type="video", path=path, start_s=0.0, end_s=duration_s, duration_s=duration_s)


def row(number, duration_s, folder="f", questions=2, late=False):
    messages = [{"role": "system", "content": [entry(type="text", text="Be brief.")]}]
    for i in range(questions):
        content = [entry(type="text", text=f"{number}, question {i}?")]
        if i == 0 or late:
            content.insert(0, video(f"{number}.mp4", duration_s))
        messages.append({"role": "user", "content": content})
        messages.append({"role": "assistant", "content": [entry(type="text", text=f"{number}, answer {i}")]})
    return {
        "id": str(number), "messages": messages, "watched_s": duration_s, "num_images": 0, "num_characters": 40,
        "media_root": f"{folder}-media", "folder": folder,
    }  # fmt: skip


def dataset_of(rows):
    return Dataset.from_list(
        rows, features=Features({**features(), "media_root": Value("string"), "folder": Value("string")})
    )


def parts_of(joined):
    """Which videos a row shows, and (about which, what) for every turn."""
    _, *turns = clean_messages(joined["messages"])
    media = [entry["path"].removesuffix(".mp4") for entry in turns[0]["content"] if entry["type"] == "video"]
    texts = [message["content"][-1]["text"] for message in turns]
    return media, list(zip(texts[::2], texts[1::2], strict=True))


def test_lengths_are_drawn_and_every_question_says_which_video_it_is_about():
    rows = dataset_of([row(i, 60.0 + i) for i in range(40)])
    joined = join(rows, JoiningOptions(60, 960), seed=0)
    assert len(joined) == 40
    lengths = []
    for index, one in enumerate(joined):
        media, turns = parts_of(one)
        assert len(set(media)) == len(media)
        assert str(index) in media
        assert one["watched_s"] == sum(60.0 + int(name) for name in media) <= 960
        assert len(turns) == 2 * len(media)
        for asked, answered in turns:
            number = answered.partition(",")[0]
            said = f"Video {media.index(number) + 1} of {len(media)}: " if len(media) > 1 else ""
            assert asked == f"{said}{number}, question {answered[-1]}?"
        assert sum(message["role"] == "system" for message in one["messages"]) == 1
        lengths.append(len(media))
    assert min(lengths) == 1
    assert max(lengths) > 8
    assert 2 <= np.median(lengths) <= 6  # evenly on a logarithmic scale
    orders = [[turn[1].partition(",")[0] for turn in parts_of(one)[1][::2]] == parts_of(one)[0] for one in joined]
    assert not all(orders)
    again = join(rows, JoiningOptions(60, 960), seed=0)
    assert again["id"][:] == joined["id"][:] != join(rows, JoiningOptions(60, 960), seed=1)["id"][:]


def test_what_cannot_be_joined_stays_as_it_is():
    """Clips between the turns, text alone, and what lies in another folder."""
    text = row(9, 0.0, questions=1)
    text["messages"][1]["content"].pop(0)
    rows = dataset_of([row(0, 30.0), row(1, 30.0, "g"), row(2, 30.0, late=True), text, row(4, 5000.0)])
    joined = join(rows, JoiningOptions(200, 200), seed=0)
    assert joined["id"][:] == ["0", "1", "2", "9", "4"]
    assert joined[2] == rows[2]


def test_a_joined_row_becomes_a_batch(processor, tmp_path):
    stories = [make_story(seed, 5 + seed) for seed in range(3)]
    for story in stories:
        story.render(tmp_path / f"{story.seed}.mp4")
    rows = [{**row(s.seed, float(s.duration_s)), "media_root": str(tmp_path)} for s in stories]
    joined = join(dataset_of(rows), JoiningOptions(18, 18), seed=0)
    batch = VideoChatCollator(processor, with_info=True)([joined[0]])
    assert batch["pixel_values_videos"].shape[1] == 5 + 6 + 7
    assert (
        batch["sample_info"][0]["videos"] == ["0.mp4", "1.mp4", "2.mp4"] or len(batch["sample_info"][0]["videos"]) == 3
    )
    said = processor.tokenizer.decode(batch["labels"][batch["labels"] != -100])
    assert said.count("answer") == 6


@pytest.mark.parametrize("bounds", [(0, 5), (6, 5), (5, float("inf"))])
def test_nonsense(bounds):
    with pytest.raises(ValueError, match="joining"):
        JoiningOptions(*bounds)
