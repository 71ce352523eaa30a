"""Runs of the command: counts, samples that fail, losses that are no number, checkpoints, two processes."""

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainingArguments

from video_ma2mba import VideoMa2mbaForConditionalGeneration
from video_ma2mba.cli import main
from video_ma2mba.data.collator import VideoChatCollator
from video_ma2mba.data.manifest import load_manifest
from video_ma2mba.data.prepare import prepare
from video_ma2mba.training.recipe import read_recipe
from video_ma2mba.training.run import make_trainer, prepare_run
from video_ma2mba.training.trainer import NonFiniteLoss, VideoMa2mbaTrainer, last_checkpoint

from ..forked import run_killed, run_well


def command(changes, *more):
    return ["train", "finetune", *(word for change in changes for word in ("--set", change)), *more]


def report_of(folder):
    return json.loads((folder / "train_report.json").read_text())


def losses_of(folder):
    return [entry["loss"] for entry in report_of(folder)["losses"]]


def weights_of(folder):
    return load_file(folder / "model" / "model.safetensors")


def test_a_run_trains_everything_and_leaves_a_model_a_report_and_a_picture(changes, stories, tmp_path, model_folder):
    assert main(command(changes(max_steps=12, evaluation_data=str(stories), learning_rate=1e-2))) == 0
    report = report_of(tmp_path / "run")
    assert report["samples"] == 12 * 4
    assert (report["skipped_samples"], report["steps"], report["global_batch_size"]) == (0, 12, 4)
    assert report["tokens"] > report["supervised_tokens"] > 0
    assert report["held_out_loss"]["after"] < 0.9 * report["held_out_loss"]["before"]
    before = VideoMa2mbaForConditionalGeneration.from_pretrained(model_folder).state_dict()
    after = VideoMa2mbaForConditionalGeneration.from_pretrained(tmp_path / "run" / "model").state_dict()
    still = [name for name in before if torch.equal(before[name], after[name])]
    assert not still
    assert (tmp_path / "run" / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert list((tmp_path / "run" / "logs").glob("events.*"))
    assert {path.name for path in (tmp_path / "run" / "model").iterdir()} >= {"config.json", "processor_config.json"}
    state = json.loads(next((tmp_path / "run" / "checkpoints").glob("*/trainer_state.json")).read_text())
    entry = next(entry for entry in state["log_history"] if "loss" in entry)  # after the held-out loss of step 0
    assert {"tokens_per_s", "samples_per_s", "supervised_part"} <= entry.keys()


def test_what_is_frozen_does_not_move(changes, tmp_path, model_folder):
    assert main(command(changes(trains=["multi_modal_projector"]))) == 0
    before = VideoMa2mbaForConditionalGeneration.from_pretrained(model_folder).state_dict()
    after = VideoMa2mbaForConditionalGeneration.from_pretrained(tmp_path / "run" / "model").state_dict()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved == {name for name in before if "multi_modal_projector" in name}


@pytest.fixture
def damaged(stories, tmp_path):
    """The stories, one video of which has become unreadable since they were prepared."""
    shutil.copytree(stories.parent, tmp_path / "damaged")
    (tmp_path / "damaged" / "3.mp4").write_bytes(b"gone")
    return tmp_path / "damaged" / "prepared"


def test_a_sample_that_cannot_be_read_is_skipped_counted_and_said(changes, damaged, tmp_path, capsys):
    assert main(command(changes(data=str(damaged), max_steps=0, num_epochs=2))) == 0
    report = report_of(tmp_path / "run")
    assert (report["samples"], report["skipped_samples"]) == (14, 2)
    skipped = (tmp_path / "run" / "checkpoints" / "skipped_samples.jsonl").read_text().splitlines()
    assert [json.loads(line)["videos"] for line in skipped] == [["3.mp4"], ["3.mp4"]]
    printed = capsys.readouterr()
    assert "warning: sample 3-0 is left out: " in printed.out + printed.err
    assert "14 samples, 2 left out" in printed.out


def test_strict_stops_at_it(changes, damaged, capsys):
    assert main(command(changes(data=str(damaged), max_steps=8), "--strict")) == 2
    assert "sample 3-0 (3.mp4): " in capsys.readouterr().err


def test_a_loss_that_is_no_number_stops_with_the_batch_saved(changes, tmp_path):
    prepared = prepare_run(read_recipe("finetune", changes()))
    with torch.no_grad():
        prepared.model.model.language_model.norm_f.weight.fill_(float("nan"))
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    with pytest.raises(NonFiniteLoss, match=r"the loss is nan at step 0; the batch is in .*safetensors"):
        make_trainer(prepared).train()
    (file,) = (tmp_path / "run" / "checkpoints").glob("non_finite_*.safetensors")
    assert {"input_ids", "labels", "pixel_values_videos"} <= load_file(file).keys()
    assert json.loads(file.with_suffix(".json").read_text())[0]["videos"]


def test_an_error_names_the_samples_of_its_batch(changes, monkeypatch):
    trainer = make_trainer(prepare_run(read_recipe("finetune", changes())))

    def fail(*args, **kwargs):
        raise RuntimeError("out of luck")

    monkeypatch.setattr(trainer.model, "forward", fail)
    with pytest.raises(RuntimeError) as caught:
        trainer.train()
    assert "step 0, samples: " in caught.value.__notes__[0]
    assert ".mp4)" in caught.value.__notes__[0]


def test_output_that_holds_checkpoints_is_not_overwritten(changes, capsys):
    assert main(command(changes(save_steps=2))) == 0
    assert main(command(changes(save_steps=2))) == 2
    assert "go on with --resume" in capsys.readouterr().err


def test_resume_after_a_kill_within_a_save_equals_the_uninterrupted_run(changes, stories, tmp_path):
    more = {"max_steps": 9, "save_steps": 3, "evaluation_steps": 3, "evaluation_data": str(stories)}
    more["global_batch_size"] = 2
    whole, cut = (changes(output=str(tmp_path / name), **more) for name in ("whole", "cut"))
    run_well(command(whole))
    save = "video_ma2mba.training.trainer:VideoMa2mbaTrainer._save_optimizer_and_scheduler"
    run_killed(command(cut), save, after=1)
    half_written = tmp_path / "cut" / "checkpoints" / "checkpoint-6"
    assert (half_written / "model.safetensors").is_file()
    assert not (tmp_path / "cut" / "model").exists()
    run_well(command(cut, "--resume"))
    expected, got = weights_of(tmp_path / "whole"), weights_of(tmp_path / "cut")
    assert all(torch.equal(expected[name], got[name]) for name in expected)
    assert losses_of(tmp_path / "cut") == losses_of(tmp_path / "whole")
    one, other = report_of(tmp_path / "whole"), report_of(tmp_path / "cut")
    for name in ("samples", "tokens", "supervised_tokens", "held_out_loss", "steps"):
        assert one[name] == other[name], name


def test_a_checkpoint_that_is_not_whole_is_removed(tmp_path):
    for step, whole in ((5, True), (10, True), (15, False)):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        if whole:
            (folder / "complete").touch()
    assert last_checkpoint(tmp_path) == tmp_path / "checkpoint-10"
    assert not (tmp_path / "checkpoint-15").exists()


def test_two_processes_equal_one(changes, stories, tmp_path):
    for count, name in enumerate(("one", "two"), start=1):
        # with nothing to go on from, --resume begins
        more = {"output": str(tmp_path / name), "evaluation_data": str(stories)}
        run_well(command(changes(**more), "--resume"), count)
    one, two = report_of(tmp_path / "one"), report_of(tmp_path / "two")
    assert (one["devices"], two["devices"]) == (1, 2)
    assert one["samples"] == two["samples"] == 16
    assert one["tokens"] == two["tokens"]
    assert two["held_out_loss"] == pytest.approx(one["held_out_loss"], rel=1e-4)
    assert losses_of(tmp_path / "two") == pytest.approx(losses_of(tmp_path / "one"), rel=1e-4)


def test_two_processes_go_on_where_one_has_only_text_or_only_bad_samples(changes, damaged, tmp_path):
    """Processes wait for each other's gradients: one must not leave any out."""
    lines = (damaged / "manifest.jsonl").read_text().splitlines()
    bad = json.loads(lines[3])
    text = {"role": "user", "content": [{"type": "text", "text": "Hello?"}]}
    answer = {"role": "assistant", "content": [{"type": "text", "text": "Yes."}]}
    only_text = {"id": "t", "messages": [text, answer], "watched_s": 0.0, "num_images": 0, "num_characters": 10}
    rows = [json.loads(lines[0]), bad, only_text, json.loads(lines[1])]
    (damaged / "manifest.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = changes(data=str(damaged), max_steps=3, global_batch_size=2, gradient_checkpointing=None)
    run_well(command(options), 2)
    report = report_of(tmp_path / "run")
    assert report["samples"] + report["skipped_samples"] == 6
    assert report["skipped_samples"] >= 1


@pytest.mark.usefixtures("ending_streams")
@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_stream_is_gone_on_with_exactly_and_what_was_trained_is_not_decoded_again(
    changes, stories, tmp_path, monkeypatch, num_workers
):
    """Through more than one pass over the rows, and by processes that read some of the files each."""
    shards = tmp_path / "shards"
    prepare(stories.parent / "source.jsonl", stories.parent, shards, parquet=True, rows_per_file=2)
    more = {"data": [str(shards)], "streaming": True, "max_steps": 6, "save_steps": 4, "num_workers": num_workers}
    more["global_batch_size"] = 2  # twelve samples of eight rows
    whole, cut = (changes(output=str(tmp_path / name), **more) for name in ("whole", "cut"))
    assert main(command(whole)) == 0
    assert report_of(tmp_path / "whole")["samples"] == 6 * 2
    (tmp_path / "cut").mkdir()
    shutil.copytree(tmp_path / "whole" / "checkpoints", tmp_path / "cut" / "checkpoints")
    shutil.rmtree(tmp_path / "cut" / "checkpoints" / "checkpoint-6")
    collate, log = VideoChatCollator.__call__, tmp_path / "decoded"

    def noted(self, rows):
        with log.open("a") as file:
            file.write("x")
        return collate(self, rows)

    monkeypatch.setattr(VideoChatCollator, "__call__", noted)
    assert main(command(cut, "--resume")) == 0
    assert losses_of(tmp_path / "cut") == losses_of(tmp_path / "whole")
    expected, got = weights_of(tmp_path / "whole"), weights_of(tmp_path / "cut")
    assert all(torch.equal(expected[name], got[name]) for name in expected)
    assert 2 * 2 <= len(log.read_text()) < 6 * 2  # some are made ahead


def test_of_several_streams_each_row_is_drawn_as_often(changes, stories, tmp_path):
    """Whatever their lengths, and for as long as one asks; no more processes decode than have files of their own."""
    lines = (stories.parent / "source.jsonl").read_text().splitlines()
    folders = []
    for name, first, last in (("few", 0, 8), ("many", 8, len(lines))):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines[first:last]) + "\n")
        folders.append(str(tmp_path / name))
        prepare(tmp_path / f"{name}.jsonl", stories.parent, tmp_path / name)
    more = {"evaluation_data": folders, "streaming": True, "num_workers": 3}
    prepared = prepare_run(read_recipe("finetune", changes(data=folders, **more)))
    assert len(prepared.evaluation_data) == sum(len(load_manifest(folder)) for folder in folders)  # that has an end
    rows = [row["id"] for row in prepared.train_data.take(800)]
    counts = {name: rows.count(name) for name in set(rows)}
    assert counts.keys() == {row["id"] for folder in folders for row in load_manifest(folder)}
    assert max(counts.values()) < 1.5 * min(counts.values())
    assert make_trainer(prepared).args.dataloader_num_workers == 1


