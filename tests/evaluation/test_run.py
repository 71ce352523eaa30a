"""The loop: each video once, answers kept, interrupted runs gone on with, likelihoods, the command."""

import json
from collections import Counter

import pytest
import torch

from video_ma2mba import VideoMa2mbaForConditionalGeneration, VideoMa2mbaProcessor, VideoMemory
from video_ma2mba.cli import main
from video_ma2mba.data.synthetic import make_story
from video_ma2mba.evaluation.report import make_report
from video_ma2mba.evaluation.run import ANSWERS, answer_all, count_reasons, find
from video_ma2mba.evaluation.tasks import TASKS, read_questions
from video_ma2mba.loading import TINY_MODEL
from video_ma2mba.processing.video_source import VideoSource

from ..forked import run_killed
from .conftest import write
from .test_tasks import mme

TASK = TASKS["videomme"]


@pytest.fixture
def benchmark(tmp_path, clips):
    """Three videos and ten questions about each."""
    root = tmp_path / "benchmark"
    clips(root, *(f"data/{name}.mp4" for name in "abc"))
    rows = [mme(f"{name}{i}", name, "short", "ABCD"[i % 4]) for i in range(10) for name in "abc"]
    write(root / "test.jsonl", rows)
    return root


def found_in(root, output, limit=None):
    output.mkdir(exist_ok=True)
    return find(read_questions(TASK, str(root)), root, output, limit)


def test_each_long_video_is_decoded_once_for_ten_questions(tmp_path, monkeypatch):
    """The tiny checkpoint, three videos of three minutes; what decoding opens is counted."""
    root, output = tmp_path / "benchmark", tmp_path / "out"
    for number in range(3):
        (root / "data").mkdir(parents=True, exist_ok=True)
        make_story(seed=number, duration_s=180).render(root / "data" / f"{number}.mp4")
    write(root / "test.jsonl", [mme(f"{v}{i}", str(v), "long", "ABCD"[i % 4]) for i in range(10) for v in range(3)])
    model = VideoMa2mbaForConditionalGeneration.from_pretrained(TINY_MODEL).eval()
    processor = VideoMa2mbaProcessor.from_pretrained(TINY_MODEL)
    found = found_in(root, output)
    decoded = []
    frames_of = VideoSource._frames_of
    monkeypatch.setattr(
        VideoSource,
        "_frames_of",
        lambda self, packet: (frames := frames_of(self, packet), decoded.extend([self.path] * len(frames)))[0],
    )
    answers = answer_all(model, processor, TASK, found, root, output)
    assert [len(questions) for questions in found.by_video.values()] == [10, 10, 10]
    assert len(answers) == 30
    # Four frames a second, each once, and the first one when the file is opened, for its looks. How many of the last
    # second are decoded beyond the last one that is wanted depends on the decoder's threads.
    assert all(720 - 4 < count <= 721 for count in Counter(decoded).values()), Counter(decoded)
    assert len(Counter(decoded)) == 3
    assert {answer.num_frames for answer in answers} == {180}


def test_answers_are_those_of_generate(benchmark, tmp_path, model, processor):
    output = tmp_path / "out"
    found = found_in(benchmark, output, limit=2)
    answers = answer_all(model, processor, TASK, found, benchmark, output)
    for question, answer in zip(found.questions, answers, strict=True):
        content = [{"type": "video", "path": str(benchmark / answer.video)}, {"type": "text", "text": question.prompt}]
        inputs = processor.apply_chat_template(
            [{"role": "user", "content": content}],
            add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt",
        )  # fmt: skip
        ids = model.generate(**inputs, max_new_tokens=16, do_sample=False)[0, inputs["input_ids"].shape[1] :]
        expected = processor.decode(ids, skip_special_tokens=True).strip()
        assert expected.startswith(answer.raw)  # it may have stopped earlier, at a repetition
        assert answer.raw


def test_what_is_damaged_in_an_output_is_done_again(benchmark, tmp_path, model_folder, capsys):
    out = tmp_path / "out"
    command = ["eval", model_folder, "--task", "videomme", "--data", str(benchmark), "--resume", "-o", str(out)]
    assert main(command) == 0
    answers, media = (out / "answers.jsonl").read_text().splitlines(), (out / "media.jsonl").read_text().splitlines()
    damaged = [json.dumps({**json.loads(answers[0]), key: value}) for key, value in (("id", []), ("num_frames", "x"))]
    (out / "answers.jsonl").write_text("\n".join([*damaged, *answers[2:]]))
    looks = [json.dumps({**json.loads(media[-1]), key: value}) for key, value in (("kind", []), ("duration_s", None))]
    (out / "media.jsonl").write_text("\n".join(looks))
    assert main(command) == 0
    assert len((out / "answers.jsonl").read_text().splitlines()) == 30
    capsys.readouterr()
    (out / "settings.json").write_text("[1]")
    assert main(command) == 2
    assert "settings.json: damaged" in capsys.readouterr().err


