"""The control: the dense original, trained on the same text by the same recipe, to compare a healed model with."""

from __future__ import annotations

import warnings
from dataclasses import replace
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from krony.data.rows import Rows
from krony.errors import KronyWarning
from krony.healing.checkpoints import find_last
from krony.healing.options import DEFAULTS, HealOptions
from krony.healing.recipes import Recipe
from krony.healing.report import HealReport
from krony.healing.training import train_on_rows
from krony.runtime import distributed
from krony.runtime.progress import Progress, silent


def train_control(
    original: PreTrainedModel,
    train: Rows,
    validation: Rows,
    *,
    work: Path,
    recipe: Recipe,
    tokenizer: PreTrainedTokenizerBase | None = None,
    options: HealOptions = DEFAULTS,
    progress: Progress = silent,
) -> HealReport:
    """Trains ``original`` in place on the text alone: it can't be its own teacher.

    Takes what ``train_on_rows`` takes. Of ``options.freeze`` only ``embeddings`` applies to a dense model. A resumed
    run starts from the beginning if the control has no checkpoint yet. The control's best state may be its first; the
    report then says so, and a warning.
    """
    own = replace(
        options,
        freeze=options.frozen & {"embeddings"},
        resume=options.resume and find_last(work) is not None,
        keep_anyway=False,
    )
    report = train_on_rows(
        original,
        train,
        validation,
        work=work,
        recipe=recipe,
        tokenizer=tokenizer,
        options=own,
        progress=progress,
    )
    if not report.improved and distributed.is_first():
        warnings.warn(report.no_gain("the control"), KronyWarning, stacklevel=2)
    return report
