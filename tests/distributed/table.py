"""Print the table of `examples/distributed/README.md`: `.venv-distributed/bin/python -m tests.distributed.table --all`.

Arguments: `--all` for every combination instead of a cover of all pairs; names of engines for those alone. A row is one
engine and one way of checkpointing: the worst over what trains and how many batches are accumulated.
"""

import sys

from .cells import all_cells, cover, is_exact, measured, modes, num_processes
from .engines import ENGINES

HEADER = """\
| engine | checkpointing | gradients | one process | weights | one process | exact | to the bit |
| --- | --- | --- | --- | --- | --- | --- | --- |"""


def rows(engine, cells):
    """The lines of one engine."""
    for mode in modes(engine):
        of_mode = [cell for cell in cells if cell["mode"] == mode]
        if not of_mode:
            continue
        numbers = [f"{max(cell[key][i] for cell in of_mode):.1e}" for i in (1, 2) for key in ("error", "own")]
        exact = f"{sum(map(is_exact, of_mode))} of {len(of_mode)}"
        equal = [f"{cell['trains']} {cell['accumulated']}" for cell in of_mode if cell["to_the_bit"]]
        yield f"| {' | '.join([engine, mode, *numbers, exact, ', '.join(equal)])} |"


def main(arguments):
    cells = all_cells if "--all" in arguments else cover
    print(HEADER, flush=True)
    asked, bad = [name for name in ENGINES if name in arguments] or ENGINES, 0
    for processes in (2, 4):  # started once for all their engines, which are measured by the same runs of one process
        engines = [engine for engine in asked if num_processes(engine) == processes]
        wanted = [cell for engine in engines for cell in cells(engine)]
        found, said = measured(wanted, timeout_s=7200) if engines else ([], "")
        if len(found) < len(wanted):
            print(said, file=sys.stderr)
        for engine in engines:
            print("\n".join(rows(engine, [cell for cell in found if cell["engine"] == engine])), flush=True)
        bad += sum(not is_exact(cell) for cell in found) + len(wanted) - len(found)
    return bad


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