def test_the_stock_trainer_takes_the_same_data(model_folder, stories, tmp_path):
    from transformers import Trainer

    from video_ma2mba import VideoMa2mbaProcessor

    model = VideoMa2mbaForConditionalGeneration.from_pretrained(model_folder)
    collator = VideoChatCollator(VideoMa2mbaProcessor.from_pretrained(model_folder))
    arguments = TrainingArguments(
        str(tmp_path), max_steps=3, per_device_train_batch_size=2, use_cpu=True, remove_unused_columns=False,
        report_to="none", save_strategy="no", logging_steps=1,
    )  # fmt: skip
    trainer = Trainer(model, arguments, collator, load_manifest(stories))
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 3
    assert losses[-1] < losses[0]


def test_the_shipped_configurations_for_many_devices_are_taken(changes, monkeypatch):
    from accelerate import FullyShardedDataParallelPlugin

    from video_ma2mba.training.engines import DISTRIBUTED, find_distributed

    zero = json.loads(Path(find_distributed("zero1")).read_text())
    assert zero["zero_optimization"]["stage"] == 1
    sharded = json.loads(Path(find_distributed("fsdp2")).read_text())
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=sharded["fsdp_version"], auto_wrap_policy=sharded["auto_wrap_policy"],
        transformer_cls_names_to_wrap=sharded["transformer_layer_cls_to_wrap"],
        reshard_after_forward=sharded["reshard_after_forward"], state_dict_type=sharded["state_dict_type"],
    )  # fmt: skip
    plugin.set_auto_wrap_policy(prepare_run(read_recipe("finetune", changes())).model)
    assert plugin.auto_wrap_policy is not None  # it knows the class of the blocks
    assert sorted(path.stem for path in DISTRIBUTED.glob("*.json")) == [
        "fsdp2", "hsdp", "zero1", "zero2", "zero3",
    ]  # fmt: skip
    with pytest.raises(ValueError, match=r"no such configuration; shipped are fsdp2, hsdp, zero1, zero2, zero3"):
        find_distributed("zero9")


