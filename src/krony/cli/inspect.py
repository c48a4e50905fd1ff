"""``krony inspect``: norms, singular values, scalars and errors of every layer."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from krony.cli.options import Json, Model
from krony.cli.output import Output, quiet_libraries


def run(
    model: Model,
    base: Annotated[
        str | None, typer.Option(metavar="MODEL", help="The model it was compressed from, to compare with.")
    ] = None,
    plot: Annotated[
        Path | None, typer.Option(metavar="FILE.svg", help="A picture: the error by layer, or the norm without --base.")
    ] = None,
    json_to: Json = None,
) -> None:
    """Look into MODEL: norms as in the paper's Table 4, singular values, scalars, forward paths, and errors."""
    to = Output(json_to)
    from krony.storage.files import check_file, write_text

    if plot is not None:
        check_file(plot, ".svg")
    from krony.evaluation.inspection import inspect_model
    from krony.evaluation.inspection_tables import explanations, picture, table
    from krony.models.loading import load_model

    quiet_libraries()
    views = inspect_model(load_model(model), load_model(base) if base else None)
    if plot is not None:
        write_text(plot, picture(views))
    shown = table(views)
    to.table(shown.columns, shown.rows)
    for sentence in explanations(views):
        to.say(sentence)
    to.json({"model": model, "base": base, "layers": [view.to_json() for view in views]})
