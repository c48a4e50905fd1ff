"""``krony export``: writes a compressed model as one that loads without krony."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from krony.cli.options import Json, Model, Out
from krony.cli.output import Output, quiet_libraries
from krony.errors import KronyError


def run(
    model: Model,
    out: Out,
    to: Annotated[
        str,
        typer.Option(
            "--to",
            help="dense: factors multiplied out, the original's size; slim: a smaller hidden width; reference: the "
            "published code's layout in a .pt file.",
        ),
    ] = "dense",
    multiple_of: Annotated[
        int | None, typer.Option(metavar="N", help="slim: round the width up to a multiple of N, such as 64.")
    ] = None,
    json_to: Json = None,
) -> None:
    """Write MODEL to OUT as a plain Hugging Face model that needs no krony."""
    words = Output(json_to, out)
    if multiple_of is not None and to != "slim":
        raise KronyError(f"--multiple-of works with --to slim, and this is --to {to}: leave out --multiple-of")
    if to == "reference":
        _reference(words, model, out)
        return
    from krony.models.export import export_model, slim
    from krony.models.source import ModelSource
    from krony.models.surgery import count_parameters
    from krony.storage.files import check_writable, fresh_folder

    quiet_libraries()
    check_writable(out)
    source = ModelSource.find(model)
    source.check_saves()
    loaded = source.load()
    figures: dict[str, Any] = {"model": model, "out": str(out), "to": to, "params_before": count_parameters(loaded)}
    if to == "slim":
        exported = slim(loaded, multiple_of or 1)
        plain = exported.model
        figures |= {"width": exported.width, "padding": exported.padding}
    else:
        plain = export_model(loaded, to)
    with fresh_folder(out) as folder:
        source.save(plain, folder)
    figures["params_after"] = count_parameters(plain)
    words.say(
        f"{model} -> {out}: {figures['params_before']:,} -> {figures['params_after']:,} parameters, loads without krony"
    )
    if to == "slim":
        words.say(str(exported))
    words.json(figures)


def _reference(words: Output, model: str, out: Path) -> None:
    """Writes the model as a checkpoint of the published code. Raises KronyError unless OUT is a new .pt file."""
    if out.suffix != ".pt":
        raise KronyError(f"{out}: --to reference writes one file, so OUT ends in .pt")
    if out.exists():
        raise KronyError(f"{out} exists already: name a new file")
    from krony.models.loading import load_model
    from krony.models.published_code import to_reference, write_reference
    from krony.models.surgery import count_parameters

    quiet_libraries()
    loaded = load_model(model)
    write_reference(out, to_reference(loaded))
    params = count_parameters(loaded)
    words.say(f"{model} -> {out}: {params:,} parameters in the published code's layout; krony import reads it back")
    words.json({"model": model, "out": str(out), "to": "reference", "params_before": params, "params_after": params})
