"""Which cells of engine x checkpointing x what trains x accumulation are run, and what each must be."""

import json

from .engines import ENGINES, MODES, TRAINS
from .launch import fork, lines

FOUR = ("hsdp", "sequence 4", "sequence 2, fsdp2")
# Two processes and one batch or span each: the sum of two numbers, whoever adds them, is one process's to the bit.
SAME_ORDER = ("ddp", "zero1", "zero2", "zero3", "fsdp2", "fsdp2, one group", "sequence 2")


def num_processes(engine):
    return 4 if engine in FOUR else 2


def modes(engine):
    """All but the horizon, which is refused where a video is shared, and under ZeRO-3."""
    refused = engine == "zero3" or engine.startswith("sequence")
    return [mode for mode in MODES if not (mode == "horizon" and refused)]


def cover(engine):
    """A cell of an engine per mode; over all engines every mode, and both numbers, meet all that trains.

    One cell of each engine accumulates: three times the batches, here and in what they are measured by.
    """
    turn, chosen = list(ENGINES).index(engine), modes(engine)
    return [
        {"engine": engine, "mode": mode, "trains": TRAINS[(i + 2 * turn) % 3],
         "accumulated": 3 if i == (7 - turn) % len(chosen) else 1}
        for i, mode in enumerate(chosen)
    ]  # fmt: skip


def all_cells(engine):
    return [
        {"engine": engine, "mode": mode, "trains": trains, "accumulated": accumulated}
        for mode in modes(engine)
        for trains in ("all", "lora")
        for accumulated in (1, 3)
    ]


def measured(cells, timeout_s=3600):
    """What `engines` found for cells of as many processes, as far as it came, and what it said."""
    done = fork(
        "tests.distributed.engines", json.dumps(cells), processes=num_processes(cells[0]["engine"]), timeout_s=timeout_s
    )
    return lines(done, "CELL"), done.stderr[-4000:]


def refused(engine):
    """The cell that an engine must refuse by name, if there is one."""
    return [{"engine": engine, "mode": "horizon", "trains": "all", "accumulated": 1}] * ("horizon" not in modes(engine))


def untied(engine):
    """A head of its own, not tied to the embeddings, is a unit that nobody calls, and must be gathered too."""
    cell = {"engine": engine, "mode": "layer_major", "trains": "all", "accumulated": 1, "tie": False}
    return [cell] * (engine in ("zero3", "fsdp2"))


def is_exact(cell):
    """Losses, gradients and weights as near to float64 as one process comes, up to a factor of two.

    None is asked to be nearer than float32 rounds.
    """
    return all(error <= 2 * max(own, 2**-24) for own, error in zip(cell["own"], cell["error"], strict=True))


def must_be_equal(cell):
    return cell["engine"] in SAME_ORDER and cell["accumulated"] == 1
