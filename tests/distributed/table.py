"""Print the table of `examples/distributed/README.md`: `.venv-distributed/bin/python -m tests.distributed.table --all`.

Arguments: `--all` for every combination instead of a cover of all pairs; names of engines for those alone. A row is one
engine and one way of checkpointing: the worst over what trains and how many batches are accumulated.
"""

import sys

from .cells import all_cells, cover, is_exact, measured, modes
from .engines import ENGINES

HEADER = """\
| engine | checkpointing | gradients | one process | weights | one process | exact | to the bit |
| --- | --- | --- | --- | --- | --- | --- | --- |"""


def rows(engine, cells):
    """The lines of one engine."""
    for mode in modes(engine):
        of_mode = [cell for cell in cells if cell["mode"] == mode]
        numbers = [f"{max(cell[key][i] for cell in of_mode):.1e}" for i in (1, 2) for key in ("error", "own")]
        exact = f"{sum(map(is_exact, of_mode))} of {len(of_mode)}"
        equal = [f"{cell['trains']} {cell['accumulated']}" for cell in of_mode if cell["to_the_bit"]]
        yield f"| {' | '.join([engine, mode, *numbers, exact, ', '.join(equal)])} |"


def main(arguments):
    cells = all_cells if "--all" in arguments else cover
    print(HEADER, flush=True)
    bad = 0
    for engine in [name for name in ENGINES if name in arguments] or ENGINES:
        found = measured(cells(engine), timeout_s=7200)
        print("\n".join(rows(engine, found)), flush=True)
        bad += sum(not is_exact(cell) for cell in found)
    return bad


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
