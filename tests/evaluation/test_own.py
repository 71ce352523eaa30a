"""One's own questions: read as training reads them, compared as texts or letters; two runs side by side."""

import json

import pytest

from video_ma2mba.cli import main
from video_ma2mba.data.llava import plain
from video_ma2mba.data.records import Problem
from video_ma2mba.evaluation.compare import compare
from video_ma2mba.evaluation.questions import Question, own_answer, plain_text
from video_ma2mba.evaluation.tasks import TASKS, read_questions

from .conftest import write

OPTIONS = ["red", "blue", "green"]


def asked(tmp_path, *rows):
    """What the task makes of lines of a file."""
    write(tmp_path / "questions.jsonl", rows)
    return list(read_questions(TASKS["own"], str(tmp_path / "questions.jsonl")))


@pytest.mark.parametrize("answer", ["blue", "B", "b.", 1, "1"])
def test_with_options_it_asks_as_training_does(tmp_path, answer):
    line = {"video": "a.mp4", "question": "Which colour?", "answer": answer, "options": OPTIONS}
    (question,) = asked(tmp_path, line)
    write(tmp_path / "train.jsonl", [{**line, "answer": str(answer)}])
    (record,) = plain(tmp_path / "train.jsonl")
    assert record.messages[0]["content"][-1]["text"] == question.prompt
    assert record.messages[1]["content"][0]["text"] == f"{question.answer}." == "B."
    assert record.kind == "multiple_choice"
    assert all(option in question.prompt for option in OPTIONS)


def test_ids_categories_and_questions_without_an_answer(tmp_path):
    line = {"video": "a.mp4", "question": "What is it?"}
    free, open_, named = asked(
        tmp_path, {**line, "answer": " A Circle. ", "category": "shape", "difficulty": 2}, line, {**line, "id": "q9"}
    )
    assert (free.prompt, free.answer, free.dimension) == ("What is it?", "a circle", "match")
    assert free.groups == {"category": "shape", "difficulty": "2", "kind": "free answer"}
    assert (open_.answer, open_.id, named.id) == ("", "questions.jsonl:2", "q9")


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ({"question": "?"}, "'video' must be a text"),
        ({"video": "a.mp4"}, "'question' must be a text"),
        ({"video": "a.mp4", "question": "?", "options": ["one"]}, "'options' must be a list of two to 26"),
        ({"video": "a.mp4", "question": "?", "options": OPTIONS, "answer": "pink"}, "none of the options red, blue"),
        ({"video": "a.mp4", "question": "?", "options": ["a", "a"], "answer": "a"}, "two options are 'a'"),
        ({"image": "a.png", "video": "a.mp4", "question": "?"}, "image: a question is about one whole video"),
        ({"video": "a.mp4", "question": "?", "start_s": 0, "end_s": 2}, "start_s, end_s: a question is about one"),
    ],
)
def test_a_line_that_is_no_question_says_why(tmp_path, line, says):
    (problem,) = asked(tmp_path, line)
    assert isinstance(problem, Problem)
    assert problem.where == "questions.jsonl:1"
    assert says in problem.message


def test_answers_are_read_as_letters_words_or_texts():
    choice = Question("1", "", (), "", "B", tuple(OPTIONS))
    said = ("B.", "(B)", "blue", "Blue.", "the answer is B")
    assert [own_answer(text, choice) for text in said] == ["B"] * len(said)
    assert own_answer("purple", choice) == ""
    free = Question("2", "", (), "", "a circle")
    assert own_answer(' "A  circle." ', free) == "a circle"
    assert plain_text("No!") == "no"


@pytest.fixture
def own(tmp_path, clips, model_folder, says, capsys):
    """A function that evaluates a model whose answers are given; returns (exit code, stdout, stderr)."""
    clips(tmp_path / "mine", "0.mp4", "1.mp4", "2.mp4")
    rows = [{"video": f"{i}.mp4", "question": f"Is {i} red?", "answer": "yes", "category": "colour"} for i in range(3)]
    rows.append({"video": "0.mp4", "question": "Which?", "answer": "blue", "options": OPTIONS, "category": "choice"})
    rows.append({"video": "1.mp4", "question": "Anything else?"})
    write(tmp_path / "mine" / "questions.jsonl", rows)

    def run(output, table, *more):
        says({**table, "Anything": "nothing"})
        data = tmp_path / "mine" / "questions.jsonl"
        command = ["eval", model_folder, "--task", "own", "--data", str(data), "-o", str(tmp_path / output)]
        return main([*command, *more]), *capsys.readouterr()

    return run


