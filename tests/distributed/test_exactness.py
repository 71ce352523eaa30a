"""Every engine under every way of checkpointing trains what one process trains."""

import functools

import pytest

from .cells import cover, is_exact, measured, must_be_equal, num_processes, refused, untied
from .engines import ENGINES

SLICE = ("zero3", "fsdp2", "sequence 2")


def of(engine):
    return pytest.param(engine, marks=[pytest.mark.slice] * (engine in SLICE))


@pytest.fixture(scope="module")
def cells_of(request):
    """What was measured of an engine. The processes, two or four, start once for all engines that are run."""
    items = [item for item in request.session.items if item.path == request.path]
    asked = dict.fromkeys(item.callspec.params["engine"] for item in items)

    @functools.cache
    def launched(processes):
        return measured([cell for engine in asked if num_processes(engine) == processes for cell in cells(engine)])

    def cells(engine):
        return [*cover(engine), *refused(engine), *untied(engine)]

    def found(engine):
        everything, said = launched(num_processes(engine))
        mine = [cell for cell in everything if cell["engine"] == engine]
        assert len(mine) == len(cells(engine)), said
        return mine

    return found


@pytest.mark.parametrize("engine", [of(engine) for engine in ENGINES])
def test_losses_gradients_and_weights_are_those_of_one_process(cells_of, engine):
    cells = [cell for cell in cells_of(engine) if "refused" not in cell]
    assert [cell["mode"] for cell in cells] == [cell["mode"] for cell in (*cover(engine), *untied(engine))]
    assert [cell for cell in cells if not is_exact(cell)] == []
    assert max(cell["peak_mib"] for cell in cells) < 2000  # nothing that is gathered or kept stays behind
    assert [cell for cell in cells if must_be_equal(cell) and not cell["to_the_bit"]] == []


@pytest.mark.parametrize("engine", [of(engine) for engine in ENGINES if refused(engine)])
def test_a_horizon_is_refused_by_name_where_it_could_not_be_exact(cells_of, engine):
    (cell,) = (cell for cell in cells_of(engine) if cell["mode"] == "horizon")
    assert cell["refused"].startswith("gradient_horizon")
    assert ("ZeRO-3" if engine == "zero3" else "sequence parallel") in cell["refused"]
