"""Synthetic stories: seeded videos of coloured shapes, and questions that need memory over the whole video.

A story is a time line of scenes. Each scene shows one coloured shape on a dark background for one to four whole
seconds, so sampling at 1 FPS sees every scene. A story has

- a *cast* of three to five distractors ("red square", "blue cross", ...), each of a colour of its own, whose debuts are
  spread over the whole video;
- exactly one short scene with a *circle* of yet another colour, never the first and never the last: the needle.

    story = make_story(seed=7, duration_s=180)
    story.render("story.mp4")                 # H.264, 64x64, 4 frames per second
    frames = story.frames(fps=1.0)            # the same pictures without the encoder: uint8 (180, 64, 64, 3)
    for kind, text, answer in story.questions(np.random.default_rng(0)):
        ...

Everything follows from the seed: the same seed gives the same pictures, and the same generator the same questions.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np

COLOURS = {
    "red": (215, 40, 40),
    "green": (40, 170, 60),
    "blue": (50, 80, 225),
    "yellow": (230, 205, 50),
    "purple": (165, 60, 200),
    "white": (235, 235, 235),
}
SHAPES = ("square", "triangle", "cross", "diamond")  # what a distractor may be
NEEDLE = "circle"  # shown once in every story

QUESTION_KINDS = ("circle_colour", "first_shape", "last_shape", "ever_appears", "which_first")
# Six questions, the default of Story.questions: the yes and the no of `ever_appears` come in pairs.
DEFAULT_COUNTS = {"circle_colour": 1, "first_shape": 1, "last_shape": 1, "ever_appears": 2, "which_first": 1}

MADE_HERE = "a synthetic story of video-ma2mba"  # the comment in a rendered file
MIN_DURATION_S = 3  # the first shape, the circle, the last shape
NOISE_BANK_SIZE = 8  # noise pictures of a story; frame i uses number i modulo this


class Question(NamedTuple):
    """One question about a story and its true answer, a word or two in lower case."""

    kind: str
    text: str
    answer: str


@dataclass(frozen=True)
class Scene:
    """One coloured shape on screen from `start_s` to `end_s`.

    Lengths are fractions of the frame's side, speeds fractions of it per second.
    """

    start_s: int
    duration_s: int
    colour: str
    shape: str
    rgb: tuple[float, float, float]
    background: float
    radius: float
    x: float
    y: float
    speed_x: float
    speed_y: float

    @property
    def end_s(self) -> int:
        return self.start_s + self.duration_s

    @property
    def name(self) -> str:
        """Colour and shape, for instance "red square"."""
        return f"{self.colour} {self.shape}"


@dataclass(frozen=True)
class Story:
    """A time line of scenes without gaps, made by `make_story`. Frames are square, `size` pixels wide."""

    seed: int
    scenes: tuple[Scene, ...]
    size: int = 64
    source_fps: int = 4

    @property
    def duration_s(self) -> int:
        return self.scenes[-1].end_s

    @property
    def circle(self) -> Scene:
        """The one scene that shows a circle."""
        return next(scene for scene in self.scenes if scene.shape == NEEDLE)

    @cached_property
    def debuts(self) -> dict[str, int]:
        """Second of the first appearance of every distractor, in order of appearance."""
        debuts: dict[str, int] = {}
        for scene in self.scenes:
            if scene.shape != NEEDLE:
                debuts.setdefault(scene.name, scene.start_s)
        return debuts

    # --- pictures ---

    def iter_frames(self, fps: float | None = None) -> Iterator[np.ndarray]:
        """Yield uint8 frames (height, width, 3), one at a time.

        Args:
            fps: Frame k is the source's first frame at or after k / fps seconds, as a video reader picks it.
                None: every source frame.
        """
        step = Fraction(1) if fps is None else Fraction(self.source_fps) / Fraction(str(fps))
        if step < 1:
            raise ValueError(f"fps must be positive and at most source_fps={self.source_fps}, got {fps}")
        noise = (
            np.random.default_rng([self.seed, 1])
            .normal(0.0, 7.0, (NOISE_BANK_SIZE, self.size, self.size, 3))
            .astype(np.float32)
        )
        scenes, last = iter(self.scenes), self.duration_s * self.source_fps - 1
        scene, k = next(scenes), 0
        while (index := math.ceil(k * step)) <= last:
            time_s = index / self.source_fps
            while time_s >= scene.end_s:
                scene = next(scenes)
            picture = _draw(scene, time_s - scene.start_s, self.size) + noise[index % NOISE_BANK_SIZE]
            yield np.clip(picture, 0.0, 255.0).astype(np.uint8)
            k += 1

    def frames(self, fps: float = 1.0) -> np.ndarray:
        """The frames sampled at `fps` as one uint8 array (num_frames, height, width, 3)."""
        return np.stack(list(self.iter_frames(fps)))

    def render(self, path: str | Path) -> Path:
        """Encode the story as H.264 (yuv420p, `source_fps` frames per second) at constant memory; returns the path."""
        import av  # here, so that a study without video files needs no decoder

        path = Path(path)
        with av.open(str(path), "w") as container:
            container.metadata["comment"] = MADE_HERE
            stream = container.add_stream("libx264", rate=self.source_fps)
            stream.width = stream.height = self.size
            stream.pix_fmt = "yuv420p"
            stream.thread_count = 1  # frames this small gain nothing from more; and bytes are the same everywhere
            stream.options = {"preset": "veryfast", "crf": "20", "g": str(10 * self.source_fps)}
            for picture in self.iter_frames():
                container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
            container.mux(stream.encode(None))
        return path

    # --- questions ---

    def question(self, kind: str, rng: np.random.Generator) -> Question:
        """Draw one question of a kind. Yes and no, first-named and second-named are right equally often."""
        if kind == "circle_colour":
            return Question(kind, "What colour was the circle?", self.circle.colour)
        if kind == "first_shape":
            return Question(kind, "Which shape came first of all?", self.scenes[0].shape)
        if kind == "last_shape":
            return Question(kind, "Which shape came last of all?", self.scenes[-1].shape)
        if kind == "ever_appears":
            return self._ever_appears(rng, bool(rng.integers(2)))
        if kind == "which_first":
            one, other = rng.choice(list(self.debuts), size=2, replace=False)
            answer = min(one, other, key=self.debuts.__getitem__)
            return Question(kind, f"Which came first, the {one} or the {other}?", str(answer))
        raise ValueError(f"unknown kind of question {kind!r}; the kinds are {', '.join(QUESTION_KINDS)}")

    def questions(self, rng: np.random.Generator, counts: Mapping[str, int] | None = None) -> list[Question]:
        """Draw different questions in random order.

        Args:
            rng: Source of all choices.
            counts: How many of each kind (DEFAULT_COUNTS: six questions over all five kinds). Of several
                `ever_appears`, every other one is a yes. A short story may have too few different ones: then fewer.
        """
        drawn: list[Question] = []
        for kind, count in (DEFAULT_COUNTS if counts is None else counts).items():
            yes = bool(rng.integers(2))
            for i in range(count):
                question = (
                    self._ever_appears(rng, yes ^ bool(i % 2)) if kind == "ever_appears" else self.question(kind, rng)
                )
                if all(question.text != other.text for other in drawn):
                    drawn.append(question)
        return [drawn[i] for i in rng.permutation(len(drawn))]

    def _ever_appears(self, rng: np.random.Generator, yes: bool) -> Question:
        """Ask for a distractor that appears, or for one that does not though its colour and its shape may well do."""
        names = (
            list(self.debuts) if yes else [f"{c} {s}" for c in COLOURS for s in SHAPES if f"{c} {s}" not in self.debuts]
        )
        return Question("ever_appears", f"Did a {rng.choice(names)} ever appear?", "yes" if yes else "no")


def make_story(
    seed: int,
    duration_s: int = 180,
    *,
    circle_depth: float | None = None,
    circle_s: int | None = None,
    size: int = 64,
    source_fps: int = 4,
) -> Story:
    """Make up a story.

    Args:
        seed: Decides everything that the other arguments leave open.
        duration_s: Length in whole seconds, at least 3.
        circle_depth: Where the circle appears, from 0.0 (right after the first scene) to 1.0 (right before the last).
            None: anywhere.
        circle_s: Seconds that the circle stays; None: one or two.
        size: Side of the frames in pixels; even, as yuv420p needs.
        source_fps: Frame rate of the video file.
    """
    if duration_s != int(duration_s) or duration_s < MIN_DURATION_S:
        raise ValueError(f"duration_s must be a whole number of at least {MIN_DURATION_S} seconds, got {duration_s}")
    if size < 16 or size % 2:
        raise ValueError(f"size must be an even number of at least 16 pixels, got {size}")
    if circle_depth is not None and not 0.0 <= circle_depth <= 1.0:
        raise ValueError(f"circle_depth must lie between 0 and 1, got {circle_depth}")
    rng = np.random.default_rng([seed, 0])
    duration_s = int(duration_s)
    circle_s = int(rng.integers(1, 3)) if circle_s is None else circle_s
    if circle_s < 1:
        raise ValueError(f"circle_s must be at least 1 second, got {circle_s}")
    circle_s = min(circle_s, duration_s - 2)

    lengths = _scene_lengths(rng, duration_s - circle_s)
    circle_colour, *colours = (str(colour) for colour in rng.permutation(list(COLOURS)))
    names = _distractors(rng, colours, len(lengths))
    borders = np.cumsum(lengths)[:-1]  # seconds of distractors shown before each place where the circle fits
    if circle_depth is None:
        position = int(rng.integers(len(borders)))
    else:
        position = int(np.abs(borders - circle_depth * borders[-1]).argmin())
    lengths.insert(position + 1, circle_s)
    names.insert(position + 1, (circle_colour, NEEDLE))

    scenes, start_s = [], 0
    for length_s, (colour, shape) in zip(lengths, names, strict=True):
        scenes.append(_make_scene(rng, start_s, length_s, colour, shape))
        start_s += length_s
    return Story(seed, tuple(scenes), size, source_fps)


def _scene_lengths(rng: np.random.Generator, total_s: int) -> list[int]:
    """Cut `total_s` seconds into at least two scenes of one to four seconds, shorter ones where the video is short."""
    longest_s = min(4, max(1, total_s // 5))
    lengths: list[int] = []
    while (left_s := total_s - sum(lengths)) > 0:
        lengths.append(min(left_s, int(rng.integers(1, longest_s + 1))))
    return lengths


def _distractors(rng: np.random.Generator, colours: list[str], num_scenes: int) -> list[tuple[str, str]]:
    """Choose (colour, shape) of every scene but the circle's: a small cast, debuts anywhere, some seen only once."""
    size = min(int(rng.integers(3, 6)), num_scenes)
    cast = [(colour, str(rng.choice(SHAPES))) for colour in colours[:size]]
    popularity = rng.exponential(size=size) + 0.02
    debut_scenes = {0, *rng.choice(np.arange(1, num_scenes), size=size - 1, replace=False).tolist()}
    names, known = [], 0
    for i in range(num_scenes):
        if i in debut_scenes:
            names.append(cast[known])
            known += 1
        else:
            weights = popularity[:known] / popularity[:known].sum()
            names.append(cast[int(rng.choice(known, p=weights))])
    return names


