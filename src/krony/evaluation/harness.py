"""Tasks of EleutherAI's lm-evaluation-harness on a model in memory (the extra ``lm-eval``)."""

from __future__ import annotations

import contextlib
import io
import logging
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from krony.errors import KronyError


@dataclass(frozen=True, kw_only=True)
class TaskResult:
    """One metric of one task.

    Attributes:
        task: the task's name.
        metric: the metric's name, with the harness's filter in brackets if there is one.
        value: the figure.
        error: the harness's standard error, or None where it gives none.
    """

    task: str
    metric: str
    value: float
    error: float | None

    def to_json(self) -> dict[str, Any]:
        """The result for ``--json``."""
        return asdict(self)


def run_tasks(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, tasks: Sequence[str], *, limit: int | None = None
) -> list[TaskResult]:
    """Runs tasks of the harness and returns their figures.

    Args:
        model: a causal LM, dense or compressed.
        tokenizer: the model's.
        tasks: names that the harness knows, or task files (``.yaml``), which may name data on disk.
        limit: use the first N examples of each task; None uses all.

    Raises:
        KronyError: the harness is not installed, it knows no such task, or it can't get the task's data.
    """
    manager = check_tasks(tasks)
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    with _quiet():
        options = {"task_manager": manager, "limit": limit, "log_samples": False, "bootstrap_iters": 1000}
        try:
            language_model = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=8)
            found = simple_evaluate(language_model, tasks=list(tasks), **options)
        except Exception as error:  # datasets, jinja and the tasks' own code raise anything
            first = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise KronyError(f"tasks {', '.join(tasks)}: the harness can't run them here: {first}") from None
    return _results(found["results"])


def check_tasks(tasks: Sequence[str]) -> Any:
    """The harness's ``TaskManager``. Raises KronyError if it is not installed, or knows no such task."""
    try:
        from lm_eval.tasks import TaskManager
    except ImportError:
        raise KronyError(
            "tasks are run by the lm-evaluation-harness: pip install lm-eval, or krony with its extra of that name"
        ) from None
    with _quiet():
        manager = TaskManager()
    for task in tasks:
        if task.endswith((".yaml", ".yml")):
            if not Path(task).is_file():
                raise KronyError(f"{task}: there is no such task file")
        elif task not in manager.all_tasks:
            raise KronyError(f"the lm-evaluation-harness knows no task {task!r}: name one of its own or a .yaml file")
    return manager


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """No advice of the harness about its own options, and no progress bars where stderr is no terminal."""
    loggers = [logging.getLogger("lm_eval")]
    loggers += [logging.getLogger(name) for name in logging.Logger.manager.loggerDict if name.startswith("lm_eval.")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    bars = contextlib.nullcontext() if sys.stderr.isatty() else contextlib.redirect_stderr(io.StringIO())
    try:
        with bars:
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _results(found: dict[str, dict[str, Any]]) -> list[TaskResult]:
    """The harness's figures, which it names ``metric,filter``."""
    results = []
    for task, metrics in found.items():
        for key, value in metrics.items():
            name, _, filtered = key.partition(",")
            if not filtered or name.endswith("_stderr") or not isinstance(value, (int, float)):
                continue
            spread = metrics.get(f"{name}_stderr,{filtered}")
            label = name if filtered == "none" else f"{name} ({filtered})"
            error = spread if isinstance(spread, float) else None
            results.append(TaskResult(task=task, metric=label, value=float(value), error=error))
    return results
