"""Synthetic stories: the time line, the pictures and the answers must tell the same story."""

import math
from collections import Counter

import numpy as np
import pytest

from video_ma2mba.data.synthetic import COLOURS, NEEDLE, QUESTION_KINDS, SHAPES, Story, make_story
from video_ma2mba.processing.video_reader import read_frames

DURATIONS_S = (3, 4, 5, 10, 17, 60, 180)


def find_shape(frame: np.ndarray) -> tuple[str, str]:
    """Colour and shape in one frame (height, width, 3), found from the pixels alone, by rules unlike the painter's."""
    pixels = frame.astype(float)
    background = np.median(np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]]), axis=0)
    inside = np.abs(pixels - background).max(axis=2) > 60
    rows, columns = np.nonzero(inside)
    mean = pixels[inside].mean(axis=0)
    colour = min(COLOURS, key=lambda name: np.abs(np.array(COLOURS[name]) - mean).sum())

    box = inside[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]
    fill = box.mean()
    top, _, bottom = (part.mean() for part in np.array_split(box, 3))
    if fill > 0.92:
        return colour, "square"
    if top < 0.6 * bottom:
        return colour, "triangle"
    if fill > 0.65:
        return colour, "circle"
    between_the_bars = box[int(0.31 * box.shape[0]), int(0.31 * box.shape[1])]
    return colour, "diamond" if between_the_bars else "cross"


def visible_shapes(frames) -> list[tuple[str, str]]:
    return [find_shape(frame) for frame in frames]


@pytest.mark.parametrize("duration_s", DURATIONS_S)
def test_timeline(duration_s):
    for seed in range(30):
        story = make_story(seed, duration_s)
        assert story.duration_s == duration_s
        assert story.scenes[0].start_s == 0
        for before, after in zip(story.scenes, story.scenes[1:], strict=False):
            assert before.end_s == after.start_s
        assert all(scene.duration_s >= 1 for scene in story.scenes)
        assert [scene.shape for scene in story.scenes].count(NEEDLE) == 1
        assert NEEDLE not in (story.scenes[0].shape, story.scenes[-1].shape)
        assert story.circle.duration_s <= 2
        assert 2 <= len(story.debuts) <= 5
        assert len({scene.colour for scene in story.scenes}) == len(story.debuts) + 1


def test_same_seed_same_story():
    one, again, other = make_story(5, 30), make_story(5, 30), make_story(6, 30)
    assert one == again != other
    np.testing.assert_array_equal(one.frames(), again.frames())
    assert not np.array_equal(one.frames(), other.frames())
    assert one.questions(np.random.default_rng(1)) == again.questions(np.random.default_rng(1))


def test_same_seed_same_file(tmp_path):
    files = [make_story(5, 10).render(tmp_path / name).read_bytes() for name in ("one.mp4", "two.mp4")]
    assert files[0] == files[1]


@pytest.mark.parametrize("fps", [0.5, 1.0, 2.0, 4.0, 0.3])
def test_frames_at_any_rate_are_source_frames(fps):
    story = make_story(3, 20)
    source = story.frames(fps=story.source_fps)
    frames = story.frames(fps)
    assert frames.dtype == np.uint8
    assert frames.shape == (math.ceil(story.duration_s * fps), 64, 64, 3)
    times_s = np.arange(len(frames)) / fps
    np.testing.assert_array_equal(frames, source[np.ceil(times_s * story.source_fps - 1e-9).astype(int)])


def test_pictures_show_the_time_line():
    for seed in range(20):
        story = make_story(seed, 40)
        shown = visible_shapes(story.frames())
        expected = [(scene.colour, scene.shape) for scene in story.scenes for _ in range(scene.duration_s)]
        assert shown == expected


