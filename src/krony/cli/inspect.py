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
    text_tokens: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Read at most N tokens of it.", show_default="8192")
    ] = None,
    ablation_tokens: Annotated[
        int | None,
        typer.Option(
            min=0, metavar="N", help="Leave each factor out on N of these tokens; 0: none.", show_default="4096"
        ),
    ] = None,
    json_to: Json = None,
) -> None:
    """Look into MODEL: norms as in the paper's Table 4, singular values, scalars, forward paths, and errors.

    With --report or --text also into every factor: its spectrum, energy, contexts, and what ablating it costs.
    """
    to = Output(json_to)
    from krony.storage.files import check_file, write_text

    if plot is not None:
        check_file(plot, ".svg")
    lengths = {"--text-tokens": text_tokens, "--ablation-tokens": ablation_tokens}
    if trajectory:
        _refuse(
            {"--base": base, "--report": report, "--text": text} | lengths,
            "--trajectory shows what krony heal wrote down, and nothing else",
        )
        _show_trajectory(to, model, plot)
        return
    if report is None and text is None:
        _refuse(lengths, "this reads no text without --report or --text")
    if report is not None:
        if report.is_file():
            raise KronyError(f"{report} exists: name a new file, or remove this one first")
        check_file(report, ".html")
    from krony.evaluation.inspection import inspect_model
    from krony.evaluation.inspection_tables import explanations, picture, table
    from krony.models.source import ModelSource

    quiet_libraries()
    source = ModelSource.find(model)
    compared = None if base is None else ModelSource.find(base)
    loaded = source.load()
    figures: dict[str, Any] = {"model": model, "base": base}
    if report is not None or text is not None:
        text = "python-docs" if text is None else text
        figures["factors"] = _interpret(to, source, loaded, text, report, text_tokens, ablation_tokens)
    views = inspect_model(loaded, None if compared is None else compared.load())
    if plot is not None:
        write_text(plot, picture(views))
    shown = table(views)
    to.table(shown.columns, shown.rows)
    for sentence in explanations(views):
        to.say(sentence)
    to.json(figures | {"layers": [view.to_json() for view in views]})


def _refuse(options: dict[str, Any], why: str) -> None:
    """Raises KronyError for the first of these options that is given: it would do nothing."""
    for name, value in options.items():
        if value is not None:
            raise KronyError(f"{why}: leave {name} out")


def _interpret(
    to: Output,
    source: ModelSource,
    model: PreTrainedModel,
    text: str,
    report: Path | None,
    tokens: int | None,
    ablation_tokens: int | None,
) -> dict[str, Any]:
    """Looks at every factor, prints a table, writes the page, and returns the figures."""
    from krony.interpretation.interpret import ABLATION_TOKENS, TOKENS, interpret
    from krony.interpretation.report import explanations, interpretation_page, table
    from krony.storage.files import write_text

    with to.progress() as progress:
        seen = interpret(
            model, source.tokenizer, text, tokens=TOKENS if tokens is None else tokens,
            ablation_tokens=ABLATION_TOKENS if ablation_tokens is None else ablation_tokens, progress=progress,
        )  # fmt: skip
    if report is not None:
        write_text(report, interpretation_page(source.name, seen))
    shown = table(seen)
    to.table(shown.columns, shown.rows)
    for sentence in explanations(seen):
        to.say(sentence)
    return seen.to_json()


def _show_trajectory(to: Output, model: str, plot: Path | None) -> None:
    """Prints, draws and writes the scalars of a healed model over its training."""
    from krony.healing.trajectory import picture, read_trajectories, table
    from krony.storage.files import write_text

    scalars = read_trajectories(Path(model))
    if plot is not None:
        write_text(plot, picture(scalars))
    shown = table(scalars)
    to.table(shown.columns, shown.rows)
    to.json({"model": model, "scalars": scalars})