def test_a_file_is_evaluated_and_two_runs_stand_side_by_side(own, tmp_path, capsys):
    code, out, err = own("before", {"Is 0": "yes", "Is 1": "no", "Is 2": "no", "Which": "A"})
    assert code == 0
    assert "accuracy, all: 0.250" in out
    assert "accuracy, category: colour: 0.333" in out
    assert "accuracy, kind: multiple choice: 0.000" in out
    assert "1 questions have no answer to compare with" in err
    report = json.loads((tmp_path / "before" / "report.json").read_text())
    assert (report["num_questions"], report["num_without_answer_key"]) == (5, 1)
    assert own("after", {"Is 0": "no", "Is 1": "Yes.", "Is 2": "yes", "Which": "B."})[0] == 0
    assert main(["eval", "compare", str(tmp_path / "before"), str(tmp_path / "after"), "-o", str(tmp_path / "c")]) == 0
    page = capsys.readouterr().out
    assert "| all | 0.250 | 0.750 | +0.500 |" in page
    assert "| category: choice | 0.000 | 1.000 | +1.000 |" in page
    assert "Right now, and wrong before: 3" in page
    assert '"Is 0 red?": "yes", then "no"; right is "yes"' in page
    assert (tmp_path / "c" / "comparison.md").read_text() == page
    # the interval, by a plain loop over videos: differences of questions about one video fall together
    differences = {"0.mp4": [-1.0, 1.0], "1.mp4": [1.0], "2.mp4": [1.0]}
    mean = sum(map(sum, differences.values())) / 4
    variance = 3 / 2 * sum(sum(one - mean for one in part) ** 2 for part in differences.values()) / 16
    row = json.loads((tmp_path / "c" / "comparison.json").read_text())["scores"]["all"]
    assert row["high"] - row["mean"] == pytest.approx(1.959964 * variance**0.5)


def test_compare_refuses_what_cannot_be_compared(own, tmp_path, capsys):
    own("one", {"Is": "yes", "Which": "B"})
    for folders, says in (
        ([tmp_path / "one"], "name the outputs of two runs"),
        ([tmp_path / "one", tmp_path / "gone"], "no finished output"),
    ):
        assert main(["eval", "compare", *map(str, folders)]) == 2
        assert says in capsys.readouterr().err
    lines = (tmp_path / "one" / "answers.jsonl").read_text().splitlines()
    other = tmp_path / "other"
    other.mkdir()
    for name in ("report.json", "questions.jsonl"):
        (other / name).write_bytes((tmp_path / "one" / name).read_bytes())
    (other / "answers.jsonl").write_text("\n".join(line for line in lines if "Anything" in line))
    with pytest.raises(ValueError, match="share no question"):
        compare(tmp_path / "one", other)


def test_a_judge_is_asked_about_free_answers_besides(own, tmp_path, monkeypatch):
    from video_ma2mba.cli import evaluate
    from video_ma2mba.evaluation.judge import StringJudge

    monkeypatch.setattr(evaluate, "_judge", lambda args, output: StringJudge())
    code, out, _ = own("judged", {"Is": "yes yes", "Which": "B"}, "--judge", "http://127.0.0.1:9")
    assert code == 0
    assert "accuracy, kind: free answer: 0.000" in out
    assert "judged accuracy, all: 0.000" in out
    assert "judged score, all: 3.333" in out
    report = json.loads((tmp_path / "judged" / "report.json").read_text())
    assert report["judged_score"]["all"]["num_questions"] == 3
    assert "| judged accuracy |" in (tmp_path / "judged" / "report.md").read_text()


@pytest.mark.parametrize(
    ("task", "data", "says"),
    [
        ("own", [], "--task own: name the file of your questions with --data"),
        ("own", ["--data", "gone.jsonl"], "--data gone.jsonl: there is no such folder or file"),
        ("own", ["--data", "FILE.txt"], "questions are read from .json, .jsonl, .csv, .parquet files"),
        ("videomme", ["--data", "FILE.csv"], "not one question can be asked"),
    ],
)
def test_data_that_are_none_leave_no_output(tmp_path, monkeypatch, capsys, model_folder, task, data, says):
    monkeypatch.chdir(tmp_path)
    for name in ("FILE.txt", "FILE.csv"):
        (tmp_path / name).write_text("a,b\n1,2\n")
    assert main(["eval", model_folder, "--task", task, *data, "-o", "out/run"]) == 2
    assert says in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_questions_file_of_a_benchmark_may_be_named_itself(tmp_path):
    row = {"video_id": "a", "video_path": "a.mp4", "question": "Which?", "id": "a_0", "candidates": ["x", "y"]}
    write(tmp_path / "some.json", [{**row, "correct_choice": 0}])
    (question,) = read_questions(TASKS["longvideobench"], str(tmp_path / "some.json"))
    assert question.answer == "A"
