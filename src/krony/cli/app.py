"""The command line's verbs in their order, and what every error that a user can mend ends with."""

from __future__ import annotations

import sys
from typing import Any

import typer
from typer.core import TyperGroup

from krony._version import __version__
from krony.cli import (
    bench,
    compress,
    data,
    demo,
    evaluate,
    export,
    frontier,
    generate,
    heal,
    import_,
    inspect,
    push,
    reproduce,
    run,
    schemes,
)
from krony.cli.output import complain
from krony.errors import KronyError, PromiseError
from krony.runtime.signals import Stopped, interruptible


class _Verbs(TyperGroup):
    """Ctrl-C, SIGTERM and SIGHUP end every verb with one sentence; a verb may say a better one."""

    def invoke(self, ctx: Any) -> Any:
        with interruptible(lambda: "nothing was written"):
            return super().invoke(ctx)


app = typer.Typer(
    cls=_Verbs,
    help="Compress the MLPs of pretrained causal language models into sums of Kronecker products.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("demo")(demo.run)
app.command("schemes")(schemes.run)
app.command("frontier")(frontier.run)
app.command("compress")(compress.run)
app.command("heal")(heal.run)
app.add_typer(data.app, name="data")
app.command("eval")(evaluate.run)
app.command("bench")(bench.run)
app.command("inspect")(inspect.run)
app.command("generate")(generate.run)
app.command("export")(export.run)
app.command("run", context_settings={"allow_extra_args": True, "ignore_unknown_options": True})(run.run)
app.command("push")(push.run)
app.command("import")(import_.run)
app.command("reproduce")(reproduce.run)


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
    """The entry point. Every error that a user can mend is one sentence on stderr.

    Exit codes: 0 done, 1 a promise is not kept, 2 bad input or a refusal of the system, 128 + n stopped by
    signal n.
    """
    try:
        app()
        return
    except Stopped as stopped:
        complain(stopped.sentence, kind="stopped")
        sys.exit(stopped.code)
    except PromiseError as error:
        complain(str(error), kind="not done")
        sys.exit(1)
    except KronyError as error:
        complain(str(error))
    except OSError as error:  # a full disk, a file that may not be read
        complain(f"{error.filename}: {error.strerror}" if error.filename else str(error))
    except (MemoryError, RuntimeError) as error:
        complain(_explained(error))
    sys.exit(2)


def _explained(error: MemoryError | RuntimeError) -> str:
    """What the user can do about an error of torch's; anything else is raised again."""
    from krony.runtime import distributed
    from krony.runtime.hardware import is_out_of_memory

    if is_out_of_memory(error):
        return (
            "there is not enough memory: compress --stream holds one layer at a time, heal --batch and "
            "--gradient-checkpointing need less at once, and so do shorter or fewer sequences"
        )
    if isinstance(error, RuntimeError) and distributed.is_lost_connection(error):
        return distributed.LOST
    raise error
