"""Every engine under every way of checkpointing trains what one process trains."""

import json

import pytest

from .cells import cover, is_exact, measured, modes, must_be_equal
from .engines import ENGINES
from .launch import launch

SLICE = ("zero3", "fsdp2", "sequence 2")


@pytest.mark.parametrize(
    "engine", [pytest.param(name, marks=[pytest.mark.slice] if name in SLICE else []) for name in ENGINES]
)
def test_losses_gradients_and_weights_are_those_of_one_process(engine):
    cells = measured(cover(engine))
    assert [cell["mode"] for cell in cells] == modes(engine)
    assert [cell for cell in cells if not is_exact(cell)] == []
    assert max(cell["peak_mib"] for cell in cells) < 2000  # nothing that is gathered or kept stays behind
    assert [cell for cell in cells if must_be_equal(cell) and not cell["to_the_bit"]] == []


@pytest.mark.parametrize(("engine", "name"), [("zero3", "ZeRO-3"), ("sequence 2", "sequence parallel")])
def test_a_horizon_is_refused_by_name_where_it_could_not_be_exact(engine, name):
    cell = {"engine": engine, "mode": "horizon", "trains": "all", "accumulated": 1}
    done = launch("tests.distributed.engines", json.dumps([cell]))
    assert done.returncode != 0
    assert "ValueError: gradient_horizon" in done.stderr
    assert name in done.stderr


def test_a_head_of_its_own_is_gathered_too():
    """Not tied to the embeddings, it is a unit that nobody calls."""
    (cell,) = measured([{"engine": "fsdp2", "mode": "layer_major", "trains": "all", "accumulated": 1, "tie": False}])
    assert is_exact(cell)
