"""``krony export``: a compressed model becomes one that loads without krony."""

from __future__ import annotations

from typing import Annotated

import typer

from krony.cli.options import Json, Model, Out
from krony.cli.output import Output, quiet_libraries
from krony.errors import KronyError


def run(
    model: Model,
    out: Out,
    to: Annotated[
        str,
        typer.Option("--to", help="dense: factors multiplied out, the original's size; slim: a smaller hidden width."),
    ] = "dense",
    multiple_of: Annotated[
        int | None, typer.Option(metavar="N", help="slim: round the width up to a multiple of N, such as 64.")
    ] = None,
    json_to: Json = None,
) -> None:
    """Write MODEL to OUT as a plain Hugging Face model that needs no krony."""
    words = Output(json_to)
    if multiple_of is not None and to != "slim":
        raise KronyError(f"--multiple-of is of --to slim, and this is --to {to}: leave it out")
    from krony.export import export_model, slim
    from krony.files import check_writable, fresh_folder
    from krony.models import load_model, save
    from krony.surgery import count_parameters

    quiet_libraries()
    check_writable(out)
    loaded = load_model(model)
    figures: dict = {"model": model, "out": str(out), "to": to, "params_before": count_parameters(loaded)}
    if to == "slim":
        exported = slim(loaded, multiple_of or 1)
        plain = exported.model
        figures |= {"width": exported.width, "padding": exported.padding}
    else:
        plain = export_model(loaded, to)
    with fresh_folder(out) as folder:
        save(plain, folder, source=model)
    figures["params_after"] = count_parameters(plain)
    words.say(
        f"{model} -> {out}: {figures['params_before']:,} -> {figures['params_after']:,} parameters, no krony needed"
    )
    if to == "slim":
        padded = f", {figures['padding']:,} of them zeros for layers that kept fewer" if figures["padding"] else ""
        words.say(f"hidden width {figures['width']}{padded}")
    words.json(figures)
