"""A held-out part: by video, of the size that was asked for, the same each time."""

import pytest

from video_ma2mba.data.holding_out import MAX_SAMPLES, hold_out, videos_of


def row(*paths, folder="f"):
    content = [{"type": "video", "path": path, "text": None} for path in paths]
    content.append({"type": "text", "text": "What?", "path": None})
    return {"id": "x", "folder": folder, "messages": [{"role": "user", "content": content}]}


@pytest.mark.parametrize("seed", range(5))
def test_samples_that_share_a_video_stay_together(seed):
    rows = [row(f"{i % 10}.mp4") for i in range(40)] + [row("3.mp4", "4.mp4"), row("text", folder="g"), row()]
    trained, held = hold_out(rows, 0.2, seed)
    assert sorted(trained + held) == list(range(len(rows)))
    seen = [{medium for i in part for medium in videos_of(rows[i])} for part in (trained, held)]
    assert not seen[0] & seen[1]
    assert 6 <= len(held) <= 12
    assert hold_out(rows, 0.2, seed) == (trained, held)


def test_the_same_name_in_another_folder_is_another_video():
    rows = [row("a.mp4", folder=str(i)) for i in range(10)]
    trained, held = hold_out(rows, 0.3, 0)
    assert (len(trained), len(held)) == (7, 3)


@pytest.mark.parametrize(
    ("num", "share", "expected"), [(30, 0.2, 6), (5, 0.2, 1), (2, 0.2, 1), (9000, 0.2, MAX_SAMPLES)]
)
def test_how_many(num, share, expected):
    assert len(hold_out([row(f"{i}.mp4") for i in range(num)], share, 0)[1]) == expected


def test_one_video_is_trained_on():
    assert hold_out([row("a.mp4")] * 7, 0.2, 0) == (list(range(7)), [])
