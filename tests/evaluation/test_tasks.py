"""Every benchmark from its published files to a score that was worked out by hand."""

import csv
import json

import datasets
import pytest

from video_ma2mba.data.records import Problem
from video_ma2mba.evaluation.judge import StringJudge
from video_ma2mba.evaluation.report import make_report, write_report
from video_ma2mba.evaluation.run import answer_all, find
from video_ma2mba.evaluation.tasks import TASKS, read_questions

from .conftest import write


def score(name, root, model, processor, **options):
    task = TASKS[name]
    output = root.with_name(f"{root.name}-output")
    output.mkdir(exist_ok=True)
    found = find(read_questions(task, str(root)), root, output)
    answers = answer_all(model, processor, task, found, root, output, **options)
    judge = None if task.read_answer else StringJudge()
    return make_report(task, found, answers, {"model": "m", "frames": "all"}, judge), found


def mme(number, video, duration, answer="A", **changes):
    row = {
        "video_id": "001", "duration": duration, "domain": "Knowledge", "sub_category": "Astronomy",
        "url": "https://video.example/1", "videoID": video, "question_id": f"001-{number}",
        "task_type": "Counting", "question": f"Question {number}?", "answer": answer,
        "options": ["A. one", "B. two", "C. three", "D. four"],
    }  # fmt: skip
    return {**row, **changes}


def test_video_mme(tmp_path, clips, says, model, processor):
    clips(tmp_path, "data/short.mp4", "data/long.MP4")
    rows = [
        mme(1, "short", "short"), mme(2, "short", "short", "B"), mme(3, "long", "long", "C"),
        mme(4, "gone", "long"), mme(5, "short", "short", "E"), mme(6, "short", "short", options="A. one"),
        mme(7, "../../outside", "short"), mme(1, "short", "short"),
    ]  # fmt: skip
    datasets.Dataset.from_list(rows[:5] + rows[6:]).to_parquet(tmp_path / "videomme" / "test-0.parquet")
    write(tmp_path / "more.jsonl", rows[5:6])
    says({"Question 1": "The best answer is (A).", "Question 2": "C", "Question 3": "C. three"})
    report, found = score("videomme", tmp_path, model, processor)
    assert report["scores"]["all"]["mean"] == pytest.approx(2 / 3)
    assert {k: v["mean"] for k, v in report["scores"]["duration"].items()} == {"short": 0.5, "long": 1.0}
    assert report["scores"]["all"]["num_videos"] == 2
    assert report["scores"]["all"]["low"] is not None
    write_report(report, tmp_path)
    assert (tmp_path / "report.png").read_bytes().startswith(b"\x89PNG")
    assert report["problems"] == {"malformed": 2, "missing medium": 1, "outside the media root": 1, "duplicate": 1}
    assert any("answer 'E' of 4 options" in line for line in report["first_problems"])
    assert any("more.jsonl:1" in line and "'options' must be a list" in line for line in report["first_problems"])
    prompt = found.questions[0].prompt.splitlines()
    assert prompt[1:6] == ["Question 1?", "A. one", "B. two", "C. three", "D. four"]
    assert prompt[6:] == ["", "Answer with the option's letter from the given choices directly."]


def lvb(number, answer, duration_group=15, **changes):
    row = {
        "video_id": "v", "id": f"v_{number}", "video_path": "v.mp4", "subtitle_path": "v.json",
        "question": f"Q{number}?",
        "candidates": ["red", "blue", "green"], "correct_choice": answer, "duration_group": duration_group,
        "question_category": "S2E", "topic_category": "T", "duration": 6.0,
    }  # fmt: skip
    return {**row, **changes}


def test_long_video_bench(tmp_path, clips, says, model, processor):
    clips(tmp_path, "videos/v.mp4")
    by_column = {**lvb(4, 1, 60), "option0": "x", "option1": "y", "option2": "N/A"}
    del by_column["candidates"]
    write(tmp_path / "lvb_val.json", [lvb(1, 0), lvb(2, 2), lvb(3, 7), by_column])
    write(tmp_path / "unrelated.json", [{"nothing": "of this task"}])
    says({"Q1": "A", "Q2": "Answer: B", "Q4": "The Dog."})
    report, found = score("longvideobench", tmp_path, model, processor)
    # right, wrong, and "Dog" is read as D, of two options
    assert report["scores"]["all"]["mean"] == pytest.approx(1 / 3)
    assert report["scores"]["duration_group"]["60"]["mean"] == 0
    assert report["problems"] == {"malformed": 1}
    assert found.questions[2].prompt.splitlines()[1:3] == ["A. x", "B. y"]


