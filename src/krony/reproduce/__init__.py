"""The paper's tables, each by its name: what the paper says, what comes out here, and the difference."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace

from krony.errors import KronyError
from krony.reproduce import counting, norms, trained
from krony.reproduce.lines import Line, Options, Outcome

__all__ = ["TARGETS", "Line", "Options", "Outcome", "reproduce"]

TARGETS: dict[str, Callable[[Options], Outcome]] = {
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


def reproduce(target: str, options: Options) -> Outcome:
    """Runs what a table of the paper needs.

    Raises:
        KronyError: an unknown target, or weights or text that can't be had here: the sentence says which.
    """
    if target not in TARGETS:
        raise KronyError(f"reproduce {target!r} is unknown: it is one of {', '.join(TARGETS)}")
    start = time.perf_counter()
    outcome = TARGETS[target](options)
    return replace(outcome, seconds=time.perf_counter() - start)
