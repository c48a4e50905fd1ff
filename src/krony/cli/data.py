"""``krony data prepare``: text as token ids on disk."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from krony.cli.options import Json
from krony.cli.output import Output, quiet_libraries

app = typer.Typer(help="Text as token ids on disk, to train on.", no_args_is_help=True)


@app.command()
def prepare(
    data: Annotated[
        str, typer.Argument(metavar="TEXT", help="A jsonl or text file, python-docs, or a set on the hub: openwebtext.")
    ],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder for train.bin and val.bin.")],
    tokenizer: Annotated[str, typer.Option(metavar="MODEL", help="Whose tokens; 65,536 of them at most.")] = "gpt2",
    val_share: Annotated[float, typer.Option(help="Share of the documents that goes to val.bin; 0 for none.")] = 0.0005,
    seed: Annotated[int, typer.Option(help="Seed of the split.")] = 2357,
    json_to: Json = None,
) -> None:
    """Write nanoGPT's train.bin and val.bin, for krony heal --data OUT/train.bin --val OUT/val.bin.

    The split and its seed are nanoGPT's for OpenWebText. Stopped, the same command goes on where it was.
    """
    to = Output(json_to, out)
    from krony.data.prepare import look_at
    from krony.data.prepare import prepare as write
    from krony.models.loading import load_tokenizer

    quiet_libraries()
    look_at(data)  # before a tokenizer is fetched
    with to.progress() as progress:
        parts = write(data, load_tokenizer(tokenizer), out, val_share=val_share, seed=seed, progress=progress)
    figures = {name: {"file": str(out / f"{name}.bin"), **vars(part)} for name, part in parts.items()}
    to.table(
        ["", "documents", "tokens"],
        [[part["file"], f"{part['documents']:,}", f"{part['tokens']:,}"] for part in figures.values()],
    )
    to.json(figures)
