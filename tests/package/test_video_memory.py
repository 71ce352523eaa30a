"""`VideoMemory`: what it answers is what `generate` answers on the whole input, and nothing is lost on the way."""

import copy
import errno
import json

import pytest
import torch
from safetensors import SafetensorError

from video_ma2mba import VideoMa2mbaForConditionalGeneration, VideoMa2mbaProcessor, VideoMemory
from video_ma2mba.data.synthetic import make_story
from video_ma2mba.loading import TINY_MODEL
from video_ma2mba.modeling import video_memory_answers, video_memory_files

from ..forked import said

QUESTIONS = [
    "What colour was the circle?", "Which shape came first of all?", "Which shape came last of all?",
    "Did a red square ever appear?", "Which came first, the red square or the blue cross?",
]  # fmt: skip


@pytest.fixture(scope="module")
def trained():
    """The model of the repository: here a wrong token would be a wrong word."""
    model = VideoMa2mbaForConditionalGeneration.from_pretrained(TINY_MODEL).eval()
    return model, VideoMa2mbaProcessor.from_pretrained(TINY_MODEL)


@pytest.fixture(params=["trained", "random"])
def pair(request):
    if request.param == "trained":
        return request.getfixturevalue("trained")
    return request.getfixturevalue("model"), request.getfixturevalue("processor")


@pytest.fixture
def memory(model, processor, video):
    watched = VideoMemory(model, processor)
    watched.watch(video)
    return watched


def states_file(folder):
    (path,) = folder.glob("*.safetensors")
    return path


def generated(model, processor, frames, messages, new_tokens=8):
    """The new ids of `generate` on a whole chat; `frames` stand before the first question."""
    first, *rest = messages
    content = [{"type": "video", "video": frames}, {"type": "text", "text": first["content"]}]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}, *rest], add_generation_prompt=True, tokenize=True
    )
    return model.generate(**inputs, max_new_tokens=new_tokens)[0, inputs["input_ids"].shape[1] :]


def assert_same_tokens(model, processor, frames, questions, found):
    assert len(found) == len(questions)
    for question, ids in zip(questions, found, strict=True):
        expected = generated(model, processor, frames, [{"role": "user", "content": question}])
        assert len(expected) > 1
        # in a batch, a row that has ended is filled up
        assert ids[: len(expected)].tolist() == expected.tolist()
        assert set(ids[len(expected) :].tolist()) <= {processor.tokenizer.pad_token_id}


@pytest.mark.parametrize("count", [1, 2, 5])
def test_token_for_token(pair, count, video):
    model, processor = pair
    memory = VideoMemory(model, processor)
    memory.watch(video)
    frames = processor.video_processor.load(video).frames
    questions = QUESTIONS[:count]
    assert_same_tokens(model, processor, frames, questions, memory.generate(questions, max_new_tokens=8))
    one_by_one = [memory.generate([question], max_new_tokens=8)[0] for question in questions]
    assert_same_tokens(model, processor, frames, questions, one_by_one)


@pytest.mark.parametrize("seed", [11, 12, 13])
def test_the_trained_model_tells_the_truth(trained, tmp_path, seed):
    """In the two kinds of question in which it is always right."""
    story = make_story(seed=seed, duration_s=60)
    memory = VideoMemory(*trained)
    memory.watch(story.render(tmp_path / "story.mp4"))
    assert memory.ask(["What colour was the circle?", "Which shape came last of all?"]) == [
        story.circle.colour, story.scenes[-1].shape
    ]  # fmt: skip


def test_asking_changes_nothing_and_watching_goes_on(pair, video, tmp_path):
    model, processor = pair
    memory = VideoMemory(model, processor)
    memory.watch(video)
    before = [state.clone() for layer in memory._cache.layers for state in layer]
    memory.ask(QUESTIONS, max_new_tokens=8)
    assert all(
        torch.equal(now, then)
        for now, then in zip((s for layer in memory._cache.layers for s in layer), before, strict=True)
    )
    more = make_story(seed=4, duration_s=7).render(tmp_path / "more.mp4")
    memory.watch(more)
    assert memory.num_frames == 17
    assert memory.timestamps_s == [float(second) for second in range(17)]
    frames = torch.cat([processor.video_processor.load(path).frames for path in (video, more)])
    assert_same_tokens(model, processor, frames, QUESTIONS, memory.generate(QUESTIONS, max_new_tokens=8))


