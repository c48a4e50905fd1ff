"""One recipe after another, as the paper trains (section 4.1): a cosine, then a last epoch from the best state."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from krony.data.rows import Rows
from krony.healing.checkpoints import explain_write_errors, find_last, hold_to_settings, restore_start, save_start
from krony.healing.options import DEFAULTS, HealOptions
from krony.healing.recipes import Recipe
from krony.healing.report import HealReport
from krony.healing.training import check_run, complete_steps, settings_of, train_on_rows
from krony.runtime import distributed
from krony.runtime.progress import Progress, silent
from krony.storage.files import write_json
from krony.storage.tensor_files import read_json

T = TypeVar("T")
DONE = "trained.json"  # in a work folder: the report of a recipe after which another follows
THEN = "then"  # in a work folder: the work folder of the next recipe


def train_in_turn(
    model: PreTrainedModel,
    train: Rows,
    validation: Rows,
    *,
    work: Path,
    recipes: Sequence[Recipe],
    teacher: PreTrainedModel | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    options: HealOptions = DEFAULTS,
    progress: Progress = silent,
) -> HealReport:
    """Trains ``model`` in place by each recipe in turn, each from the best state of the one before.

    Takes and raises what ``train_on_rows`` does. With several recipes none stops early. With ``options.resume`` the run
    continues where it was: in the middle of a recipe, or between two. The report is that of the complete training.
    """
    if len(recipes) > 1:
        recipes = [replace(recipe, patience=None) for recipe in recipes]
    for recipe in recipes:
        check_run(model, train, validation, recipe=recipe, teacher=teacher, options=options)
    common: dict[str, Any] = {"teacher": teacher, "tokenizer": tokenizer, "progress": progress}
    done: HealReport | None = None
    for number, recipe in enumerate(recipes):
        place = work.joinpath(*[THEN] * number)
        held = _held_report(model, train, validation, place, recipe, teacher, options)
        if held is None:
            resume = options.resume and (number == 0 or find_last(place) is not None)
            own = replace(options, resume=resume)
            held = train_on_rows(model, train, validation, work=place, recipe=recipe, options=own, **common)
            if number + 1 < len(recipes) and (held.improved or options.keep_anyway):
                _keep(model, held, place)
        done = held if done is None else _joined(done, held)
        if not (done.improved or options.keep_anyway):
            break
    assert done is not None
    return done


def _keep(model: PreTrainedModel, report: HealReport, work: Path) -> None:
    """Writes the state that the next recipe starts from, and then the report, which says that the state is complete."""
    if distributed.is_first():
        with explain_write_errors(work):
            (work / THEN).mkdir(exist_ok=True)
            save_start(model, work / THEN, all_parameters=True)  # what was frozen for the caller trains here
            write_json(work / DONE, vars(report))
    distributed.all_agree(True)  # no process goes on before it is written


def _held_report(
    model: PreTrainedModel,
    train: Rows,
    validation: Rows,
    work: Path,
    recipe: Recipe,
    teacher: PreTrainedModel | None,
    options: HealOptions,
) -> HealReport | None:
    """The report of a recipe that an earlier run has finished, with its state in ``model``; None if it hasn't."""
    if not options.resume or not (work / DONE).is_file():
        return None
    rows = complete_steps(train, recipe)
    settings = settings_of(model, rows, validation, recipe=recipe, teacher=teacher, options=options)
    hold_to_settings(work, settings, resume=True)
    held = read_json(work / DONE)
    restore_start(model, work / THEN)
    pairs = {name: [(int(tokens), loss) for tokens, loss in held[name]] for name in ("curve", "validation")}
    scalars = {name: [(int(tokens), values) for tokens, values in points] for name, points in held["scalars"].items()}
    return HealReport(**held | pairs | {"scalars": scalars})


def _joined(first: HealReport, second: HealReport) -> HealReport:
    """The report of two trainings, of which the second started from the best state of the first."""

    def after(points: list[tuple[int, T]]) -> list[tuple[int, T]]:
        return [(tokens + first.tokens, value) for tokens, value in points]

    return HealReport(
        tokens=first.tokens + second.tokens,
        seconds=first.seconds + second.seconds,
        loss_before=first.loss_before,
        loss_trained=second.loss_after,
        loss_after=second.loss_after,
        curve=first.curve + after(second.curve),
        validation=first.validation + after(second.validation),
        scalars={name: points + after(second.scalars[name]) for name, points in first.scalars.items()},
    )
