"""A page in the browser: drop a video, watch it being absorbed, talk about it, keep the memory.

Everything goes through `VideoMemory`; the page only shows it. It runs on this machine and, unless told otherwise, is
reached from this machine alone.
"""

import queue
import re
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gradio as gr
import pandas as pd

from .data.synthetic import make_story
from .modeling.video_memory import VideoMemory
from .processing.video_processing_video_ma2mba import VideoMa2mbaVideoProcessor
from .serving.client import RemoteMemory

NUM_THUMBNAILS = 12
SECONDS_BETWEEN_UPDATES = 0.2
EXAMPLE_QUESTIONS = ["What colour was the circle?", "Which shape came last of all?"]
_TIME = re.compile(r"(\d+):([0-5]\d)|(\d+(?:\.\d+)?)\s*(?:s\b|sec)")


class Page:
    """The page and what stands behind its buttons.

    Args:
        model, processor: of all visitors.
        memories: folder of saved memories; names on the page are folders in it.
        example: offer a synthetic video to begin with, which the tiny model knows about.
        server: that watches, answers and keeps the memories, by their ids; `model` and `memories` are then not used.
    """

    def __init__(self, model: Any, processor: Any, memories: Path, example: bool, server: Any = None):
        self.model, self.processor, self.memories, self.example = model, processor, memories, example
        self.server = server

    def build(self) -> gr.Blocks:
        with gr.Blocks(title="Video-Ma²mba") as page:
            memory, thumbnails = gr.State(), gr.State([])
            gr.Markdown("# Video-Ma²mba\nWatch a video once, whole, and ask about it for as long as you like.")
            with gr.Row():
                with gr.Column():
                    video = gr.Video(label="Video", sources=["upload"], height=280, elem_id="video")
                    fps = gr.Slider(0.1, 4.0, value=1.0, step=0.1, label="frames per second")
                    with gr.Row():
                        watch = gr.Button("Watch", variant="primary", elem_id="watch")
                        example = gr.Button("Take the example", elem_id="example", visible=self.example)
                    status = gr.Markdown("Nothing watched yet.", elem_id="status")
                    chart = gr.LinePlot(
                        pd.DataFrame({"frames": [0], "MiB": [0.0]}), x="frames", y="MiB", height=180,
                        title="memory of the video, which does not grow with it",
                    )  # fmt: skip
                with gr.Column():
                    talk = gr.Chatbot(label="Talk", elem_id="talk", height=360)
                    question = gr.Textbox(label="Question", elem_id="question", placeholder=EXAMPLE_QUESTIONS[0])
                    ask = gr.Button("Ask", elem_id="ask")
                    with gr.Row():
                        name = gr.Textbox(label="Name of the memory", elem_id="name", placeholder="my-video")
                        save = gr.Button("Save", elem_id="save")
                        load = gr.Button("Load", elem_id="load")
            line = gr.Gallery(label="Time line", columns=NUM_THUMBNAILS, height=160, elem_id="timeline")

            watched = [memory, thumbnails, status, chart, line, talk]
            watch.click(self.watch, [video, fps], watched)
            example.click(self.make_example, None, video)
            for event in (ask.click, question.submit):
                event(self.ask, [memory, thumbnails, question, talk], [talk, question, line])
            save.click(self.save, [memory, name], status)
            load.click(self.load, name, watched)
        return page

    # --- what the buttons do -----------------------------------------------------------------------------------------

    def make_example(self) -> str:
        """A minute of coloured shapes; returns its file."""
        return str(make_story(seed=7, duration_s=60).render(Path(tempfile.mkdtemp()) / "story.mp4"))

    def watch(self, video: str | None, fps: float) -> Iterator[tuple]:
        """Absorb a video; yields the page's parts as it goes."""
        if not video:
            raise gr.Error("Drop a video first, or take the example.")
        memory: Any = RemoteMemory.nothing(self.server) if self.server else VideoMemory(self.model, self.processor)
        pictures: list = []
        moves: queue.Queue = queue.Queue()
        begin = time.perf_counter()

        def work() -> None:
            try:
                memory.watch(video, fps, progress=lambda done, expected: moves.put((done, expected)))
                moves.put(None)
            except Exception as error:
                moves.put(error)

        threading.Thread(target=work, daemon=True).start()
        points, shown = [(0, memory.num_bytes)], 0.0
        while (move := moves.get()) is not None:
            if isinstance(move, Exception):
                raise gr.Error(str(move))
            done, expected = move
            points.append((done, memory.num_bytes))
            if time.perf_counter() - shown > SECONDS_BETWEEN_UPDATES:
                shown = time.perf_counter()
                text = f"Watching: {done} of {expected} frames, {done / (shown - begin):.0f} frames per second."
                yield None, [], text, _chart(points), [], []
        pictures = self.thumbnails(video, memory)
        seconds = time.perf_counter() - begin
        text = f"Watched in {seconds:.1f} s: {memory}."
        yield memory, pictures, text, _chart(points), _captioned(pictures), []

    def thumbnails(self, video: str, memory: VideoMemory) -> list[tuple[float, Any]]:
        """Some pictures, spread over the video, with their times in seconds."""
        video_processor = VideoMa2mbaVideoProcessor() if self.server else self.processor.video_processor
        frames = video_processor.open_video(video, max_frames=NUM_THUMBNAILS)
        return [(frame.timestamp_s, frame.pixels) for frame in frames]

    def ask(self, memory: VideoMemory | None, pictures: list, question: str, talk: list) -> Iterator[tuple]:
        """Answer from the memory; yields the talk as the answer comes."""
        if memory is None:
            raise gr.Error("There is no memory yet: watch a video, or load a memory.")
        if not question.strip():
            raise gr.Error("Type a question first.")
        talk = [*talk, {"role": "user", "content": question}, {"role": "assistant", "content": ""}]
        try:
            for piece in memory.chat(question, stream=True, max_new_tokens=128):
                talk[-1]["content"] += piece
                yield talk, "", gr.skip()
        except ValueError as error:
            raise gr.Error(str(error)) from error
        yield talk, "", _captioned(nearest(pictures, f"{question} {talk[-1]['content']}"))

    def save(self, memory: VideoMemory | None, name: str) -> str:
        if memory is None:
            raise gr.Error("There is no memory to save yet.")
        try:
            memory.save_pretrained(name if self.server else self.folder(name))
        except (ValueError, OSError) as error:
            raise gr.Error(str(error)) from error
        return f"Saved as {name}: {memory}."

    def load(self, name: str) -> tuple:
        try:
            if self.server:
                memory: Any = RemoteMemory(self.server, self.server.wait(name.strip()))
            else:
                memory = VideoMemory.from_pretrained(self.folder(name), self.model, self.processor)
        except (ValueError, OSError) as error:
            raise gr.Error(str(error)) from error
        talk = [{"role": turn["role"], "content": turn["content"]} for turn in memory.dialogue]
        points = [(0, memory.num_bytes), (memory.num_frames, memory.num_bytes)]
        return memory, [], f"Loaded {name}: {memory}.", _chart(points), [], talk

    def folder(self, name: str) -> Path:
        """Where a memory of that name lies: in the folder of memories, and nowhere else."""
        if not re.fullmatch(r"[\w-][\w. -]{0,63}", name.strip()):
            raise ValueError("Give the memory a name of letters, digits, blanks and dashes.")
        self.memories.mkdir(parents=True, exist_ok=True)
        return self.memories / name.strip()


def nearest(pictures: list[tuple[float, Any]], text: str) -> list[tuple[float, Any]]:
    """The pictures, and where a text speaks of a time, first those three that are nearest to it."""
    match = _TIME.search(text)
    if match is None:
        return pictures
    wanted = 60 * int(match[1]) + int(match[2]) if match[1] else float(match[3])
    near = sorted(pictures, key=lambda picture: abs(picture[0] - wanted))[:3]
    return [*near, *(picture for picture in pictures if all(picture is not other for other in near))]


def _chart(points: list[tuple[int, int]]) -> pd.DataFrame:
    return pd.DataFrame({"frames": [done for done, _ in points], "MiB": [size / 2**20 for _, size in points]})


def _captioned(pictures: list[tuple[float, Any]]) -> list[tuple[Any, str]]:
    return [(pixels, f"{int(time_s // 60)}:{int(time_s % 60):02d}") for time_s, pixels in pictures]
