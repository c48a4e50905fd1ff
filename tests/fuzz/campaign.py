"""A run of many cases: drawn from a seed, tried, the failing ones made smaller and kept."""

from __future__ import annotations

import gc
import hashlib
import importlib
import pkgutil
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from random import Random

import torch

import krony
from fuzz import sound as sound_file
from fuzz import trial
from fuzz.cases import Case
from fuzz.kinds import caches, checkpoints, configs, indexes, outs, texts, tokenizers, weights

KINDS: dict[str, Callable[[Random, Path], Case]] = {
    module.__name__.rpartition(".")[2]: module.draw
    for module in (weights, configs, tokenizers, checkpoints, texts, caches, indexes, outs)
}


@dataclass
class Tally:
    """How the cases ended.

    Attributes:
        codes: how many cases ended with each exit code.
        found: the failing cases, and what is wrong with each.
        seconds: processor time of all cases.
        slowest: the most seconds that a case took.
        largest: the most bytes that a case had in memory.
    """

    codes: Counter[int | None] = field(default_factory=Counter)
    found: list[tuple[Case, str]] = field(default_factory=list)
    seconds: float = 0.0
    slowest: float = 0.0
    largest: int = 0

    def __str__(self) -> str:
        ended = ", ".join(f"{count} with {code}" for code, count in sorted(self.codes.items(), key=str))
        return (
            f"{sum(self.codes.values())} cases: {ended}; {len(self.found)} of them wrong; {self.seconds:.0f} s, the "
            f"slowest took {self.slowest:.1f} s, the largest {self.largest / 1e9:.2f} GB"
        )


def sound_files(home: Path) -> Path:
    """A folder with the sound files, and this process ready to be forked."""
    torch.set_num_threads(1)  # a forked process has none of the threads of its parent
    torch.manual_seed(0)
    sound_file.build(home)
    for module in pkgutil.walk_packages(krony.__path__, "krony."):  # once here, rather than in every fork
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)
    gc.freeze()  # a collection in a fork would touch, and so copy, every page
    return home


def run(
    sound: Path,
    numbers: Iterable[int],
    seed: int,
    keep: Path,
    kinds: Sequence[str] = tuple(KINDS),
    say: Callable[[str], None] = lambda _: None,
) -> Tally:
    """Tries the cases of these numbers, and keeps those that fail in the folder ``keep``, with as few edits as fail."""
    tally = Tally()
    for number in numbers:
        random = Random(f"{seed}/{number}")
        case = KINDS[kinds[number % len(kinds)]](random, sound)
        outcome = trial.run(case, sound)
        tally.codes[outcome.code] += 1
        tally.seconds += outcome.seconds
        tally.slowest, tally.largest = max(tally.slowest, outcome.seconds), max(tally.largest, outcome.memory)
        if outcome.problem is not None:
            case = smaller(case, outcome.problem, sound)
            tally.found.append((case, outcome.problem))
            file = _kept(case, keep)
            say(f"{number}: {outcome.problem}: {file}: krony {' '.join(case.command)!r:.150} {case.edits!s:.300}")
    return tally


def smaller(case: Case, problem: str, sound: Path) -> Case:
    """The case without the edits that it fails without."""
    for edit in list(case.edits):
        fewer = replace(case, edits=[other for other in case.edits if other is not edit])
        if len(case.edits) > 1 and trial.run(fewer, sound).problem == problem:
            case = fewer
    return case


def _kept(case: Case, keep: Path) -> Path:
    keep.mkdir(parents=True, exist_ok=True)
    name = hashlib.sha256(repr((case.command, case.edits)).encode("utf-8", "surrogatepass")).hexdigest()[:8]
    case.write(keep / f"{case.kind}-{name}.json")
    return keep / f"{case.kind}-{name}.json"
