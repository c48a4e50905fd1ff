"""The command line: ``krony VERB``. One file a verb; each reads its options, calls the library, and prints."""

from __future__ import annotations

import sys

import typer

from krony._version import __version__
from krony.cli import bench, compress, demo, evaluate, export, generate, heal, inspect, schemes
from krony.cli.output import complain
from krony.errors import KronyError

app = typer.Typer(
    help="Compress the MLPs of pretrained causal language models into sums of Kronecker products.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("demo")(demo.run)
app.command("schemes")(schemes.run)
app.command("compress")(compress.run)
app.command("heal")(heal.run)
app.command("eval")(evaluate.run)
app.command("bench")(bench.run)
app.command("inspect")(inspect.run)
app.command("generate")(generate.run)
app.command("export")(export.run)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"krony {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: bool = typer.Option(False, "--version", callback=_version, is_eager=True, help="Print the version."),
) -> None:
    pass


def main() -> None:
    """The entry point: a user's mistake ends with one sentence on stderr and exit code 2."""
    try:
        app()
    except KronyError as error:
        complain(str(error))
        sys.exit(2)
