"""``krony inspect``: norms, singular values, scalars and errors of every layer."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from krony.cli.options import Json, Model
from krony.cli.output import Output, quiet_libraries

if TYPE_CHECKING:
    from krony.evaluation.inspection import LayerView


def _path(view: LayerView) -> str:
    """A layer's forward path at 512 tokens, with that of decoding where it is another."""
    if view.path is None:
        return ""
    decode = "" if view.decode_path == view.path else f", decode {view.decode_path}"
    return f"{view.path}{decode}{', fused' if view.fused else ''}"


def run(
    model: Model,
    base: Annotated[str | None, typer.Option(help="The model it was compressed from, to compare with.")] = None,
    plot: Annotated[
        Path | None, typer.Option(metavar="FILE.svg", help="A picture: error a layer, or norm without --base.")
    ] = None,
    json_to: Json = None,
) -> None:
    """Look into MODEL: norms as in the paper's Table 4, singular values, scalars, and what is left of --base."""
    to = Output(json_to)
    from krony.storage.files import check_file, write_text

    if plot is not None:
        check_file(plot, ".svg")
    from krony.evaluation.inspection import inspect
    from krony.models.loading import load_model
    from krony.pages import bars

    quiet_libraries()
    views = inspect(load_model(model), load_model(base) if base else None)
    columns = ["layer", "shape", "Frobenius", "l1", "largest σ", "median σ", "smallest σ", "scalars", "path"]
    rows = [
        [v.name, v.shape, f"{v.frobenius:.2f}", f"{v.l1:,.0f}", *(f"{s:.3g}" for s in v.singular_values)]
        + [" ".join(f"{s:.2f}" for s in v.scalars or []), _path(v)]
        for v in views
    ]
    if base:
        columns += ["of base", "error"]
        rows = [[*row, f"{v.kept:.1%}", f"{v.error:.3f}"] for row, v in zip(rows, views, strict=True)]
    if plot is not None:
        heights = {v.name: v.frobenius if v.error is None else v.error for v in views}
        label = "relative error, Frobenius norm" if base else "Frobenius norm"
        write_text(plot, bars({label: heights}, label))
    to.table(columns, rows)
    for path, why in dict.fromkeys((_path(v), v.why) for v in views if v.why is not None):
        to.say(f"{path}: {why}")
    if any(v.fused for v in views):
        to.say(
            "fused: up, activation and down of an MLP run as one step, and the hidden features are not turned around"
        )
    to.json({"model": model, "base": base, "layers": [v.to_json() for v in views]})