@pytest.mark.parametrize("duration_s", DURATIONS_S)
def test_answers_agree_with_the_pixels(duration_s):
    """Answer every question from the frames alone."""
    rng = np.random.default_rng(0)
    story = make_story(11, duration_s)
    shown = visible_shapes(story.frames())
    names = [" ".join(seen) for seen in shown]
    counts = dict.fromkeys(QUESTION_KINDS, 1) | {"ever_appears": 6, "which_first": 6}
    for kind, text, answer in story.questions(rng, counts):
        if kind == "circle_colour":
            assert [answer] == list({colour for colour, shape in shown if shape == NEEDLE})
        elif kind == "first_shape":
            assert answer == shown[0][1]
        elif kind == "last_shape":
            assert answer == shown[-1][1]
        elif kind == "ever_appears":
            name = text.removeprefix("Did a ").removesuffix(" ever appear?")
            assert answer == ("yes" if name in names else "no")
        else:
            one, other = text.removeprefix("Which came first, the ").removesuffix("?").split(" or the ")
            assert answer == min(one, other, key=names.index)


@pytest.mark.parametrize("duration_s", [3, 12, 40])
def test_h264_round_trip(tmp_path, duration_s):
    """A video file sampled at 1 FPS shows what `frames` gives."""
    story = make_story(21, duration_s)
    decoded = np.stack([frame.pixels for frame in read_frames(story.render(tmp_path / "story.mp4"), 1.0)])
    frames = story.frames()
    assert decoded.shape == frames.shape
    assert np.abs(decoded.astype(float) - frames).mean() < 8  # of 255: the noise, and colours at half resolution
    assert visible_shapes(decoded) == visible_shapes(frames)


def test_answers_are_balanced():
    """Who always gives the most frequent answer of a kind is nearly always wrong, or right half of the time."""
    rng = np.random.default_rng(0)
    answers = {kind: Counter() for kind in QUESTION_KINDS}
    first_named = 0
    for seed in range(1500):
        story = make_story(seed, 20)
        for kind in QUESTION_KINDS:
            _, text, answer = story.question(kind, rng)
            answers[kind][answer] += 1
            first_named += kind == "which_first" and text.startswith(f"Which came first, the {answer} ")
    share = {kind: max(counter.values()) / 1500 for kind, counter in answers.items()}
    assert set(answers["circle_colour"]) == set(COLOURS)
    assert share["circle_colour"] < 0.25
    assert set(answers["first_shape"]) == set(answers["last_shape"]) == set(SHAPES)
    assert max(share["first_shape"], share["last_shape"]) < 0.32
    assert set(answers["ever_appears"]) == {"yes", "no"}
    assert share["ever_appears"] < 0.55
    assert share["which_first"] < 0.1
    assert 0.45 < first_named / 1500 < 0.55


def test_questions_of_a_default_set():
    story = make_story(1, 60)
    questions = story.questions(np.random.default_rng(3))
    assert len(questions) == len({question.text for question in questions}) == 6
    assert {question.kind for question in questions} == set(QUESTION_KINDS)
    assert {question.answer for question in questions if question.kind == "ever_appears"} == {"yes", "no"}


@pytest.mark.parametrize(("depth", "low_s", "high_s"), [(0.0, 1, 5), (0.5, 95, 105), (1.0, 190, 199)])
def test_needle_at_a_depth(depth, low_s, high_s):
    for seed in range(10):
        story = make_story(seed, 200, circle_depth=depth, circle_s=3)
        assert low_s <= story.circle.start_s <= high_s
        assert story.circle.duration_s == 3


def test_four_hours_need_no_list_of_frames():
    story = make_story(2, 4 * 3600)
    frames = story.iter_frames(1.0)
    assert next(frames).shape == (64, 64, 3)
    assert story.duration_s == 14400


@pytest.mark.parametrize(
    "arguments", [{"duration_s": 2}, {"duration_s": 10.5}, {"size": 33}, {"circle_depth": 1.5}, {"circle_s": 0}]
)
def test_bad_arguments_are_refused(arguments):
    with pytest.raises(ValueError, match=next(iter(arguments))):
        make_story(0, **arguments)


def test_unknown_kind_and_rate_are_refused():
    story: Story = make_story(0, 10)
    with pytest.raises(ValueError, match="circle_colour"):
        story.question("taste", np.random.default_rng(0))
    with pytest.raises(ValueError, match="fps"):
        story.frames(fps=8.0)
    with pytest.raises(ValueError, match="fps"):
        story.frames(fps=-1.0)
