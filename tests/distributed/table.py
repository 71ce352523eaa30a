"""Print the table of `examples/distributed/README.md`: `.venv-distributed/bin/python -m tests.distributed.table`.

Arguments: `--all` for every combination instead of a cover of all pairs; names of engines for those alone.
"""

import sys

from .cells import all_cells, cover, is_exact, measured
from .engines import ENGINES


def main(arguments):
    cells = all_cells if "--all" in arguments else cover
    engines = [name for name in ENGINES if name in arguments] or list(ENGINES)
    print("| engine | checkpointing | trains | accumulated | gradients | one process | weights | one process | |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- | --- |", flush=True)
    bad = 0
    for engine in engines:
        for cell in measured(cells(engine), timeout_s=7200):
            verdict = "to the bit" if cell["to_the_bit"] else "exact" if is_exact(cell) else "**not exact**"
            bad += not is_exact(cell)
            numbers = [f"{cell[key][i]:.1e}" for i in (1, 2) for key in ("error", "own")]
            words = [engine, cell["mode"], cell["trains"], str(cell["accumulated"]), *numbers, verdict]
            print(f"| {' | '.join(words)} |", flush=True)
    return bad


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
