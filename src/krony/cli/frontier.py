"""``krony frontier``: what each size of a model loses."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from krony.cli.expand import Changes, expand
from krony.cli.options import Device, Dtype, Json, Model, TextOptions
from krony.cli.output import Output, quiet_libraries
from krony.config import KronyConfig
from krony.errors import KronyError
from krony.sizing.defaults import GLOBAL_ALLOCATION, KEEPS

Validation = Annotated[
    str | None,
    typer.Option(
        metavar="TEXT",
        help="Text to measure on.",
        show_default="a tenth of the documents, held back; the held-out part of python-docs",
    ),
]
Keep = Annotated[str, typer.Option(metavar="X,X,…", help="Shares of hidden neurons to keep.")]
Plot = Annotated[Path | None, typer.Option(metavar="FILE.svg", help="A picture: perplexity against parameters.")]
SHARES = ",".join(map(str, KEEPS))
How = Annotated[
    dict[str, Any], Changes(KronyConfig, leave_out=("scheme", "reinit", "rescale", "scalar_init", "embedding"))
]


@expand
def run(
    model: Model,
    *,
    text: TextOptions,
    val: Validation = None,
    keep: Keep = SHARES,
    changes: How,
    plot: Plot = None,
    device: Device = "cpu",
    dtype: Dtype = "auto",
    json_to: Json = None,
) -> None:
    """Show what each size of MODEL loses: predicted, and measured on text held back from calibration.

    Every size is compressed from one calibration, without training (unless --tune or --reconstruct ask for it), with
    one budget for all layers (--allocation global). MODEL does not change, and no model is written.
    """
    to = Output(json_to)
    config, keeps, calibration = KronyConfig(**GLOBAL_ALLOCATION | changes), _shares(keep), text.needed_by("frontier")
    from krony.models.source import ModelSource
    from krony.runtime import distributed
    from krony.sizing.frontier import frontier
    from krony.storage.files import cache_folder, check_file, write_text

    if plot is not None:
        check_file(plot, ".svg")
    quiet_libraries()
    source = ModelSource.find(model)
    own = distributed.init(device, patience=distributed.LAYER_PATIENCE)
    loaded, tokenizer = source.load(dtype=dtype, device=own), source.tokenizer
    with to.progress() as progress:
        found = frontier(
            loaded, calibration, tokenizer=tokenizer, val=val, keeps=keeps, config=config,
            tokens=text.calibration_tokens, cache=cache_folder() if text.cache else None, progress=progress,
        )  # fmt: skip
    if not distributed.is_first():
        return
    table = found.table()
    to.table(table.columns, table.rows)
    to.say(found.summary())
    if plot is not None:
        write_text(plot, found.picture())
        to.say(f"the picture is in {plot}")
    to.json(found.to_json() | {"model": model})


def _shares(text: str) -> list[float]:
    """The numbers of ``--keep``. Raises KronyError."""
    try:
        shares = [float(part) for part in text.split(",")]
    except ValueError:
        shares = [0.0]
    if not all(0 < share < 1 for share in shares):
        raise KronyError(f"--keep {text}: it takes shares between 0 and 1, such as 0.75,0.5")
    return shares
