"""Options that several verbs share, so that their names and help texts are the same everywhere."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL", help="A folder, a name on the hub, or demo, which comes with krony.", show_default=False
    ),
]
Out = Annotated[Path, typer.Argument(metavar="OUT", help="Folder to write; it must be new or empty.")]
Json = Annotated[str | None, typer.Option("--json", metavar="FILE|-", help="Write the figures as JSON; - is stdout.")]
Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:1, mps, or auto to spread the model.")]
Dtype = Annotated[str, typer.Option(help="auto (as saved), float32, bfloat16 or float16.")]
Seed = Annotated[int, typer.Option(help="Seed of everything random.")]
DataDir = Annotated[
    Path | None,
    typer.Option(metavar="DIR", help="Read named data sets from DIR (DIR/wikitext-2/…) instead of the hub."),
]