@pytest.mark.parametrize("end_s", [None, 10.0])
def test_where_the_video_has_ended_there_is_nothing_to_go_on_with(model, processor, video, memory, end_s):
    """So a call that was stopped after the last frame can be gone on with; another video from there is refused."""
    question, before = QUESTIONS[:1], memory.num_frames
    answer = memory.ask(question, max_new_tokens=4)
    assert memory.watch(video, start_s=10.0, end_s=end_s)["num_frames"] == 0
    assert (memory.num_frames, memory.ask(question, max_new_tokens=4)) == (before, answer)
    with pytest.raises(ValueError, match=r"must lie after start_s|a start at 10 s lies beyond the end"):
        VideoMemory(model, processor).watch(video, start_s=10.0, end_s=end_s)


def test_frames_pushed_are_frames_watched(model, processor, video, memory):
    loaded = processor.video_processor.load(video)
    pushed = VideoMemory(model, processor)
    pushed.push_frames(loaded.frames[:3])
    pushed.push_frames(loaded.frames[3:].permute(0, 2, 3, 1).numpy())
    assert pushed.timestamps_s == memory.timestamps_s
    assert [one["num_frames"] for one in pushed.sources] == [3, 7]
    for mine, other in zip(pushed._cache.layers, memory._cache.layers, strict=True):
        torch.testing.assert_close(mine.ssm_state, other.ssm_state)


def test_a_memory_outlives_its_process(trained, video, tmp_path):
    model, processor = trained
    memory = VideoMemory(model, processor)
    memory.watch(video)
    memory.chat(QUESTIONS[0], max_new_tokens=8)
    memory.save_pretrained(tmp_path / "memory")
    code = f"""
import json
from video_ma2mba import VideoMa2mbaForConditionalGeneration, VideoMa2mbaProcessor, VideoMemory
model = VideoMa2mbaForConditionalGeneration.from_pretrained({str(TINY_MODEL)!r}).eval()
memory = VideoMemory.from_pretrained(
    {str(tmp_path / "memory")!r}, model, VideoMa2mbaProcessor.from_pretrained({str(TINY_MODEL)!r})
)
ids = [row.tolist() for row in memory.generate({QUESTIONS!r}, max_new_tokens=8)]
print(json.dumps([ids, memory.num_frames, memory.timestamps_s, memory.dialogue, memory.sources]))
"""
    ids, *rest = json.loads(said(code).splitlines()[-1])
    assert ids == [row.tolist() for row in memory.generate(QUESTIONS, max_new_tokens=8)]
    assert rest == [memory.num_frames, memory.timestamps_s, memory.dialogue, memory.sources]


@pytest.mark.parametrize("times_s", [[9.0], [1.0, 1.5, 9.0], [4, 4]])
def test_a_snapshot_with_the_states_of_another_or_of_the_end_is_saved(model, processor, video, tmp_path, times_s):
    memory = VideoMemory(model, processor)
    memory.watch(video, snapshots_s=times_s)
    memory.save_pretrained(tmp_path / "memory")
    again = VideoMemory.from_pretrained(tmp_path / "memory", model, processor)
    assert again.snapshot_times_s == sorted(set(times_s))
    for time_s in times_s:
        for mine, other in zip(memory.at(time_s)._cache.layers, again.at(time_s)._cache.layers, strict=True):
            assert torch.equal(mine.ssm_state, other.ssm_state)
            assert torch.equal(mine.conv_state, other.conv_state)


def test_snapshots_that_cannot_be_are_refused_or_said(model, processor, video):
    memory = VideoMemory(model, processor)
    for wrong in (float("nan"), float("inf"), -1.0):
        with pytest.raises(ValueError, match="snapshots_s must be finite and not below 0"):
            memory.watch(video, snapshots_s=[3.0, wrong])
        assert memory.num_frames == 0
    with pytest.warns(UserWarning, match="no snapshot at 50 s: watched were 0 to 9 s"):
        memory.watch(video, snapshots_s=[3.0, 50])
    with pytest.warns(UserWarning, match="no snapshot at 2 s: watched were 9 to 19 s"):
        memory.watch(video, snapshots_s=[2.0, 3.0, 12])  # 3 s is there already
    assert memory.snapshot_times_s == [3.0, 12.0]


