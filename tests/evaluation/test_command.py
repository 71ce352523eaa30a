"""`video-ma2mba eval`: what it refuses, what it warns of, and needles of one's own."""

import json

import numpy as np
import pytest
from PIL import Image

from video_ma2mba.cli import main
from video_ma2mba.data.synthetic import make_story
from video_ma2mba.evaluation.tasks import TASKS, read_questions

from .conftest import write
from .test_tasks import mme


@pytest.fixture
def run(model_folder, tmp_path, capsys):
    """Run the command; returns (exit code, stdout, stderr)."""

    def run_eval(task, *arguments):
        code = main(["eval", model_folder, "--task", task, "-o", str(tmp_path / "out"), *map(str, arguments)])
        return code, *capsys.readouterr()

    return run_eval


@pytest.mark.parametrize("option", ["--limit", "--batch-size", "--frames"])
def test_numbers_below_one(run, option):
    code, _, err = run("videomme", option, "0")
    assert code == 2
    assert err.startswith(f"error: argument {option}: must be a whole number from 1 to ")


def test_questions_of_the_hub_need_the_folder_of_the_videos(run):
    code, _, err = run("videomme", "--data", "owner/name")
    assert code == 2
    assert "name the folder of the videos with --media-root" in err


def test_not_one_question(run, tmp_path):
    write(tmp_path / "data" / "test.jsonl", [mme(1, "gone", "short")])
    code, _, err = run("videomme", "--data", tmp_path / "data")
    assert code == 2
    assert "not one question can be asked, 1 items were left out; the first: test.jsonl:1" in err


def test_without_a_judge_words_are_counted_and_that_is_said(run, clips, tmp_path):
    root = tmp_path / "data"
    clips(root, "v_a.mp4")
    asked = [{"video_name": "a", "question": "is it", "question_id": str(i)} for i in range(2)]
    write(root / "test_q.json", asked)
    write(root / "test_a.json", [{"answer": "yes", "type": 3, "question_id": "0"}])
    code, out, err = run("activitynetqa", "--data", root)
    assert code == 0
    assert "warning: no --judge: words in common are counted, which is not the published metric" in err
    assert "1 items left out: {'malformed': 1}" in err
    assert "accuracy, all: " in out
    assert "Not to be set beside papers." in (tmp_path / "out" / "report.md").read_text()


def test_needles_of_ones_own_in_a_haystack_of_ones_own(run, tmp_path):
    folder = tmp_path / "needles"
    folder.mkdir()
    make_story(seed=0, duration_s=12).render(folder / "haystack.mp4")
    Image.fromarray(np.full((30, 30, 3), 200, np.uint8)).save(folder / "a.png")
    (folder / "needles.jsonl").write_text(json.dumps({"image": "a.png", "question": "What?", "answer": "grey"}))
    code, out, _ = run("niah", "--data", folder, "--minutes", "0.1", "0.2", "--depths", "0.5")
    assert code == 0
    assert "of 2 needles" in out
    rows = json.loads((tmp_path / "out" / "report.json").read_text())["rows"]
    assert [(row["num_frames"], row["num_needles"]) for row in rows] == [(6, 1), (12, 1)]


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (["--haystacks", "0"], "--haystacks: must be a whole number from 1"),
        (["--haystacks", "2", "--data", "folder"], "--haystacks: --data has one haystack"),
        (["--minutes", "0"], "--minutes: must be a number from 0.0166667 to 60000"),
        (["--haystacks", "1001"], "--haystacks: must be a whole number from 1 to 1,000,"),
        (["--minutes", "0.001"], "--minutes: must be a number from 0.0166667"),
        (["--minutes", "5", "1e9"], "--minutes: must be a number from"),
        (["--depths", "1.5"], "--depths: must be a number from 0 to 1"),
        (["--limit", "3", "--by-likelihood"], "--limit, --by-likelihood: not for --task niah"),
    ],
)
def test_haystacks_and_places_that_are_none(run, wrong, said):
    code, _, err = run("niah", *wrong)
    assert code == 2
    assert said in err


def problem_of(task, root):
    (problem,) = read_questions(TASKS[task], str(root))
    return problem.message


def test_rows_that_are_no_questions_of_their_task(tmp_path):
    row = {"id": "1", "video_path": "v.mp4", "question": "?", "correct_choice": 0}
    write(tmp_path / "lvb" / "lvb_val.json", [row])
    assert problem_of("longvideobench", tmp_path / "lvb") == "it has no options"
    for name, line, message in (
        ("open", "v,what,a ball,1,DO", "not the open-ended set"),
        ("nameless", ",what,0,1,CW", "'video' is missing"),
    ):
        (tmp_path / name).mkdir()
        options = "" if name == "open" else ",a0,a1,a2,a3,a4"
        text = f"video,question,answer,qid,type{options}\n{line}{',x' * options.count('a')}\n"
        (tmp_path / name / "val.csv").write_text(text)
        assert message in problem_of("nextqa", tmp_path / name)
    write(tmp_path / "anet" / "test_q.json", [{"video_name": "a", "question": "is it", "question_id": "1"}])
    with pytest.raises(ValueError, match="its answers are not beside it"):
        list(read_questions(TASKS["activitynetqa"], str(tmp_path / "anet")))
