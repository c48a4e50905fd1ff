"""Options of the tables, shared by Python and the command line. Needs no torch, so that ``--help`` is fast."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from krony.errors import KronyError
from krony.options import option
from krony.runtime.progress import Progress, silent
from krony.runtime.seeds import check_seed

BUDGET_NAMES = ("quick", "full")


def _ignore(sentence: str) -> None:
    pass


@dataclass(frozen=True, kw_only=True)
class TableOptions:
    """What a table is run with.

    Attributes:
        model: a folder, a name on the hub or ``demo``, in place of GPT-2.
        data_dir: folder with ``wikitext-2``, ``wikitext-103``, ``lambada`` and ``openwebtext``; None uses the hub.
        data: text to train on, instead of OpenWebText.
        budget: ``quick``, or ``full`` for the paper's numbers of tokens.
        work: folder that keeps trained models' figures, so that other tables reuse them and a stopped run resumes;
            None keeps nothing.
        dry_run: say what would be trained, and stop.
        device: where models run, such as ``cpu`` or ``cuda``.
        seed: seed of everything random.
        seeds: how many seeds, from ``seed`` on, a table that trains is run with; it then shows means and ranges.
        say: called with each sentence that is known before the training starts.
        progress: called with the progress of long work.

    Raises:
        KronyError: an unknown budget, or no seed.

    Examples:
        >>> TableOptions(model="demo").budget
        'quick'
    """

    model: str = option("gpt2", "In place of GPT-2: a folder, a name on the hub, or demo.", metavar="MODEL")
    data_dir: Path | None = option(
        None, "Read named data sets from DIR (DIR/wikitext-2/…) instead of the hub.", metavar="DIR"
    )
    data: str | None = option(None, "Text to train on, instead of DIR/openwebtext/train.*.", metavar="TEXT")
    budget: str = option("quick", "quick: minutes on a small model. full: the paper's numbers of tokens.")
    work: Path | None = option(
        None, "Keep what is trained here: other tables reuse it, and a stopped run resumes.", metavar="DIR"
    )
    dry_run: bool = option(False, "Say how many tokens are trained on and how long it takes, and stop.")
    device: str = option("cpu", "cpu, cuda or cuda:1.")
    seed: int = option(0, "Seed of everything random.", metavar="N")
    seeds: int = option(1, "Train with N seeds, and show means and ranges.", metavar="N")
    say: Callable[[str], None] = _ignore
    progress: Progress = silent

    def __post_init__(self) -> None:
        if self.budget not in BUDGET_NAMES:
            raise KronyError(f"budget {self.budget!r} is unknown: it is {' or '.join(BUDGET_NAMES)}")
        if self.seeds < 1:
            raise KronyError(f"seeds is {self.seeds}: it takes a number from 1")
        check_seed(self.seed)
        check_seed(self.seed + self.seeds - 1)
