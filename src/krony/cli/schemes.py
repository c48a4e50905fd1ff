"""``krony schemes``: the sizes that a model can be compressed to."""

from __future__ import annotations

from typing import Annotated

import typer

from krony.cli.options import Json, Model
from krony.cli.output import Output, quiet_libraries
from krony.errors import KronyError


def run(
    model: Model = "gpt2",
    everything: Annotated[
        bool, typer.Option("--all", help="Every full-rank shape with one factor (the paper's Table 1).")
    ] = False,
    factors: Annotated[
        str | None, typer.Option(metavar="K,K,…", help="Each shape with these numbers of factors (Table 2).")
    ] = None,
    modules: Annotated[str, typer.Option(help="mlp, or a regular expression over names of linear layers.")] = "mlp",
    layers: Annotated[str, typer.Option(help="all, odd, even, or a zero-based inclusive range such as 2-28.")] = "all",
    json_to: Json = None,
) -> None:
    """List the schemes of a model: shapes, factors, rank, parameters. Reads the config only, no weights."""
    out = Output(json_to)
    from krony.kronecker import schemes
    from krony.models.source import ModelSource
    from krony.models.surgery import find_groups, model_shape

    quiet_libraries()
    empty = ModelSource.find(model).skeleton
    shape = model_shape(empty, find_groups(empty, modules, layers))
    rows = schemes.table(shape, everything=everything, factors=_counts(factors))
    table = [
        [r.name, f"{r.shape.m1}x{r.shape.n1}", f"{r.shape.m2}x{r.shape.n2}", str(r.shape.factors), str(r.shape.rank)]
        + [f"{r.shape.parameters:,}", f"{r.model_params:,}", f"{r.model_params / shape.parameters:.1%}"]
        for r in rows
    ]
    high, wide = shape.matrices[0]
    out.say(f"{model}: {shape.parameters:,} parameters, with {len(shape.matrices)} matrices of {high}x{wide}")
    out.table(["scheme", "left", "right", "factors", "rank", "per matrix", "in the model", "of original"], table)
    out.json([row.to_json() for row in rows])


def _counts(text: str | None) -> list[int] | None:
    if text is None:
        return None
    try:
        counts = [int(part) for part in text.split(",")]
    except ValueError:
        counts = [0]
    if min(counts) < 1:
        raise KronyError(f"--factors {text}: it takes numbers of factors such as 1,2,3")
    return counts