def test_size_does_not_grow_with_the_video(model, processor, tmp_path):
    sizes, files = [], []
    for minutes in (1, 3):
        memory = VideoMemory(model, processor)
        memory.watch(make_story(seed=minutes, duration_s=60 * minutes, size=16).render(tmp_path / f"{minutes}.mp4"))
        memory.save_pretrained(tmp_path / f"memory{minutes}")
        sizes.append(memory.num_bytes)
        files.append(states_file(tmp_path / f"memory{minutes}").stat().st_size)
    assert sizes[0] == sizes[1] > 0
    assert files[1] - files[0] <= 120 * 8 + 16  # a timestamp a frame


def test_chat_is_generate_on_the_whole_chat(trained, video):
    model, processor = trained
    memory = VideoMemory(model, processor)
    memory.watch(video)
    frames = processor.video_processor.load(video).frames
    messages = []
    for question in QUESTIONS[:3]:
        messages.append({"role": "user", "content": question})
        expected = generated(model, processor, frames, messages)
        answer = processor.tokenizer.decode(expected, skip_special_tokens=True).strip()
        assert memory.chat(question, max_new_tokens=8) == answer
        messages.append({"role": "assistant", "content": answer})
    assert memory.dialogue == messages


def test_streamed_text_is_the_answer(memory):
    whole = memory.ask(QUESTIONS[0], max_new_tokens=12)
    assert "".join(memory.ask(QUESTIONS[0], stream=True, max_new_tokens=12)).strip() == whole
    pieces = list(memory.chat(QUESTIONS[0], stream=True, max_new_tokens=12))
    assert "".join(pieces).strip() == whole == memory.dialogue[-1]["content"]
    with pytest.raises(ValueError, match="one question at a time"):
        memory.ask(QUESTIONS, stream=True)
    with pytest.raises(Exception, match="max_new_tokens"):
        list(memory.ask(QUESTIONS[0], stream=True, max_new_tokens=-1))


def test_snapshots(model, processor, video):
    memory = VideoMemory(model, processor)
    memory.watch(video, snapshots_s=[2, 3.5, 5.5, 9])  # 3.5 lies between two calls of the model
    for seconds, num_frames in ((2, 3), (3.5, 4), (5.5, 6), (9, 10)):
        earlier = memory.at(seconds=seconds)
        assert earlier.num_frames == num_frames
        frames = processor.video_processor.load(video).frames[:num_frames]
        assert_same_tokens(model, processor, frames, QUESTIONS[:1], earlier.generate(QUESTIONS[:1], max_new_tokens=8))
    assert memory.num_frames == 10
    with pytest.raises(ValueError, match=r"there are, in seconds: 2, 3\.5, 5\.5, 9"):
        memory.at(minutes=1)
    with pytest.raises(ValueError, match="either in seconds or in minutes"):
        memory.at()


def test_snapshots_are_saved(memory, model, processor, video, tmp_path):
    memory = VideoMemory(model, processor)
    memory.watch(video, snapshots_s=[4])
    memory.save_pretrained(tmp_path / "memory")
    read = VideoMemory.from_pretrained(tmp_path / "memory", model, processor)
    assert read.at(seconds=4).num_frames == 5
    assert read.at(seconds=4).ask(QUESTIONS[0]) == memory.at(seconds=4).ask(QUESTIONS[0])


# --- what goes wrong ---


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_an_interrupted_watch_leaves_the_old_memory(memory, video, error):
    answer, layers = memory.ask(QUESTIONS[0]), memory._cache.layers

    def interrupt(done, expected):
        if done > 4:
            raise error

    with pytest.raises(error):
        memory.watch(video, progress=interrupt)
    assert (memory.num_frames, len(memory.sources), memory._cache.layers) == (10, 1, layers)
    assert memory.ask(QUESTIONS[0]) == answer


