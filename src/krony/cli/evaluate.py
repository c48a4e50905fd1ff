"""``krony eval``: perplexity, last-word accuracy, and tasks of the lm-evaluation-harness."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from krony.cli.expand import expand
from krony.cli.options import Device, Dtype, Json, Model
from krony.cli.output import Output, quiet_libraries
from krony.errors import KronyError
from krony.evaluation.settings import EvaluationOptions

if TYPE_CHECKING:
    from krony.evaluation.harness import TaskResult
    from krony.evaluation.perplexity import Result
    from krony.pages import Table


Data = Annotated[
    list[str] | None,
    typer.Option(
        metavar="TEXT",
        help="wikitext-2, wikitext-103, lambada, python-docs, a text or jsonl file, or a set on the hub as "
        "name[:config][@split], by default its test split; can be repeated.",
        show_default="wikitext-2",
    ),
]
Tasks = Annotated[
    str | None,
    typer.Option(
        metavar="NAME,…", help="Tasks of the lm-evaluation-harness (the lm-eval extra), by name or as .yaml files."
    ),
]
Limit = Annotated[int | None, typer.Option(min=1, metavar="N", help="Use the first N examples of each task.")]
Count = Annotated[
    str, typer.Option(help="tied: a tied head once. untied: also separately from the embedding (Appendix B).")
]
Report = Annotated[Path | None, typer.Option(metavar="FILE.html", help="Write the tables as a page.")]


@expand
def run(
    model: Model,
    data: Data = None,
    *,
    options: EvaluationOptions,
    tasks: Tasks = None,
    limit: Limit = None,
    count: Count = "tied",
    report: Report = None,
    device: Device = "cpu",
    dtype: Dtype = "auto",
    json_to: Json = None,
) -> None:
    """Measure MODEL on standard data: perplexity, and the accuracy of the last word on LAMBADA.

    Under torchrun the processes share the work; the figures are those of one process.
    """
    to = Output(json_to)
    check(data, options, tasks, limit, count, device)
    names = _names(tasks)
    from krony.data.sets import STANDARD, check_named
    from krony.storage.files import check_file, write_text

    if report is not None:
        check_file(report, ".html")
    from krony.evaluation.harness import run_tasks
    from krony.evaluation.perplexity import evaluate
    from krony.models.source import ModelSource
    from krony.models.surgery import count_parameters, count_untied
    from krony.runtime import distributed

    quiet_libraries()
    for name in data or []:
        check_named(name)
    source = ModelSource.find(model)
    loaded = source.load(dtype=dtype, device=distributed.init(device))
    tokenizer = source.tokenizer
    results = []
    for name in data or ([] if names else [STANDARD]):
        with to.progress() as progress:
            results.append(evaluate(loaded, tokenizer, name, **vars(options), progress=progress))
    if not distributed.is_first():
        return
    done = run_tasks(loaded, tokenizer, names, limit=limit) if names else []
    figures: dict[str, Any] = {"model": model, "params": count_parameters(loaded)}
    figures["results"] = [result.to_json() for result in results]
    sentence = f"{figures['params']:,} parameters; a head tied to the embedding is counted once"
    if count == "untied":
        figures["params_untied"] = count_untied(loaded)
        sentence = f"{figures['params']:,} parameters; {figures['params_untied']:,} with the head counted separately"
    if names:
        figures["tasks"] = [result.to_json() for result in done]
    to.say(f"{model}: {sentence}")
    tables = _tables(results, done)
    if report is not None:
        write_text(report, _page(model, sentence, tables))
    for _, table in tables:
        to.table(table.columns, table.rows)
    to.json(figures)


def check(
    data: list[str] | None, options: EvaluationOptions, tasks: str | None, limit: int | None, count: str, device: str
) -> None:
    """Raises KronyError for options that don't fit together, and for tasks that can't be run."""
    if count not in ("tied", "untied"):
        raise KronyError(f"--count {count}: it is tied or untied")
    if limit is not None and tasks is None:
        raise KronyError("--limit works with --tasks, and there are none: for text use --max-tokens")
    if device == "auto" and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise KronyError("--device auto spreads a model over devices, and here each process has its own: use cuda")
    if tasks is not None and not _names(tasks):
        raise KronyError("--tasks names no task: it takes names such as lambada_openai,piqa")
    if tasks is None:
        return
    for field in () if data else fields(options):
        if getattr(options, field.name) != field.default:
            name = field.name.replace("_", "-")
            raise KronyError(f"--{name} works with --data, and only tasks are measured: leave it out, or name text")
    from krony.evaluation.harness import check_tasks

    check_tasks(_names(tasks))


def _names(tasks: str | None) -> list[str]:
    return [name.strip() for name in (tasks or "").split(",") if name.strip()]


def _tables(results: Sequence[Result], tasks: Sequence[TaskResult]) -> list[tuple[str, Table]]:
    """What was measured, as tables with headings."""
    from krony.pages import Table

    rows = [
        [r.data, r.protocol, f"{r.window}", f"{r.stride}", f"{r.tokens:,}", f"{r.perplexity:,.2f}"]
        + ["" if r.accuracy is None else f"{r.accuracy:.2%}"]
        for r in results
    ]
    task_rows = [[t.task, t.metric, f"{t.value:,.4f}", "" if t.error is None else f"{t.error:.4f}"] for t in tasks]
    tables = [
        ("Perplexity", Table(["data", "protocol", "window", "stride", "tokens", "perplexity", "last word"], rows)),
        ("Tasks", Table(["task", "metric", "value", "±"], task_rows)),
    ]
    return [(heading, table) for heading, table in tables if table.rows]


def _page(model: str, sentence: str, tables: Sequence[tuple[str, Table]]) -> str:
    from krony.pages import page, paragraphs

    parts = [(heading, paragraphs(f"{sentence}.") + table.html()) for heading, table in tables]
    return page(f"{model}, evaluated by krony", parts)
