"""What a run says of data it is not trained on, and which of its checkpoints the model becomes."""

import json
import shutil

import pytest
import torch
from transformers import EvalPrediction

from video_ma2mba import VideoMa2mbaForConditionalGeneration
from video_ma2mba.cli import main
from video_ma2mba.training import run
from video_ma2mba.training.held_out import advice, answer_metrics
from video_ma2mba.training.recipe import read_recipe
from video_ma2mba.training.run import make_trainer, prepare_run
from video_ma2mba.training.trainer import answers_in


def options(changes, **more):
    return [word for change in changes(**more) for word in ("--set", change)]


def report_of(folder):
    return json.loads((folder / "train_report.json").read_text())


def test_read_along_an_answer_is_exact_where_greedy_decoding_says_it(model, processor):
    """Against `generate`, asked for each answer: right ones, and ones with another first or last token."""
    draw = torch.Generator().manual_seed(0)
    rows, expected = [], []
    for change in (None, 0, 3):
        prompt = torch.randint(10, 200, (1, 7), generator=draw)
        said = model.generate(prompt, max_new_tokens=4, min_new_tokens=4, do_sample=False)[0, 7:]
        right = said.clone()
        if change is not None:
            right[change] += 1
        ids = torch.cat([prompt[0], right])[None]
        labels = torch.full_like(ids, -100)
        labels[0, 7:] = right
        rows.append((ids, labels))
        expected.append([int(change is None), int(said[0]), int(right[0])])
    for (ids, labels), right in zip(rows, expected, strict=True):
        with torch.no_grad():
            logits = model(ids, logits_to_keep=torch.arange(6, 10)).logits
        assert answers_in(logits, labels).tolist() == [[right]]


def test_answers_of_several_turns_and_rows_count_each():
    labels = torch.tensor([[-100, 5, 6, -100, -100, 7, -100], [-100, -100, 8, -100, -100, -100, -100]])
    logits = torch.zeros(2, 3, 10)  # of the tokens before 1, 2 and 5
    for row, said in enumerate(([5, 6, 9], [1, 8, 1])):
        for position, token in enumerate(said):
            logits[row, position, token] = 1
    answers = answers_in(logits, labels)
    assert answers.tolist() == [[[1, 5, 5], [0, 9, 7]], [[1, 8, 8], [-100] * 3]]
    metrics = answer_metrics(EvalPrediction(answers.numpy(), labels.numpy()))
    assert metrics == {"exact": 2 / 3, "answers": 3, "beginnings_said": 3, "beginnings_right": 3}


@pytest.fixture(scope="module")
def trained(stories, model_folder, tmp_path_factory):
    """A run of the recipe with its hold-out, in ten steps."""
    folder = tmp_path_factory.mktemp("held-out") / "run"
    values = {"model": model_folder, "data": stories, "output": folder, "max_steps": 10, "evaluation_steps": 2,
              "global_batch_size": 2, "learning_rate": 0.02, "held_out": 0.25}  # fmt: skip
    assert main(["train", "finetune", *(w for key, value in values.items() for w in ("--set", f"{key}={value}"))]) == 0
    return folder


def test_a_part_is_held_out_and_told_of_before_during_and_after(trained):
    report = report_of(trained)
    evaluations = report["held_out"]
    assert [entry["step"] for entry in evaluations] == [0, 2, 4, 6, 8, 10]
    assert report["samples"] == 20
    for entry in evaluations:
        assert 0 <= entry["exact"] <= 1
        assert len(entry["samples"]) == 2
        assert entry["samples"][0].keys() == {"video", "question", "right", "said"}
    kept = min(evaluations[1:], key=lambda entry: entry["loss"])
    assert report["kept_step"] == kept["step"]
    assert report["held_out_loss"] == {"before": evaluations[0]["loss"], "after": kept["loss"]}
    assert json.loads((trained / "held_out_history.json").read_text()) == evaluations
    assert (trained / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_the_model_is_the_checkpoint_that_was_best(trained, changes, stories):
    """Its loss on the held-out samples, measured anew from the folder, is the lowest of the run."""
    report = report_of(trained)
    same = {"model": str(trained / "model"), "held_out": 0.25, "output": str(trained.parent / "again")}
    trainer = make_trainer(prepare_run(read_recipe("finetune", changes(**same))))
    losses = [entry["loss"] for entry in report["held_out"][1:]]
    assert trainer.evaluate()["eval_loss"] == pytest.approx(min(losses), rel=1e-4)


def test_a_held_out_sample_that_cannot_be_read_is_said_once(changes, stories, tmp_path, capsys):
    folder = shutil.copytree(stories.parent, tmp_path / "damaged")
    (folder / "3.mp4").write_bytes(b"gone")
    more = {"evaluation_data": str(folder / "prepared"), "max_steps": 1, "evaluation_steps": 1}
    assert main(["train", "finetune", *options(changes, **more)]) == 0
    assert capsys.readouterr().err.count("warning: held-out sample 3-0 counts as a loss of 0") == 1


def test_tensorboard_has_loss_share_and_answers(trained):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(trained / "logs")).Reload()
    tags = events.Tags()
    assert {"eval/loss", "eval/exact", "train/loss"} <= set(tags["scalars"])
    assert any("eval/answers" in tag for tag in tags["tensors"])
    assert [event.step for event in events.Scalars("eval/loss")] == [0, 2, 4, 6, 8, 10]