@pytest.mark.parametrize("step", ["save_file", "_file_hash", "identity"])
def test_an_interrupted_save_leaves_the_old_folder(memory, model, processor, video, tmp_path, monkeypatch, step):
    memory.save_pretrained(tmp_path / "memory")
    memory.watch(video)

    def full(*args, **kwargs):
        raise OSError("No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(video_memory_files, step, full)
        with pytest.raises(OSError, match="No space left"):
            memory.save_pretrained(tmp_path / "memory")
    assert [path.name for path in tmp_path.iterdir()] == ["memory"]
    assert len(list((tmp_path / "memory").iterdir())) == 2
    assert VideoMemory.from_pretrained(tmp_path / "memory", model, processor).num_frames == 10
    memory.save_pretrained(tmp_path / "memory")
    assert VideoMemory.from_pretrained(tmp_path / "memory", model, processor).num_frames == 20


def test_damaged_and_foreign_memories_are_refused(memory, model, processor, trained, tmp_path):
    def saved(name):
        memory.save_pretrained(tmp_path / name)
        return tmp_path / name

    with pytest.raises(ValueError, match="no video memory there"):
        VideoMemory.from_pretrained(tmp_path / "nothing", model, processor)
    with pytest.raises(ValueError, match="another model"):
        VideoMemory.from_pretrained(saved("one"), *trained)
    folder = saved("two")
    states = states_file(folder)
    states.write_bytes(states.read_bytes()[:-10])
    with pytest.raises(ValueError, match="missing or damaged"):
        VideoMemory.from_pretrained(folder, model, processor)
    described = saved("three") / video_memory_files.CONFIG_NAME
    described.write_text(described.read_text().replace('"format_version": 1', '"format_version": 2'))
    with pytest.raises(ValueError, match="format 2"):
        VideoMemory.from_pretrained(described.parent, model, processor)
    for old, new in (('"num_tokens_of"', '"num_tokens_off"'), ('"num_frames": 1', '"num_frames": 7'), ("}", "")):
        text = (saved("three") / video_memory_files.CONFIG_NAME).read_text()
        assert old in text
        described.write_text(text.replace(old, new))
        with pytest.raises(ValueError, match="damaged"):
            VideoMemory.from_pretrained(described.parent, model, processor)
    trained_on = copy.deepcopy(model)  # further training makes it another model
    with torch.no_grad():
        trained_on.model.language_model.layers[0].mixer.in_proj.weight.add_(1e-3)
    with pytest.raises(ValueError, match="its weights differs"):
        VideoMemory.from_pretrained(tmp_path / "one", trained_on, processor)


@pytest.mark.parametrize(
    ("frames", "timestamps_s", "message"),
    [
        (torch.zeros(2, 3, 28, 28), None, "uint8"),
        (torch.zeros(3, 28, 28, dtype=torch.uint8), None, "four dimensions"),
        (torch.zeros(2, 4, 28, 28, dtype=torch.uint8), None, r"shape .*got \(2, 4, 28, 28\)"),
        (torch.zeros(2, 3, 28, 28, dtype=torch.uint8), [12.0], "1 timestamps for 2 frames"),
        (torch.zeros(2, 3, 28, 28, dtype=torch.uint8), [13.0, 12.0], "must rise"),
        (torch.zeros(2, 3, 28, 28, dtype=torch.uint8), [8.0, 12.0], "must rise, also from the 9 s"),
        (torch.zeros(2, 3, 28, 28, dtype=torch.uint8), [12.0, float("nan")], "must rise"),
    ],
)
def test_frames_that_cannot_be_watched(memory, frames, timestamps_s, message):
    with pytest.raises(ValueError, match=message):
        memory.push_frames(frames, timestamps_s)
    assert memory.num_frames == 10


def test_questions_and_videos_that_are_none(memory, tmp_path):
    for question in ("", "  ", ["What?", ""]):
        with pytest.raises(ValueError, match="is empty"):
            memory.ask(question)
    assert memory.ask([]) == []
    with pytest.raises(ValueError, match="empty"):
        memory.chat(" ")
    with pytest.raises(ValueError, match=r"nothing\.mp4"):
        memory.watch(tmp_path / "nothing.mp4")
    assert memory.num_frames == 10


def test_watching_in_parts_is_watching(model, processor, video, memory):
    parts = VideoMemory(model, processor)
    parts.watch(video, end_s=4.0)
    parts.watch(video, start_s=4.0)
    assert parts.timestamps_s == memory.timestamps_s
    assert parts.sources == memory.sources
    for mine, other in zip(parts._cache.layers, memory._cache.layers, strict=True):
        torch.testing.assert_close(mine.ssm_state, other.ssm_state)
    halves = VideoMemory(model, processor)
    halves.watch(video, 2.0, end_s=3.5)
    halves.watch(video, 2.0, start_s=3.5)
    whole = VideoMemory(model, processor)
    whole.watch(video, 2.0)
    assert halves.timestamps_s == whole.timestamps_s
    assert [source["num_frames"] for source in halves.sources] == [20]


def test_several_videos_as_a_batch(pair, video, tmp_path):
    model, processor = pair
    paths = [video, *(make_story(seed, length).render(tmp_path / f"{seed}.mp4") for seed, length in ((5, 3), (6, 14)))]
    together = VideoMemory.watch_together(model, processor, paths)
    for path, memory in zip(paths, together, strict=True):
        alone = VideoMemory(model, processor)
        alone.watch(path)
        assert (memory.timestamps_s, memory.sources) == (alone.timestamps_s, alone.sources)
        assert memory.num_tokens == alone.num_tokens
        frames = processor.video_processor.load(path).frames
        assert_same_tokens(model, processor, frames, QUESTIONS[:2], memory.generate(QUESTIONS[:2], max_new_tokens=8))


def test_an_endless_stream_ends_with_its_time(model, processor):
    taken = []

    def endless():
        while True:
            taken.append(1)
            yield torch.zeros(3, 40, 30, dtype=torch.uint8)

    memory = VideoMemory(model, processor)
    watched = memory.watch(endless(), 2.0, max_duration_s=5.0)
    assert watched["num_frames"] == memory.num_frames == len(taken) == 10
    assert memory.duration_s == 4.5
    with pytest.raises(ValueError, match="must be positive"):
        memory.watch(endless(), max_duration_s=0)


def test_max_duration_cuts_a_file(model, processor, video):
    memory = VideoMemory(model, processor)
    memory.watch(video, start_s=2.0, max_duration_s=3.0)
    assert memory.num_frames == 3


def test_a_question_has_a_limit(memory, monkeypatch):
    monkeypatch.setattr(video_memory_answers, "MAX_QUESTION_TOKENS", 50)
    memory.ask("Short?", max_new_tokens=2)
    with pytest.raises(ValueError, match=r"question 2 has \d+ tokens, .*at most 50"):
        memory.ask(["Short?", "word " * 50], max_new_tokens=2)


def test_a_stream_of_text_that_is_closed_stops_the_model(memory):
    steps = []

    def count(input_ids, scores, **kwargs):
        steps.append(1)
        return torch.zeros(1, dtype=torch.bool)

    pieces = memory.ask(QUESTIONS[0], stream=True, max_new_tokens=3000, min_new_tokens=2999, stopping_criteria=[count])
    next(pieces)
    pieces.close()
    assert len(steps) < 1000


def test_a_full_disk_leaves_the_old_memory(memory, model, processor, tmp_path, monkeypatch):
    folder = tmp_path / "memory"
    memory.save_pretrained(folder)
    memory.push_frames(torch.zeros(1, 3, 28, 28, dtype=torch.uint8))

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(video_memory_files, "save_file", full)
    with pytest.raises(OSError, match="No space left"):
        memory.save_pretrained(folder)
    assert VideoMemory.from_pretrained(folder, model, processor).num_frames == 10
    assert [path.name for path in tmp_path.iterdir()] == ["memory"]


def test_what_holds_no_frame_is_refused(memory, model, processor):
    with pytest.raises(ValueError, match="no frame of it could be read"):
        memory.watch(iter([]))
    with pytest.raises(ValueError, match="for files; cut the iterator"):
        memory.watch(iter([]), max_frames=3)
    assert memory.num_frames == 10
    memory.push_frames(torch.zeros(0, 3, 28, 28, dtype=torch.uint8))
    assert memory.num_frames == 10
    assert VideoMemory.watch_together(model, processor, []) == []


def test_watching_together_says_how_far_it_is(model, processor, video):
    moves = []
    VideoMemory.watch_together(model, processor, [video, video], progress=lambda *move: moves.append(move))
    assert moves == [(8, 20), (16, 20), (20, 20)]  # four frames of each at a time


def test_a_folder_of_something_else_is_left_alone(memory, tmp_path):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "thesis.txt").write_text("five years")
    with pytest.raises(OSError, match="something other than a video memory"):
        memory.save_pretrained(tmp_path / "thesis")
    assert [path.name for path in (tmp_path / "thesis").iterdir()] == ["thesis.txt"]


def test_an_error_of_the_writer_of_safetensors_is_one_of_the_disk(memory, tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(video_memory_files, "save_file", full)
    with pytest.raises(OSError, match="could not be written: Error while serializing") as caught:
        memory.save_pretrained(tmp_path / "memory")
    assert caught.value.errno == errno.ENOSPC
    assert list(tmp_path.iterdir()) == []


def test_a_description_that_is_no_object_is_damaged(memory, model, processor, tmp_path):
    memory.save_pretrained(tmp_path / "memory")
    (tmp_path / "memory" / video_memory_files.CONFIG_NAME).write_text("[]")
    with pytest.raises(ValueError, match="damaged, not a JSON object"):
        VideoMemory.from_pretrained(tmp_path / "memory", model, processor)
