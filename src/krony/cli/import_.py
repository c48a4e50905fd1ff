"""``krony import``: writes a checkpoint of the published code as a compressed model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from krony.cli.options import Json, Out
from krony.cli.output import Output, quiet_libraries


def run(
    file: Annotated[
        Path, typer.Argument(metavar="FILE.pt", help="A checkpoint of the published code.", show_default=False)
    ],
    out: Out,
    like: Annotated[
        str, typer.Option(metavar="MODEL", help="The GPT-2 that was compressed; gives heads and tokenizer.")
    ] = "gpt2",
    activation: Annotated[
        str, typer.Option(help="gelu_new: GPT-2's, used in the paper's evaluation; gelu: erf, used in its training.")
    ] = "gelu_new",
    json_to: Json = None,
) -> None:
    """Read a checkpoint in the published code's layout (padas-lab-de/krony-PT), and write it as a model to OUT."""
    to = Output(json_to, out)
    from krony.compression.model_card import imported_card
    from krony.models.published_code import from_reference, read_reference
    from krony.models.source import ModelSource
    from krony.models.surgery import count_parameters, kronecker_layers
    from krony.storage.files import check_writable, fresh_folder

    quiet_libraries()
    check_writable(out)
    source = ModelSource.find(like)
    model = from_reference(read_reference(file), source.config, activation=activation)
    if (generation := source.generation_config) is not None:
        model.generation_config = generation
    shape = next(iter(kronecker_layers(model).values())).shape
    params = count_parameters(model)
    card = imported_card(like, file.name, str(shape), params)
    with fresh_folder(out) as folder:
        source.save(model, folder)
        (folder / "README.md").write_text(card, encoding="utf-8")
    to.say(f"{file} -> {out}: {model.config.n_layer} layers of scheme {shape}, {params:,} parameters, {activation}")
    if not source.has_tokenizer:
        to.say(f"without a tokenizer: none of {like} can be read here, so copy GPT-2's into {out}")
    to.json({"file": str(file), "out": str(out), "scheme": str(shape), "params": params, "activation": activation})