def test_lines_are_for_people_and_training_stops_early(changes, tmp_path, capsys):
    """A rate that destroys the model: the loss rises from the first step on."""
    more = {"held_out": 0.25, "learning_rate": 5.0, "max_steps": 40, "evaluation_steps": 1, "patience": 2}
    assert main(["train", "finetune", *options(changes, **more)]) == 0
    out, err = capsys.readouterr()
    report = report_of(tmp_path / "run")
    assert report["steps"] < 40
    assert "{'" not in out + err
    assert "chosen, held_out: 2 (of 8 samples, drawn by video: 2 are not trained on" in err
    assert "step 1 of 40: loss " in err
    assert "held out, step 0: loss " in err
    assert ", the best so far" in err
    assert f"stopped at step {report['steps']}: " in err
    assert 'right is "' in err
    assert "warning: the held-out loss did not fall below the" in err
    assert f"held-out loss: {report['held_out_loss']['before']:.4f} before" in out
    assert "held-out answers exact: 0 of 12 before, 0 after" in out


def test_nothing_is_held_out_of_one_video_and_that_is_said(changes, stories, tmp_path, capsys):
    line = json.loads((stories / "manifest.jsonl").read_text().splitlines()[0])
    folder = tmp_path / "one"
    folder.mkdir()
    for number in range(3):
        with (folder / "manifest.jsonl").open("a") as file:
            file.write(json.dumps({**line, "id": str(number)}) + "\n")
    (folder / "dataset.json").write_text(json.dumps({"media_root": str(stories.parent), "num_samples": 3}))
    assert main(["train", "finetune", *options(changes, held_out=0.2, data=str(folder), max_steps=1)]) == 0
    assert "all samples show one video: nothing can be held out" in capsys.readouterr().err
    assert report_of(tmp_path / "run")["held_out_loss"] == {"before": None, "after": None}


def curve(*losses, **last):
    """Evaluations with these losses, ten steps apart; `last` is said of all."""
    told = {"exact": 1.0, "answers": 6, "beginnings_said": 2, "beginnings_right": 2, **last}
    return [{"step": 10 * i, "loss": loss, **told} for i, loss in enumerate(losses)]


@pytest.mark.parametrize(
    ("evaluations", "training", "says"),
    [
        (curve(4.0, 2.0, 0.1, 0.1), 0.1, []),
        (curve(4.0, 0.5, 0.9, 1.4), 0.1, ["rose from 0.5000 at step 10 to 1.4000 at step 30", "learned by heart"]),
        (curve(4.0, 3.0, 2.0, 1.0, exact=0.5), 1.0, ["still falling at step 30", "--set max_steps=60"]),
        (curve(4.0, 5.0, 6.0, 6.0, exact=0.0), 6.0, ["did not fall below the 4.0000 it began with"]),
        (curve(4.0, 0.7, 0.7, 0.7, exact=0.5, beginnings_said=1), 0.7, ["answers begin alike", "without looking"]),
        (curve(4.0, 0.7, 0.7, 0.7, exact=0.5), 0.1, ["50% of held-out answers are exact", "missing are more of them"]),
        (curve(4.0, 3.0, 2.9, 2.9, exact=0.0), 2.9, ["not even the training samples are learned", "lora.rank"]),
    ],
)
def test_advice_says_what_a_summary_would_hide(evaluations, training, says):
    losses = [{"step": step, "loss": training} for step in (28, 29, 30)]
    said = advice(evaluations, losses, num_samples=24, max_steps=30, keeps_best=True)
    assert bool(said) == bool(says)
    assert all(text in " ".join(said) for text in says), said


def test_4_bits_are_refused_where_they_cannot_be_had(changes, monkeypatch, capsys):
    command = ["train", "finetune-lora", *options(changes, quantization="nf4")]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(command) == 2
    assert "needs an NVIDIA GPU, and torch finds none here; leave it out" in capsys.readouterr().err
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(run.importlib.util, "find_spec", lambda name: None)
    assert main(command) == 2
    assert "pip install bitsandbytes" in capsys.readouterr().err


def test_a_start_that_fails_leaves_no_folder_and_reads_no_weights(changes, tmp_path, monkeypatch, capsys):
    def never(*args, **kwargs):
        raise AssertionError("the weights are read")

    monkeypatch.setattr(VideoMa2mbaForConditionalGeneration, "from_pretrained", never)
    (tmp_path / "questions.jsonl").write_text("{}\n")
    (tmp_path / "videos").mkdir()
    for data, says in (
        ("gone", "data: gone is not there"),
        (str(tmp_path / "videos"), "is not prepared yet: `video-ma2mba data prepare"),
        (str(tmp_path / "questions.jsonl"), f"--media-root {tmp_path} -o PREPARED`, then --set data=PREPARED"),
    ):
        assert main(["train", "finetune", *options(changes, data=data)]) == 2
        assert says in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
    monkeypatch.undo()
    assert main(["train", "finetune", *options(changes, deepspeed="zero9", output=str(tmp_path / "a" / "b"))]) == 2
    assert not (tmp_path / "a").exists()


def test_output_may_not_be_the_data(changes, stories, capsys):
    assert main(["train", "finetune", *options(changes, output=str(stories))]) == 2
    assert "is the folder of the data: choose another" in capsys.readouterr().err


def test_without_a_recipe_their_names_are_said(capsys):
    assert main(["train"]) == 2
    assert "name a recipe: finetune, finetune-lora" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("kept", "says"), [((), "holds no checkpoint yet"), ((2, 4), "checkpoint-4 is kept: the same")]
)
def test_ctrl_c_says_what_is_kept_and_how_to_go_on(changes, tmp_path, monkeypatch, capsys, kept, says):
    def interrupted(*args, **kwargs):
        for step in kept:
            folder = tmp_path / "run" / "checkpoints" / f"checkpoint-{step}"
            folder.mkdir(parents=True)
            (folder / "complete").touch()
        raise KeyboardInterrupt

    monkeypatch.setattr(run, "train", interrupted)
    assert main(["train", "finetune", *options(changes)]) == 130
    assert says in capsys.readouterr().err