def test_long_video_bench_without_its_key_is_answered_but_not_scored(tmp_path, clips, says, model, processor):
    clips(tmp_path, "v.mp4")
    row = lvb(1, 0)
    del row["correct_choice"]
    write(tmp_path / "lvb_test_wo_gt.json", [row])
    says({"Q1": "B"})
    report, _ = score("longvideobench", tmp_path, model, processor)
    assert report["scores"] == {}
    assert report["num_without_answer_key"] == 1
    write_report(report, tmp_path)
    assert not (tmp_path / "report.png").exists()  # there is nothing to draw
    assert json.loads((tmp_path.with_name(f"{tmp_path.name}-output") / "answers.jsonl").read_text())["parsed"] == "B"


def test_mv_bench(tmp_path, clips, says, model, processor):
    clips(tmp_path, "star/Charades_segment/a.mp4", "video/clevrer/video_validation/b.mp4")
    one = {"video": "a.mp4", "question": "What?", "candidates": ["Sit", "Run"], "answer": "Run"}
    write(tmp_path / "json" / "action_sequence.json", [one, {**one, "question": "Not told?", "answer": "Fly"}])
    two = {"video": "b.mp4", "candidates": ["1", "2", "3"], "answer": "3"}
    write(tmp_path / "json" / "moving_count.json", [{**two, "question": "How many?"}, {**two, "question": "Silent?"}])
    says({"What?": "B. Run", "How many?": "a", "Silent?": " "})
    report, found = score("mvbench", tmp_path, model, processor)
    scores = {name: value["mean"] for name, value in report["scores"]["subtask"].items()}
    assert scores == {"action_sequence": 1.0, "moving_count": 0.0}
    assert report["num_left_out_of_score"] == 1  # an empty answer is not counted
    assert report["problems"] == {"malformed": 1}
    assert found.questions[0].prompt == "Question:What?\nOption:\n(A) Sit\n(B) Run\nOnly give the best option.\n"


def test_activitynet_qa_of_the_hub_has_questions_and_answers_in_one_row(monkeypatch):
    row = {"video_name": "a", "question": "is it", "question_id": "1", "answer": "yes", "type": "3"}
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **kwargs: [row])
    (question,) = read_questions(TASKS["activitynetqa"], "lmms-lab/ActivityNetQA")
    assert (question.id, question.answer) == ("1", "yes")


def test_mv_bench_is_not_taken_from_the_hub(monkeypatch):
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **kwargs: [])
    with pytest.raises(ValueError, match="download it and name its folder with --data"):
        list(read_questions(TASKS["mvbench"], "OpenGVLab/MVBench"))


def test_mv_bench_names_a_file_that_is_no_subtask(tmp_path):
    write(tmp_path / "dance.json", [])
    with pytest.raises(ValueError, match="'dance' is no subtask"):
        list(read_questions(TASKS["mvbench"], str(tmp_path)))


def test_next_qa(tmp_path, clips, says, model, processor):
    clips(tmp_path, "1202/4011.mp4", "NExTVideo/5012.mp4")
    rows = [
        ["4011", "512", "640", "480", "why did the dog stop", "3", "2", "CW", "sleep", "eat", "bark", "ball", "called"],
        ["5012", "512", "640", "480", "what is next", "0", "1", "TP", "one", "two", "three", "four", "five"],
        ["5012", "512", "640", "480", "what is it", "five", "2", "DO", "one", "two", "three", "four", "five"],
    ]
    header = [
        "video",
        "frame_count",
        "width",
        "height",
        "question",
        "answer",
        "qid",
        "type",
        "a0",
        "a1",
        "a2",
        "a3",
        "a4",
    ]
    with (tmp_path / "val.csv").open("w", newline="") as file:
        csv.writer(file).writerows([header, *rows])
    write(tmp_path / "map_vid_vidorID.json", {"4011": "1202/4011"})
    says({"why did": "(D) ball", "Why did": "(D) ball", "What is next": "E."})
    report, found = score("nextqa", tmp_path, model, processor)
    assert {k: v["mean"] for k, v in report["scores"]["kind"].items()} == {"causal": 1.0, "temporal": 0.0}
    assert list(report["scores"]["type"]) == ["CW", "TN"]
    assert report["problems"] == {"malformed": 1}
    assert found.questions[0].prompt == "Why did the dog stop?\nA. sleep\nB. eat\nC. bark\nD. ball\nE. called"


