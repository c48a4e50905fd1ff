"""``krony data prepare``: text tokenised once, and kept on disk as token ids."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from krony.cli.options import Json
from krony.cli.output import Output, quiet_libraries

app = typer.Typer(help="Tokenise text once, and train on the token ids.", no_args_is_help=True)


@app.command()
def prepare(
    data: Annotated[
        str,
        typer.Argument(
            metavar="TEXT",
            help="A text file, a file of JSON lines (either also as .gz or .zst), python-docs, or a set on the hub, "
            "such as openwebtext.",
        ),
    ],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder for train.bin and val.bin.")],
    tokenizer: Annotated[
        str, typer.Option(metavar="MODEL", help="The model whose tokenizer is used; at most 65,536 tokens.")
    ] = "gpt2",
    val_share: Annotated[float, typer.Option(help="Share of the documents that goes to val.bin; 0 for none.")] = 0.0005,
    seed: Annotated[int, typer.Option(help="Seed of the split.")] = 2357,
    json_to: Json = None,
) -> None:
    """Write nanoGPT's train.bin and val.bin, for krony heal --data OUT/train.bin --val OUT/val.bin.

    The split and its seed are nanoGPT's for OpenWebText. After an interruption the same command resumes the work.
    """
    to = Output(json_to, out)
    from krony.data.prepare import check_data, how_to_resume
    from krony.data.prepare import prepare as write
    from krony.models.loading import load_tokenizer
    from krony.runtime.signals import interruptible

    quiet_libraries()
    check_data(data)  # before a tokenizer is fetched
    with interruptible(lambda: how_to_resume(out)), to.progress() as progress:
        parts = write(data, load_tokenizer(tokenizer), out, val_share=val_share, seed=seed, progress=progress)
    figures = {name: {"file": str(out / f"{name}.bin"), **vars(part)} for name, part in parts.items()}
    to.table(
        ["", "documents", "tokens"],
        [[part["file"], f"{part['documents']:,}", f"{part['tokens']:,}"] for part in figures.values()],
    )
    to.json(figures)
