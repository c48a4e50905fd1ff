"""``krony push``: uploads a model to the Hugging Face hub."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from krony.cli.options import Json
from krony.cli.output import Output, quiet_libraries
from krony.errors import KronyError


def run(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="What a verb of krony wrote.", show_default=False)],
    name: Annotated[str, typer.Argument(metavar="NAME", help="The repository, such as you/gpt2-half.")],
    private: Annotated[
        bool, typer.Option("--private", help="Make it visible to its owner only, if it is new.")
    ] = False,
    json_to: Json = None,
) -> None:
    """Upload the model in FOLDER to the hub as NAME, with its card. The hub must know you: hf auth login."""
    to = Output(json_to)
    if not folder.is_dir():
        raise KronyError(f"{folder} is no folder: name what a verb of krony wrote")
    from krony.storage.hub import push

    quiet_libraries()
    address = push(folder, name, private=private)
    to.say(f"{folder} -> {address}")
    to.json({"folder": str(folder), "name": name, "address": address})
