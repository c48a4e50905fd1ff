"""``krony reproduce``: the paper's tables, run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from krony.cli.options import DataDir, Device, Json, Seed
from krony.cli.output import Output, quiet_libraries
from krony.errors import KronyError


def run(
    target: Annotated[str, typer.Argument(metavar="TABLE", help="table1 … table9, or figure1.", show_default=False)],
    model: Annotated[
        str, typer.Option(metavar="MODEL", help="In GPT-2's place: a folder, a name on the hub, or demo.")
    ] = "gpt2",
    data_dir: DataDir = None,
    data: Annotated[
        str | None, typer.Option(metavar="TEXT", help="Text to train on, instead of DIR/openwebtext/train.*.")
    ] = None,
    budget: Annotated[
        str, typer.Option(help="quick: minutes on a small model; full: the paper's token counts.")
    ] = "quick",
    work: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR", help="Keep what is trained here: other tables share it, and a stopped run goes on."
        ),
    ] = None,
    plot: Annotated[Path | None, typer.Option(metavar="FILE.svg", help="figure1: draw it.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say how many tokens and how long, and stop.")] = False,
    device: Device = "cpu",
    seed: Seed = 0,
    json_to: Json = None,
) -> None:
    """Run what a table of the paper needs, and print the paper's figure, ours and the difference."""
    to = Output(json_to)
    from krony.storage.files import check_file, write_text

    if plot is not None:
        check_file(plot, ".svg")
        if target != "figure1":
            raise KronyError(f"--plot {plot}: it draws figure1, and this is {target}")
    from krony.pages import lines
    from krony.reproduce.lines import TableOptions
    from krony.reproduce.targets import reproduce

    quiet_libraries()
    said: list[str] = []

    def say(sentence: str) -> None:
        said.append(sentence)
        to.say(sentence)

    with to.progress() as progress:
        outcome = reproduce(
            target,
            TableOptions(
                model=model,
                data_dir=data_dir,
                data=data,
                budget=budget,
                work=work,
                dry_run=dry_run,
                device=device,
                seed=seed,
                say=say,
                progress=progress,
            ),
        )
    for sentence in outcome.header:
        if sentence not in said:
            to.say(sentence)
    if outcome.lines:
        to.say(f"{target}: {outcome.title}")
        table = outcome.table()
        to.table(table.columns, table.rows)
    for sentence in outcome.footer:
        to.say(sentence)
    if plot is not None and outcome.curves:
        write_text(plot, lines(outcome.curves, "share of an epoch", "validation loss, nats a token", log=False))
    to.json(outcome.to_json())
