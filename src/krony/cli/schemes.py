"""``krony schemes``: what each scheme makes of a model."""

from __future__ import annotations

from typing import Annotated

import typer

from krony.cli.options import Json, Model
from krony.cli.output import Output
from krony.errors import KronyError


def run(
    model: Model = "gpt2",
    everything: Annotated[
        bool, typer.Option("--all", help="Every shape of full rank with one factor (the paper's Table 1).")
    ] = False,
    factors: Annotated[
        str | None, typer.Option(metavar="K,K,…", help="Each shape with these numbers of factors (Table 2).")
    ] = None,
    modules: Annotated[str, typer.Option(help="mlp, or a regular expression over names of linear layers.")] = "mlp",
    layers: Annotated[str, typer.Option(help="all, odd, even, or a zero-based inclusive range such as 2-28.")] = "all",
    json_to: Json = None,
) -> None:
    """List the schemes of a model: shapes, factors, rank, parameters, size. Reads the config only, no weights."""
    out = Output(json_to)
    from krony.cli.output import quiet_libraries
    from krony.kronecker import schemes
    from krony.models import loading, surgery

    quiet_libraries()
    empty = loading.empty_model(loading.load_config(model))
    layout = surgery.layout(empty, surgery.find_groups(empty, modules, layers))
    rows = schemes.table(layout, everything=everything, factors=_counts(factors))
    table = [
        [r.name, f"{r.shape.m1}x{r.shape.n1}", f"{r.shape.m2}x{r.shape.n2}", str(r.shape.factors), str(r.shape.rank)]
        + [f"{r.shape.parameters:,}", f"{r.model_params:,}", f"{r.model_params / layout.parameters:.1%}"]
        for r in rows
    ]
    high, wide = layout.matrices[0]
    out.say(f"{model}: {layout.parameters:,} parameters, of which {len(layout.matrices)} matrices of {high}x{wide}")
    out.table(["scheme", "left", "right", "factors", "rank", "a matrix", "the model", "of it"], table)
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