@pytest.mark.parametrize("torn", [False, True])
def test_a_run_that_was_cut_off_gives_the_same_answers(benchmark, tmp_path, model, processor, torn):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    expected = answer_all(model, processor, TASK, found_in(benchmark, whole), benchmark, whole)
    found = found_in(benchmark, cut)
    lines = (whole / ANSWERS).read_text().splitlines(keepends=True)
    # the second video is half there; the last line may be torn
    (cut / ANSWERS).write_text("".join(lines[:14]) + (lines[14][:25] if torn else lines[14]))
    calls = []
    answers = answer_all(
        model, processor, TASK, found, benchmark, cut, progress=lambda done, total: calls.append((done, total))
    )
    assert [(a.id, a.raw, a.parsed) for a in answers] == [(a.id, a.raw, a.parsed) for a in expected]
    assert answers[:10] == expected[:10]  # those were kept, with their seconds
    assert len((cut / ANSWERS).read_text().splitlines()) == 30
    assert calls[-1] == (30, 30)


def test_a_killed_command_goes_on_to_the_same_report(benchmark, tmp_path, model_folder):
    command = ["eval", model_folder, "--task", "videomme", "--data", str(benchmark), "-o"]
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    run_killed([*command, killed], "video_ma2mba.modeling.video_memory:VideoMemory.watch", after=1)
    assert len((killed / ANSWERS).read_text().splitlines()) == 10  # those about the first video
    assert main([*command, str(whole)]) == 0
    assert main([*command, str(killed)]) == 2  # it would begin anew
    assert main([*command, str(killed), "--resume"]) == 0
    reports = [json.loads((folder / "report.json").read_text()) for folder in (killed, whole)]
    for report in reports:
        del report["watch_s"], report["answer_s"]
    assert reports[0] == reports[1]
    assert (killed / "report.png").read_bytes().startswith(b"\x89PNG")
    assert "| all |" in (killed / "report.md").read_text()


def test_a_video_that_opens_and_cannot_be_read_is_reported(benchmark, tmp_path, model, processor, monkeypatch):
    output = tmp_path / "out"
    found = found_in(benchmark, output)
    watch = VideoMemory.watch

    def watched(self, path, *args, **kwargs):
        if path.name == "b.mp4":
            raise ValueError(f"{path}: no frame of it could be read")
        return watch(self, path, *args, **kwargs)

    monkeypatch.setattr(VideoMemory, "watch", watched)
    answers = answer_all(model, processor, TASK, found, benchmark, output)
    assert [answer.id for answer in answers] == [question.id for question in found.questions]
    assert len(answers) == 20
    assert count_reasons(found.problems) == {"unreadable medium": 10}
    report = make_report(TASK, found, answers, {"model": "m", "frames": "all"})
    assert (report["num_questions"], report["num_problems"]) == (20, 10)


def test_going_on_with_other_settings_is_refused(benchmark, tmp_path, model_folder, capsys):
    command = ["eval", model_folder, "--task", "videomme", "--data", str(benchmark), "-o", str(tmp_path / "out")]
    assert main([*command, "--limit", "1"]) == 0
    assert main([*command, "--limit", "2", "--resume"]) == 2
    assert "other settings (limit)" in capsys.readouterr().err


def test_log_likelihoods_are_those_of_the_whole_input(video, model, processor):
    memory = VideoMemory(model, processor)
    memory.watch(video)
    answers = ["A", "yes", "a longer one"]
    scores = memory.log_likelihoods("What?", answers)
    content = [{"type": "video", "path": video}, {"type": "text", "text": "What?"}]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=True, return_dict=True,
        return_tensors="pt",
    )  # fmt: skip
    for answer, score in zip(answers, scores, strict=True):
        ids = torch.tensor(processor.tokenizer(answer)["input_ids"])
        whole = torch.cat([inputs["input_ids"][0], ids])[None]
        with torch.no_grad():
            logits = model(whole, pixel_values_videos=inputs["pixel_values_videos"]).logits[0].double()
        rows = logits[-len(ids) - 1 : -1].log_softmax(-1)
        assert score.item() == pytest.approx(rows[range(len(ids)), ids].sum().item(), abs=1e-4)
    with pytest.raises(ValueError, match="at least one token"):
        memory.log_likelihoods("What?", ["A", ""])


def test_by_likelihood_takes_the_likeliest_letter(benchmark, tmp_path, model, processor):
    output = tmp_path / "out"
    found = found_in(benchmark, output, limit=3)
    answers = answer_all(model, processor, TASK, found, benchmark, output, by_likelihood=True)
    for question, answer in zip(found.questions, answers, strict=True):
        memory = VideoMemory(model, processor)
        memory.watch(benchmark / answer.video)
        scores = {letter: memory.log_likelihoods(question.prompt, [letter]).item() for letter in "ABCD"}
        assert answer.parsed == max(scores, key=scores.get)
