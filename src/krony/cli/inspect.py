"""``krony inspect``: norms, singular values, scalars and errors of every layer."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from krony.cli.options import Json, Model
from krony.cli.output import Output, quiet_libraries
from krony.errors import KronyError


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
    json_to: Json = None,
) -> None:
    """Look into MODEL: norms as in the paper's Table 4, singular values, scalars, forward paths, and errors."""
    to = Output(json_to)
    from krony.storage.files import check_file, write_text

    if plot is not None:
        check_file(plot, ".svg")
    if trajectory:
        if base is not None:
            raise KronyError("--trajectory shows what krony heal wrote down, and compares nothing: leave --base out")
        _show_trajectory(to, model, plot)
        return
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
