"""``reproduce``: runs a table of the paper by its name."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace

from krony.errors import KronyError
from krony.reproduce import counting, norms, trained
from krony.reproduce.lines import Outcome, mean_of
from krony.reproduce.options import TableOptions
from krony.reproduce.verdict import judged

TARGETS: dict[str, Callable[[TableOptions], Outcome]] = {
    "table1": counting.table1,
    "table2": counting.table2,
    "table3": counting.table3,
    "table4": norms.table4,
    "table5": trained.table5,
    "table6": trained.table6,
    "table7": trained.table7,
    "table8": trained.table8,
    "table9": trained.table9,
    "figure1": trained.figure1,
}
TRAINED = [name for name, target in TARGETS.items() if target.__module__ == trained.__name__]


def reproduce(target: str, options: TableOptions) -> Outcome:
    """Runs what a table of the paper needs, and sets the results beside the paper's figures, with a verdict.

    Args:
        target: ``table1`` to ``table9``, or ``figure1``.
        options: the model, the text, the budget.

    Raises:
        KronyError: an unknown target, several seeds for one that doesn't train, or weights or text that this machine
            can't get; the sentence names them.

    Examples:
        >>> outcome = reproduce("table2", TableOptions())
        >>> outcome.lines[0].row, outcome.lines[0].paper
        ('256x64', 68.2)
    """
    if target not in TARGETS:
        raise KronyError(f"reproduce {target!r} is unknown: it is one of {', '.join(TARGETS)}")
    if options.seeds > 1 and target not in TRAINED:
        raise KronyError(f"--seeds works with {', '.join(TRAINED)}, which train, and this is {target}: leave it out")
    start = time.perf_counter()
    seeds = range(options.seed, options.seed + options.seeds)
    if options.dry_run and options.seeds > 1:
        options.say(f"What follows is for one seed, and there are {options.seeds}.")
    outcome = mean_of([TARGETS[target](replace(options, seed=s)) for s in (seeds[:1] if options.dry_run else seeds)])
    verdict = judged(outcome, options) if outcome.lines else None
    return replace(outcome, verdict=verdict, seconds=time.perf_counter() - start)