def test_without_matplotlib_there_is_no_picture(changes, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert main(command(changes(max_steps=1))) == 0
    assert "no picture of the loss: pip install matplotlib" in capsys.readouterr().err
    assert not (tmp_path / "run" / "loss.png").exists()


def test_a_run_that_logs_no_loss_draws_none(changes, tmp_path):
    assert main(command(changes(max_steps=1, logging_steps=5))) == 0
    assert losses_of(tmp_path / "run") == []
    assert not (tmp_path / "run" / "loss.png").exists()


@pytest.mark.parametrize("name", ["deepspeed", "fsdp_config"])
def test_an_unknown_configuration_for_many_devices_is_refused(changes, name):
    with pytest.raises(ValueError, match="zero9: no such configuration"):
        make_trainer(prepare_run(read_recipe("finetune", changes(**{name: "zero9"}))))


def test_a_data_set_without_a_sample_is_refused(changes, tmp_path):
    (tmp_path / "source.jsonl").write_text(json.dumps({"id": "x", "messages": []}))
    prepare(tmp_path / "source.jsonl", tmp_path, tmp_path / "nothing", name="messages")
    with pytest.raises(ValueError, match="there is not one sample"):
        prepare_run(read_recipe("finetune", changes(data=str(tmp_path / "nothing"))))


def test_the_trainer_alone_takes_a_list_and_an_optimizer(changes, tmp_path, capsys):
    trainer = make_trainer(prepare_run(read_recipe("finetune", changes())))
    rows = [trainer.train_dataset[i] for i in range(4)]
    rows[0]["media_root"] = str(tmp_path / "gone")
    optimizer = torch.optim.SGD(trainer.model.parameters(), lr=0.1)
    schedule = torch.optim.lr_scheduler.ConstantLR(optimizer)
    (tmp_path / "checkpoints").mkdir()
    alone = VideoMa2mbaTrainer(
        trainer.model, TrainingArguments(
            str(tmp_path / "checkpoints"), max_steps=1, use_cpu=True, remove_unused_columns=False, report_to="none",
            save_strategy="no", disable_tqdm=True, per_device_train_batch_size=4,
        ), trainer.data_collator, rows, optimizers=(optimizer, schedule),
    )  # fmt: skip
    assert alone.create_optimizer() is optimizer
    alone.train()
    assert sum(entry.get("samples", 0) for entry in alone.state.log_history) == 3
    assert f"warning: sample {rows[0]['id']} is left out" in capsys.readouterr().out
