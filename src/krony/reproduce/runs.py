"""A model of the tables: how it is made, what was measured, and the folder that keeps its figures."""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from krony.config import KronyConfig
from krony.errors import KronyError
from krony.reproduce.digests import key
from krony.storage.files import write_json

MARKS = (0.1, 0.2, 0.3, 0.4)  # of the first epoch, where Figure 1 shows the validation loss
STAGES = {"start": 0.0, "0.3": 0.3, "0.4": 0.4, "epoch": 1.0, "full": math.inf}  # where a run is measured: epochs


@dataclass(frozen=True)
class Run:
    """A model of the tables: its name, how it is compressed, and whether the original teaches it."""

    name: str
    config: KronyConfig
    taught: bool = False


@dataclass(kw_only=True)
class Trained:
    """What a run measured.

    Attributes:
        params: parameters of the model.
        untied: the same with the head counted separately from the embedding.
        stages: perplexities by stage, in the order of SETS.
        curve: Figure 1's: validation loss in nats per token by share of the first epoch.
    """

    params: int = 0
    untied: int = 0
    stages: dict[str, list[float]] = field(default_factory=dict)
    curve: dict[str, float] = field(default_factory=dict)


def last_stage(stages: set[str]) -> str:
    """The stage that is reached last."""
    return max(stages, key=lambda stage: STAGES[stage])


@contextmanager
def run_folder(work: Path | None, run: Run, made_with: dict[str, Any]) -> Iterator[Path]:
    """The folder of a run: in ``work``, or a temporary one where ``work`` is None.

    Its name holds a key of everything the figures depend on, so that another model, text, budget, seed or version has
    another folder.
    """
    name = "".join(c if c.isalnum() or c in "-." else "-" for c in run.name)
    place = tempfile.TemporaryDirectory() if work is None else nullcontext(str(work / f"{name}-{key(made_with)}"))
    with place as folder:
        yield Path(folder)


def read_figures(folder: Path) -> Trained:
    """What a run measured before it stopped; nothing if it is new. Raises KronyError if the file is damaged."""
    file = folder / "figures.json"
    if not file.exists():
        return Trained()
    try:
        return Trained(**json.loads(file.read_text(encoding="utf-8"))["figures"])
    except (ValueError, KeyError, TypeError, OSError):
        raise KronyError(f"{file} is damaged: remove {folder}, and the run starts again") from None


def write_figures(folder: Path, made_with: dict[str, Any], figures: Trained) -> None:
    """Keeps what a run has measured so far."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "figures.json", {"made": made_with, "figures": vars(figures)})
