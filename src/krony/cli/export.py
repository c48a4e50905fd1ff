"""``krony export``: a compressed model becomes one that loads without krony."""

from __future__ import annotations

from typing import Annotated

import typer

from krony.cli.options import Json, Model, Out
from krony.cli.output import Output, quiet_libraries


def run(
    model: Model,
    out: Out,
    to: Annotated[str, typer.Option("--to", help="dense: factors multiplied out, the original's size.")] = "dense",
    json_to: Json = None,
) -> None:
    """Write MODEL to OUT as a plain Hugging Face model that needs no krony."""
    words = Output(json_to)
    from krony.export import export_model
    from krony.files import check_writable, fresh_folder
    from krony.models import load_model, save
    from krony.surgery import count_parameters

    quiet_libraries()
    check_writable(out)
    loaded = load_model(model)
    before = count_parameters(loaded)
    plain = export_model(loaded, to)
    with fresh_folder(out) as folder:
        save(plain, folder, source=model)
    after = count_parameters(plain)
    words.say(f"{model} -> {out}: {before:,} -> {after:,} parameters, no krony needed")
    words.json({"model": model, "out": str(out), "to": to, "params_before": before, "params_after": after})