def test_activitynet_qa(tmp_path, clips, says, model, processor):
    clips(tmp_path, "v_-a.mp4")
    asked = [{"video_name": "-a", "question": f"is it {i}", "question_id": f"v_-a_{i}"} for i in range(4)]
    answers = (("yes", 3), ("a red car", 5), ("two", 7))
    keys = [{"answer": a, "type": t, "question_id": f"v_-a_{i}"} for i, (a, t) in enumerate(answers)]
    write(tmp_path / "test_q.json", asked)
    write(tmp_path / "test_a.json", keys[::-1])
    says({"it 0": "Yes.", "it 1": "red car", "it 2": "three"})
    report, found = score("activitynetqa", tmp_path, model, processor)
    assert report["accuracy"]["all"]["mean"] == pytest.approx(2 / 3)
    assert report["scores"]["all"]["mean"] == pytest.approx((5 + 5 + 0) / 3)
    assert {k: v["mean"] for k, v in report["scores"]["type"].items()} == {"yes/no": 5, "object": 5, "number": 0}
    assert report["judge"]["published"] is False
    assert "not the published metric" in report["judge"]["name"]
    assert report["problems"] == {"malformed": 1}
    assert "no answer to v_-a_3" in report["first_problems"][0]
    assert found.questions[0].prompt == "Is it 0? Answer the question using a single word or phrase."


def test_video_chatgpt(tmp_path, clips, says, model, processor):
    clips(tmp_path, "Test_Videos/a.mp4")
    row = {"video_name": "a", "answer": "A cat sleeps"}
    write(tmp_path / "Generic" / "test.jsonl", [{**row, "question": "What happens?"}])
    write(tmp_path / "Temporal" / "test.jsonl", [{**row, "question": "In which order?"}, {**row, "question": None}])
    write(
        tmp_path / "Consistency" / "test.jsonl",
        [
            {**row, "question_1": "Who sleeps?", "question_2": "None"},
            {**row, "question_1": "None", "question_2": "Who?"},
        ],
    )
    says({"What happens": "a cat sleeps", "order": "cat runs", "Who sleeps": "cat sleeps", "Who?": "dog sleeps"})
    report, _ = score("videochatgpt", tmp_path, model, processor)
    scores = {name: one["mean"] for name, one in report["scores"]["dimension"].items()}
    # words without articles: F1 of "cat runs" and of "dog sleeps" with "cat sleeps" is one half; the worse counts
    assert scores == {"correctness": 5, "detail": 5, "context": 5, "temporal": 2.5, "consistency": 2.5}
    assert report["num_questions"] == 6
    assert report["scores"]["all"]["num_questions"] == 5
    assert report["problems"] == {"malformed": 1}


def test_rows_of_the_hub(monkeypatch, tmp_path, clips):
    asked = {}

    def load_dataset(name, config, split):
        asked.update(name=name, config=config, split=split)
        return datasets.Dataset.from_list([mme(1, "short", "short")])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    (question,) = read_questions(TASKS["videomme"], "lmms-eval/Video-MME")
    assert asked == {"name": "lmms-eval/Video-MME", "config": "videomme", "split": "test"}
    assert question.where == "lmms-eval/Video-MME, row 1"
    assert not isinstance(question, Problem)


def test_a_folder_without_the_task_says_so(tmp_path):
    with pytest.raises(ValueError, match="no file of longvideobench in it"):
        list(read_questions(TASKS["longvideobench"], str(tmp_path)))
    with pytest.raises(ValueError, match="there is no such folder"):
        list(read_questions(TASKS["videomme"], str(tmp_path / "none")))
