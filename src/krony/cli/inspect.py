"""``krony inspect``: norms, singular values, scalars and errors of every layer, and what each factor means."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from krony.cli.options import Json, Model
from krony.cli.output import Output, quiet_libraries
from krony.errors import KronyError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from krony.models.source import ModelSource


def run(
    model: Model,
    base: Annotated[
        str | None, typer.Option(metavar="MODEL", help="The model it was compressed from, to compare with.")
    ] = None,
    plot: Annotated[
        Path | None, typer.Option(metavar="FILE.svg", help="A picture: the error by layer, or the norm without --base.")
    ] = None,
    trajectory: Annotated[
        bool,
        typer.Option(
            "--trajectory", help="The scalars over the training by krony heal instead: a table, --plot draws them."
        ),
    ] = False,
    report: Annotated[
        Path | None,
        typer.Option(metavar="FILE.html", help="A page on what every factor does on --text; a new file."),
    ] = None,
    text: Annotated[
        str | None,
        typer.Option(
            metavar="TEXT",
            help="Look at every factor on this text: a text or jsonl file, python-docs, or a set on the hub.",
            show_default="python-docs with --report",
        ),
    ] = None,
    text_tokens: Annotated[int, typer.Option(min=1, metavar="N", help="Read at most N tokens of it.")] = 8_192,
    ablation_tokens: Annotated[
        int, typer.Option(min=0, metavar="N", help="Leave each factor out on N of these tokens; 0: leave none out.")
    ] = 4_096,
    json_to: Json = None,
) -> None:
    """Look into MODEL: norms as in the paper's Table 4, singular values, scalars, forward paths, and errors.

    With --report or --text also into every factor: its spectrum, energy, contexts, and what ablating it costs.
    """
    to = Output(json_to)
    from krony.storage.files import check_file, write_text

    if plot is not None:
        check_file(plot, ".svg")
    if trajectory:
        for name, given in (("--base", base), ("--report", report), ("--text", text)):
            if given is not None:
                raise KronyError(f"--trajectory shows what krony heal wrote down, and nothing else: leave {name} out")
        _show_trajectory(to, model, plot)
        return
    if report is not None:
        if report.is_file():
            raise KronyError(f"{report} exists: name a new file, or remove this one first")
        check_file(report, ".html")
    from krony.evaluation.inspection import inspect_model
    from krony.evaluation.inspection_tables import explanations, picture, table
    from krony.models.source import ModelSource

    quiet_libraries()
    source = ModelSource.find(model)
    loaded = source.load()
    figures: dict[str, Any] = {"model": model, "base": base}
    if report is not None or text is not None:
        text = "python-docs" if text is None else text
        figures["factors"] = _interpret(to, source, loaded, text, report, text_tokens, ablation_tokens)
    views = inspect_model(loaded, ModelSource.find(base).load() if base else None)
    if plot is not None:
        write_text(plot, picture(views))
    shown = table(views)
    to.table(shown.columns, shown.rows)
    for sentence in explanations(views):
        to.say(sentence)
    to.json(figures | {"layers": [view.to_json() for view in views]})


def _interpret(
    to: Output,
    source: ModelSource,
    model: PreTrainedModel,
    text: str,
    report: Path | None,
    tokens: int,
    ablation_tokens: int,
) -> dict[str, Any]:
    """Looks at every factor, prints a table, writes the page, and returns the figures."""
    from krony.interpretation.interpret import interpret
    from krony.interpretation.report import explanations, interpretation_page, table
    from krony.storage.files import write_text

    with to.progress() as progress:
        seen = interpret(
            model, source.tokenizer, text, tokens=tokens, ablation_tokens=ablation_tokens, progress=progress
        )
    if report is not None:
        write_text(report, interpretation_page(source.name, seen))
    shown = table(seen)
    to.table(shown.columns, shown.rows)
    for sentence in explanations(seen):
        to.say(sentence)
    return seen.to_json()


def _show_trajectory(to: Output, model: str, plot: Path | None) -> None:
    """Prints, draws and writes the scalars of a healed model over its training."""
    from krony.evaluation.trajectory import picture, read_trajectories, table
    from krony.storage.files import write_text

    scalars = read_trajectories(Path(model))
    if plot is not None:
        write_text(plot, picture(scalars))
    shown = table(scalars)
    to.table(shown.columns, shown.rows)
    to.json({"model": model, "scalars": scalars})
