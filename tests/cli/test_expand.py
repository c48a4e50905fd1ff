"""A dataclass becomes a verb's options."""

from dataclasses import dataclass
from typing import Annotated

import pytest
import typer
from typer.testing import CliRunner

from krony.cli.expand import Changes, Fields, Given, expand
from krony.options import option


@dataclass(frozen=True)
class Paint:
    colour: str = option("red", "What colour.", metavar="NAME")
    coats: int = option(1, "How many coats.", flag="layers", min=1)
    thin: bool = option(False, "Thin the paint.")
    dry: bool = option(True, "Wait until it is dry.")
    gloss: float | None = option(None, "How glossy.", show_default="matt")


def command(verb):
    app = typer.Typer()
    app.command()(verb)
    return lambda *words: CliRunner().invoke(app, list(words))


@pytest.fixture
def seen():
    return []


@pytest.fixture
def paint(seen):
    @expand
    def verb(wall: Annotated[str, typer.Argument()], paint: Paint, loud: bool = False) -> None:
        seen.append((wall, paint, loud))

    return command(verb)


def test_fields_are_options(paint, seen):
    assert paint("north").exit_code == 0
    words = ("south", "--colour", "blue", "--layers", "2", "--thin", "--no-dry", "--gloss", "0.5", "--loud")
    assert paint(*words).exit_code == 0
    assert seen == [("north", Paint(), False), ("south", Paint("blue", 2, True, False, 0.5), True)]


def test_help_says_what_fields_say(paint):
    said = paint("--help").output
    for words in ("What colour.", "--layers", "NAME", "matt", "--no-dry"):
        assert words in said
    assert "--coats" not in said
    assert "--no-thin" not in said


def test_what_the_command_line_refuses(paint, seen):
    assert paint("north", "--layers", "0").exit_code == 2
    assert paint("north", "--layers", "two").exit_code == 2
    assert seen == []


def test_changes_are_a_dictionary_of_what_was_set(seen):
    @expand
    def verb(changes: Annotated[dict, Changes(Paint, leave_out=("gloss",))]) -> None:
        seen.append(changes)

    run = command(verb)
    assert run().exit_code == 0
    assert run("--layers", "3", "--no-dry").exit_code == 0
    assert seen == [{}, {"coats": 3, "dry": False}]
    assert run("--gloss", "1").exit_code == 2


def test_fields_can_be_left_out(seen):
    @expand
    def verb(paint: Annotated[Paint, Fields(leave_out=("colour",))]) -> None:
        seen.append(paint)

    run = command(verb)
    assert run("--thin").exit_code == 0
    assert seen == [Paint(thin=True)]
    assert run("--colour", "blue").exit_code == 2


def test_what_is_given_wins_over_other_defaults(seen):
    @expand
    def verb(given: Given[Paint], thick: bool = False) -> None:
        seen.append((given.over(**{"colour": "blue", "coats": 4} if thick else {}), given.named))

    run = command(verb)
    assert run().exit_code == 0 and run("--thick", "--layers", "1").exit_code == 0
    assert seen == [(Paint(), frozenset()), (Paint("blue", 1), {"coats"})]
    assert "[default: red]" in run("--help").output
