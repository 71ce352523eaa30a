"""What a recipe leaves open, and the table of its keys."""

import dataclasses
import re

import pytest

from video_ma2mba.cli import main
from video_ma2mba.training.choices import MIN_STEPS, choose, keeps_best
from video_ma2mba.training.recipe import JoiningOptions, Lora, Recipe, read_recipe, recipe_keys

REQUIRED = ["model=m", "data=d", "output=o"]
HERE = {"hidden_size": 128, "num_samples": 24, "is_held_out": True, "on_gpu": False, "devices_here": 10**6}


def chosen(name, *changes, **here):
    return choose(read_recipe(name, [*REQUIRED, *changes]), **{**HERE, **here})


def test_few_samples_are_passed_over_often_enough():
    recipe, made = chosen("finetune")
    assert recipe.max_steps == MIN_STEPS
    assert "3 passes over 24 samples in batches of 8 would be 9, too few" in str(made[0])
    assert chosen("finetune", num_samples=8000)[0].max_steps == 3000
    assert chosen("finetune", "max_steps=7")[0].max_steps == 7
    assert chosen("finetune", "max_steps=0")[0].max_steps == 0  # by num_epochs


def test_the_rate_is_the_papers_at_its_width_and_falls_with_it():
    full, _ = chosen("finetune", hidden_size=2560)
    assert full.learning_rate == pytest.approx(4e-5, rel=0.05)
    assert full.vision_learning_rate == pytest.approx(4e-6, rel=0.05)
    assert chosen("finetune")[0].learning_rate == pytest.approx(20 * full.learning_rate)
    lora, made = chosen("finetune-lora", hidden_size=2560)
    assert lora.learning_rate == pytest.approx(10 * full.learning_rate)
    assert lora.vision_learning_rate is None  # nothing of the tower moves
    assert all(re.fullmatch(r"\w+: \S+ \(.+\)", str(choice)) for choice in made)
    assert chosen("finetune", "learning_rate=1e-3")[0].vision_learning_rate == pytest.approx(1e-4)


def test_dtype_and_workers_follow_the_machine():
    assert (chosen("finetune-lora")[0].dtype, chosen("finetune-lora")[0].num_workers) == ("float32", 1)
    assert chosen("finetune-lora", on_gpu=True)[0].dtype == "bfloat16"
    assert chosen("finetune", on_gpu=True)[0].dtype == "float32"
    assert chosen("finetune", "num_workers=3")[0].num_workers == 3


def test_evaluations_and_checkpoints_go_together():
    recipe, _ = chosen("finetune", "max_steps=60")
    assert (recipe.evaluation_steps, recipe.save_steps, recipe.logging_steps) == (6, 6, 3)
    assert chosen("finetune", "save_steps=20")[0].evaluation_steps == 20
    assert chosen("finetune", "evaluation_steps=25")[0].save_steps == 25
    assert chosen("finetune", is_held_out=False)[0].evaluation_steps == 0
    assert keeps_best(recipe, True)
    assert not keeps_best(recipe, False)
    with pytest.raises(ValueError, match="save_steps 5 must be a multiple of evaluation_steps 2"):
        keeps_best(chosen("finetune", "save_steps=5", "evaluation_steps=2")[0], True)


def test_the_papers_stages_leave_nothing_open_and_hold_nothing_out():
    for name in ("3.1b-stage1", "3.1b-stage2", "long"):
        recipe = read_recipe(name, REQUIRED)
        same, made = choose(recipe, **HERE)
        assert [choice.key for choice in made] in (["num_workers"], ["vision_learning_rate", "num_workers"])
        assert (same.held_out, same.keep_best, same.patience, same.evaluation_steps) == (0, False, 0, 0)


def test_every_key_has_a_meaning_and_a_default_as_in_the_code(capsys):
    keys = {key.name: key for key in recipe_keys()}
    for cls, prefix in ((Recipe, ""), (Lora, "lora."), (JoiningOptions, "joining.")):
        for field in dataclasses.fields(cls):
            assert keys[prefix + field.name].meaning.endswith("."), field.name
    assert keys["model"].default == ""
    assert keys["lora.rank"].default == "16"
    assert keys["vision_learning_rate"].kind == "number or null"
    assert main(["train", "--keys"]) == 0
    printed = capsys.readouterr().out
    lines = {line.split()[0]: line for line in printed.splitlines()}
    assert list(lines) == list(keys)
    assert lines["seed"].endswith("of what is held out, and of dropout. (whole number; default 0)")
    assert lines["model"].endswith("(text; must be given)")


@pytest.mark.parametrize(
    ("name", "change", "says"),
    [
        ("finetune_lora", "seed=1", "finetune_lora: no such recipe. Did you mean finetune-lora?"),
        ("3.1b_stage2", "seed=1", "Did you mean 3.1b-stage2?"),
        ("finetune", "modle=m", "--set modle=m: unknown key 'modle'; did you mean 'model'?"),
        ("finetune-lora", "lora.rnak=8", "--set lora.rnak=8: unknown key 'lora.rnak'; did you mean 'lora.rank'?"),
        ("finetune-lora", "lora={rnak: 8}", "--set lora={rnak: 8}: unknown key 'lora.rnak'"),
        ("finetune", "xyz=1", "unknown key 'xyz'; `train --keys` lists them all"),
        ("finetune", "seed=soon", "--set seed=soon: seed must be int"),
        ("finetune", "held_out=1", "held_out must lie in [0, 1)"),
        ("finetune", "patience=-1", "patience must not be negative"),
        ("finetune", "streaming=true", "max_steps must be given"),
        ("finetune", "quantization=int4", "quantization must be nf4 or null"),
        ("finetune", "quantization=nf4", "weights in 4 bits cannot move; train adapters alone"),
    ],
)
def test_what_was_mistyped_is_named_with_what_was_meant(name, change, says):
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - the text is looked at below
        read_recipe(name, [*REQUIRED, change])
    assert says in str(caught.value)
    assert ".yaml" not in str(caught.value).replace("a .yaml file", "")


def test_no_part_can_be_held_out_of_a_stream():
    with pytest.raises(ValueError, match="let held_out be 0, or name evaluation_data"):
        read_recipe("finetune", [*REQUIRED, "streaming=true", "max_steps=3"])