def _make_scene(rng: np.random.Generator, start_s: int, duration_s: int, colour: str, shape: str) -> Scene:
    """Draw the looks of a scene: size, place, drift, background and a shade of the colour."""
    radius = rng.uniform(0.28, 0.38)
    (x, y), (end_x, end_y) = rng.uniform(radius + 0.03, 0.97 - radius, size=(2, 2))
    drift = min(1.0, 0.1 * duration_s)  # of the way to the end point: slow
    shade = np.clip(np.array(COLOURS[colour]) + rng.uniform(-18, 18, size=3), 0, 255)
    return Scene(
        start_s=start_s,
        duration_s=duration_s,
        colour=colour,
        shape=shape,
        rgb=tuple(shade.tolist()),
        background=float(rng.uniform(15, 60)),
        radius=float(radius),
        x=float(x),
        y=float(y),
        speed_x=float((end_x - x) * drift / duration_s),
        speed_y=float((end_y - y) * drift / duration_s),
    )


def _draw(scene: Scene, time_s: float, size: int) -> np.ndarray:
    """Paint a scene `time_s` seconds after its start: float32 (size, size, 3), 0 to 255, soft edges, no noise."""
    pixels = (np.arange(size, dtype=np.float32) + 0.5) / size
    x = (pixels - (scene.x + scene.speed_x * time_s))[None, :] / scene.radius  # the shape spans about -1 to 1
    y = (pixels - (scene.y + scene.speed_y * time_s))[:, None] / scene.radius
    coverage = np.clip(0.5 - _signed_distance(scene.shape, x, y) * scene.radius * size, 0.0, 1.0)[..., None]
    return scene.background + coverage * (np.array(scene.rgb, dtype=np.float32) - scene.background)


def _signed_distance(shape: str, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """About how far (x, y) lies outside a shape of radius 1; negative inside."""
    if shape == "circle":
        return np.sqrt(x * x + y * y) - 0.95
    if shape == "square":
        return np.maximum(np.abs(x), np.abs(y)) - 0.85
    if shape == "diamond":
        return (np.abs(x) + np.abs(y) - 1.0) * 0.7071
    if shape == "triangle":  # point up, base at y = 0.8
        return np.maximum((np.abs(x) * 1.8 - y - 0.9) * 0.4856, y - 0.8)
    # a cross
    return np.minimum(np.maximum(np.abs(x) - 0.3, np.abs(y) - 1.0), np.maximum(np.abs(y) - 0.3, np.abs(x) - 1.0))


def is_story(path: str) -> bool:
    """Whether this is a file that `Story.render` wrote."""
    import av

    if not Path(path).is_file():
        return False
    try:
        with av.open(path) as container:
            return container.metadata.get("comment") == MADE_HERE
    except (OSError, ValueError):
        return False
