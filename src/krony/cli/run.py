"""``krony run``: compress, heal, eval and export as a file says, in one go that resumes."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

import typer

from krony.cli.options import Json
from krony.cli.output import Output, quiet_libraries
from krony.errors import KronyError


def run(
    context: typer.Context,
    recipe: Annotated[str, typer.Argument(metavar="RECIPE.yaml", help="The recipe.", show_default=False)],
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check the recipe, and say which commands it makes; run nothing.")
    ] = False,
    print_it: Annotated[
        bool,
        typer.Option(
            "--print", help="Write the recipe of a command line instead: krony run --print compress MODEL OUT …"
        ),
    ] = False,
    json_to: Json = None,
) -> None:
    """Run compress, heal, eval and export as RECIPE.yaml says. The same command resumes after an interruption.

    A recipe has the keys model and out, and a section for each verb, whose keys are its options. OUT gets the models,
    the recipe, the versions of all packages, and every figure (figures.json).
    """
    commands = context.parent.command.commands  # type: ignore[union-attr]
    if print_it:
        if dry_run or json_to is not None:
            raise KronyError(f"{'--dry-run' if dry_run else '--json'} is no part of a recipe: leave it out")
        typer.echo(_printed(commands, recipe, context.args), nl=False)
        return
    if context.args:
        raise KronyError(f"{context.args[0]}: krony run takes a recipe and nothing else; options stand in its sections")
    _check_alone()
    from krony.cli.recipe_file import read_recipe
    from krony.cli.recipe_steps import FIGURES, Run, comparison
    from krony.storage.locks import working_in

    to = Output(json_to)
    quiet_libraries()
    job = Run(read_recipe(Path(recipe)), commands, to)
    job.check()
    if dry_run:
        job.done()
        for step in job.steps:
            to.say(step.command)
        return
    with working_in(job.recipe.out):
        done = job.go()
    if table := comparison(done):
        to.table(table.columns, table.rows)
    to.say(f"{job.recipe.out} holds {', '.join([*(step.out.name for step in job.steps if step.out), FIGURES])}")
    to.json({"model": job.recipe.model, "steps": done})


def _printed(commands: dict[str, Any], verb: str, words: list[str]) -> str:
    """The recipe of a command line."""
    from krony.cli.recipe_file import VERBS, option_names, write_recipe

    if verb not in VERBS:
        raise KronyError(f"{verb} can't be in a recipe: it is one of {', '.join(VERBS)}")
    names = option_names(verb)
    with commands[verb].make_context(f"krony {verb}", list(words)) as context:
        named = {
            name: value
            for name, value in context.params.items()
            if getattr(context.get_parameter_source(name), "name", "") == "COMMANDLINE"
        }
    model = str(named.pop("model"))
    out = str(named.pop("out", f"{Path(model).name}-run"))
    if others := [name for name in named if name not in names]:
        raise KronyError(f"--{others[0].replace('_', '-')} is no part of a recipe: leave it out")
    options = {names[name]: list(value) if isinstance(value, (list, tuple)) else value for name, value in named.items()}
    return write_recipe(verb, model, out, {key: str(v) if isinstance(v, Path) else v for key, v in options.items()})


def _check_alone() -> None:
    """Raises KronyError under torchrun."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise KronyError(
            "krony run is one process, and torchrun started several: run the commands of krony run --dry-run with it"
        )
