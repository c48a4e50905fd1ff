"""``krony reproduce``: runs the paper's tables."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from krony.cli.expand import Fields, expand
from krony.cli.options import Json
from krony.cli.output import Output, quiet_libraries
from krony.errors import KronyError
from krony.reproduce.options import TableOptions


@expand
def run(
    target: Annotated[str, typer.Argument(metavar="TABLE", help="table1 … table9, or figure1.", show_default=False)],
    *,
    options: Annotated[TableOptions, Fields(leave_out=("say", "progress"))],
    plot: Annotated[Path | None, typer.Option(metavar="FILE.svg", help="figure1: draw it.")] = None,
    json_to: Json = None,
) -> None:
    """Run what a table of the paper needs, and print the paper's figure, krony's and the difference."""
    to = Output(json_to)
    from krony.storage.files import check_file, write_text

    if plot is not None:
        check_file(plot, ".svg")
        if target != "figure1":
            raise KronyError(f"--plot {plot}: it draws figure1, and this is {target}")
    from krony.reproduce.targets import reproduce

    quiet_libraries()
    said: list[str] = []

    def say(sentence: str) -> None:
        said.append(sentence)
        to.say(sentence)

    with to.progress() as progress:
        outcome = reproduce(target, replace(options, say=say, progress=progress))
    for sentence in outcome.header:
        if sentence not in said:
            to.say(sentence)
    if outcome.lines:
        to.say(f"{target}: {outcome.title}")
        table = outcome.table()
        to.table(table.columns, table.rows)
    for sentence in outcome.footer:
        to.say(sentence)
    if outcome.verdict is not None:
        to.say(str(outcome.verdict))
    if plot is not None and outcome.curves:
        write_text(plot, outcome.picture())
    to.json(outcome.to_json())
