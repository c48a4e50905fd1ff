"""The same training for every start of ``quality.py``: towards the original's predictions, on the same rows."""

from __future__ import annotations

import argparse
import hashlib
import shutil
import time
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

import krony
from krony.data.rows import Rows
from krony.healing.checkpoints import find_last
from krony.healing.options import HealOptions
from krony.healing.recipes import RECIPES, Recipe
from krony.healing.training import train_on_rows
from krony.storage.files import cache_folder

LENGTH, HELD = 512, 8  # tokens per row, and rows that choose the best state
SAVED = 131_072  # tokens between two checkpoints, at most


class Lesson:
    """Trains models on the first tokens of the calibration text, and 8 rows more to choose the best state.

    Args:
        teacher: the original, in float32.
        options: ``calibration``, ``distil`` (tokens), ``seed``, ``out`` and ``rate`` are read.
    """

    def __init__(
        self, teacher: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, options: argparse.Namespace
    ) -> None:
        self.teacher, self.options = teacher, options
        length = min(LENGTH, teacher.config.max_position_embeddings)
        self.recipe = recipe(options.distil, length, options.rate)
        step = self.recipe.sequences * length
        wanted = -(-options.distil // step) * step + HELD * length
        ids = krony.calibration_set(options.calibration, tokenizer, tokens=wanted, length=length, seed=options.seed)
        if ids.numel() < wanted:
            raise SystemExit(f"{options.calibration} has {ids.numel():,} tokens, and --distil takes {wanted:,}")
        self.train, self.held = Rows(ids.flatten().numpy(), length).split(HELD)

    def train_on(self, model: PreTrainedModel, way: str, keep: float, freeze: str | None = None) -> dict[str, Any]:
        """Trains ``model`` in place, and returns what its row says. A run that was interrupted resumes."""
        start, work = time.perf_counter(), self.work(way, keep)
        resume = find_last(work) is not None
        if not resume:
            shutil.rmtree(work, ignore_errors=True)  # one that ended before its first checkpoint
        chosen = HealOptions(freeze=freeze, seed=self.options.seed, keep_anyway=True, resume=resume)
        train_on_rows(model, self.train, self.held, work=work, recipe=self.recipe, teacher=self.teacher, options=chosen)
        return {"distilled": self.options.distil, "seconds": time.perf_counter() - start, "resumed": resume}

    def work(self, way: str, keep: float) -> Path:
        """The folder of this run's checkpoints; ``forget`` removes it when the row is written."""
        run = f"{self.options.out} {way} {keep:g} {self.options.distil} {self.options.seed} {self.options.rate}"
        return cache_folder() / f"quality-{hashlib.sha256(run.encode()).hexdigest()[:16]}"

    def forget(self, way: str, keep: float) -> None:
        """Removes the checkpoints of a run."""
        shutil.rmtree(self.work(way, keep), ignore_errors=True)


def recipe(tokens: int, length: int, rate: float | None) -> Recipe:
    """The quick recipe without decay, which only factors would have; the goal is the original's predictions alone."""
    changes = {} if rate is None else {"learning_rate": rate}
    evaluations = max(1, tokens // SAVED)
    return RECIPES["quick"].changed(
        length=length, text=0.0, weight_decay=0.0, evaluations=evaluations, patience=evaluations, **changes
    )
