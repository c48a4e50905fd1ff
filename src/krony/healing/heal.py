"""``krony.heal``: train a compressed model until it predicts as the original does, as far as the text allows."""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from krony.data.rows import Rows
from krony.errors import KronyWarning
from krony.healing.chain import train_in_turn
from krony.healing.options import HealOptions
from krony.healing.recipes import Recipe, default_freeze, find_recipe
from krony.healing.report import HealReport
from krony.healing.text import Reader, load_text
from krony.healing.training import check_settings, training_device
from krony.models.loading import context_length
from krony.runtime import distributed
from krony.runtime.progress import Progress, silent
from krony.storage.locks import working_in


def heal(
    model: PreTrainedModel,
    data: str | Path | Rows,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    teacher: PreTrainedModel | None = None,
    recipe: str | Recipe | Sequence[str | Recipe] = "quick",
    val: str | Path | Rows | None = None,
    max_tokens: int | None = None,
    work: Path | str | None = None,
    progress: Progress = silent,
    **options: Any,
) -> HealReport:
    """Trains ``model`` in place, dense or compressed, and leaves it in its state of lowest validation loss.

    That state may be the one before training; ``HealReport.improved`` says so.

    Args:
        model: a causal LM of transformers.
        data: a text or jsonl file, ``python-docs`` (its calibration part), a ``.bin``, a set on the hub, or
            ``krony.data.rows.Rows``.
        tokenizer: the model's; needed unless ``data`` and ``val`` are tokens already.
        teacher: the original. The model then learns its next-token distributions instead of the text alone.
        recipe: the name of one of ``krony.RECIPES``, or a ``krony.Recipe``. Rows of a named recipe are as long as the
            model allows. Several, such as ``["paper", "paper-final"]``, train in turn, each from the best state of the
            one before, on rows of the first one's length, and none stops early.
        val: text that chooses the best state, of the same kinds as ``data``; ``python-docs`` is its held-out part. None
            holds complete documents out of ``data`` that the model was not calibrated on.
        max_tokens: take the first so many tokens of ``data``, and at most a tenth as many of ``val`` (or 16 rows).
        work: folder for checkpoints and logs, which stays; None takes a temporary one.
        progress: called with the step, the number of steps, and what is being done.
        options: attributes of ``HealOptions``, such as ``freeze={"right", "embeddings"}``, ``device="cuda"``,
            ``resume=True`` or ``seed=1``.

    Raises:
        KronyError: text, recipe, teacher or options that don't fit the model; a loss that is not finite; a full disk.

    Examples:
        ```python
        report = krony.heal(model, "python-docs", tokenizer=tokenizer, teacher=original, max_tokens=300_000)
        print(report)
        ```
    """
    chosen = HealOptions(**options)
    first, *others = [recipe] if isinstance(recipe, str | Recipe) else recipe
    if chosen.freeze is None and isinstance(first, str):
        chosen = replace(chosen, freeze=default_freeze(first))
    plain = _fitted_recipe(first, model, data)
    recipes = [plain, *(replace(_fitted_recipe(other, model, data), length=plain.length) for other in others)]
    distributed.init(training_device(chosen.device), shards=True)
    check_settings(model, plain.length, recipe=plain, teacher=teacher, options=chosen)
    reader = Reader.of(model, tokenizer, plain.length)
    train, validation = load_text(data, val, reader, max_tokens=max_tokens)
    with _work_folder(work) as folder:
        common: dict[str, Any] = {"tokenizer": tokenizer, "teacher": teacher, "progress": progress}
        report = train_in_turn(model, train, validation, work=folder, recipes=recipes, options=chosen, **common)
    if not report.improved and distributed.is_first():
        warnings.warn(report.no_gain("the model"), KronyWarning, stacklevel=2)
    return report


def _fitted_recipe(recipe: str | Recipe, model: PreTrainedModel, data: object = None) -> Recipe:
    """The recipe, with rows that the model can take if it was named, or with those of ``data`` if it has rows."""
    plain = recipe if isinstance(recipe, Recipe) else find_recipe(recipe)
    if isinstance(data, Rows):
        return replace(plain, length=data.length)
    if isinstance(recipe, Recipe):
        return plain
    return replace(plain, length=min(plain.length, context_length(model)))


@contextmanager
def _work_folder(work: Path | str | None) -> Iterator[Path]:
    """The folder for checkpoints, locked; a temporary one, which all processes share, if none is named."""
    if work is not None:
        with working_in(Path(work), is_mine=distributed.is_first()):
            yield Path(work)
        return
    with tempfile.TemporaryDirectory(prefix="krony-heal-") as own:
        yield Path(distributed.from_first(own))
        distributed.all_agree(True)  # the first process removes it when all are done
