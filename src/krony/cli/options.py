"""Options that several verbs share, so that their names and help texts are the same everywhere."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from krony.errors import KronyError
from krony.options import option
from krony.runtime.seeds import SEEDS

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
Seed = Annotated[int, typer.Option(help="Seed of everything random.", min=0, max=SEEDS - 1)]
DataDir = Annotated[
    Path | None,
    typer.Option(metavar="DIR", help="Read named data sets from DIR (DIR/wikitext-2/…) instead of the hub."),
]


@dataclass(frozen=True, kw_only=True)
class TextOptions:
    """Which text is read, how much of it, and whether its second moments are kept."""

    calibration: str | None = option(
        None,
        "Text that calibrated inits, --reconstruct and --tune read: a text or jsonl file, python-docs, a set on the "
        "hub, or self, which is text that the model writes. Use text similar to what the model will see in use.",
        metavar="TEXT",
    )
    calibration_tokens: int = option(49_152, "Read at most N tokens of it.", metavar="N")
    cache: bool = option(True, "Keep the second moments of the text, and use those that were kept.")

    def needed_by(self, asker: str) -> str:
        """The text's name. Raises KronyError if none is given."""
        if self.calibration is None:
            raise KronyError(
                f"{asker} needs text similar to what the model will see in use: --calibration FILE (.txt or .jsonl), "
                "python-docs, or a set on the hub"
            )
        return self.calibration
