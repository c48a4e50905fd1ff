"""Tasks of EleutherAI's lm-evaluation-harness on a model in memory; the extra ``lm-eval``."""

from __future__ import annotations

import contextlib
import io
import logging
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from krony.errors import KronyError


@dataclass(frozen=True)
class TaskResult:
    """One metric of one task; ``error`` is the harness's standard error, None where it has none."""

    task: str
    metric: str
    value: float
    error: float | None

    def to_json(self) -> dict:
        return asdict(self)


def run_tasks(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, tasks: Sequence[str], *, limit: int | None = None
) -> list[TaskResult]:
    """The figures of the harness's tasks.

    Args:
        tasks: names that the harness knows, or task files (``.yaml``), which may name data on disk.
        limit: use the first so many examples of each.

    Raises:
        KronyError: the harness is not installed, it knows no such task, or the task's data can't be had.
    """
    try:
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager
    except ImportError:
        raise KronyError(
            "tasks are run by the lm-evaluation-harness: pip install lm-eval, or krony with its extra of that name"
        ) from None
    for name in (logging.getLogger(), logging.getLogger("lm_eval")):
        name.setLevel(logging.ERROR)  # its advice is about its own options
    manager = TaskManager()
    for task in tasks:
        if task.endswith((".yaml", ".yml")):
            if not Path(task).is_file():
                raise KronyError(f"{task}: there is no such task file")
        elif task not in manager.all_tasks:
            raise KronyError(f"the lm-evaluation-harness knows no task {task!r}: name one of its own or a .yaml file")
    options = {"task_manager": manager, "limit": limit, "log_samples": False, "bootstrap_iters": 1000}
    hush = contextlib.nullcontext() if sys.stderr.isatty() else contextlib.redirect_stderr(io.StringIO())  # its bars
    try:
        with hush:
            language_model = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=8)
            found = simple_evaluate(language_model, tasks=list(tasks), **options)
    except Exception as error:  # datasets, jinja and the tasks' own code raise what they like
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise KronyError(f"tasks {', '.join(tasks)}: the harness can't run them here: {first}") from None
    results = []
    for task, metrics in found["results"].items():
        for key, value in metrics.items():
            name, _, filtered = key.partition(",")
            if not filtered or name.endswith("_stderr") or not isinstance(value, (int, float)):
                continue
            spread = metrics.get(f"{name}_stderr,{filtered}")
            label = name if filtered == "none" else f"{name} ({filtered})"
            results.append(TaskResult(task, label, float(value), spread if isinstance(spread, float) else None))
    return results
