"""Turns a verb's parameter that is a dataclass into one option per field, so that an option is written down once.

A field made by ``krony.options.option`` brings its help. ``Changes(SomeClass)`` makes every option optional and gives
the verb a dictionary of those that were set. ``Given[SomeClass]`` is for a verb in which other options change defaults.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import MISSING, Field, dataclass, fields, is_dataclass
from typing import Annotated, Any, Generic, TypeVar, get_args, get_origin, get_type_hints

import typer

T = TypeVar("T")
CONTEXT = "typer_context"  # the parameter in which typer says where each value comes from


@dataclass(frozen=True)
class Given(Generic[T]):
    """The options of a dataclass before it is made.

    Attributes:
        kind: the dataclass.
        values: field -> value, its default where the command line says nothing.
        named: the fields that the command line sets.
    """

    kind: type[T]
    values: dict[str, Any]
    named: frozenset[str]

    def over(self, **defaults: Any) -> T:
        """The dataclass with these defaults instead of its own. Raises what it raises for values that it refuses."""
        return self.kind(**self.values | {name: value for name, value in defaults.items() if name not in self.named})


@dataclass(frozen=True)
class Changes:
    """Marks ``Annotated[dict, Changes(SomeClass)]``: every field of the class is an option, and None by default."""

    of: type
    leave_out: tuple[str, ...] = ()


@dataclass(frozen=True)
class Fields:
    """Marks ``Annotated[SomeClass, Fields(...)]``: the fields named here are no options, and keep their defaults."""

    leave_out: tuple[str, ...] = ()


def expand(verb: Callable[..., Any]) -> Callable[..., Any]:
    """Typer sees the options; the verb gets the dataclasses. ``verb.made(context, values)`` makes them and no more.

    Raises what the dataclass raises for values that it refuses.
    """
    hints = get_type_hints(verb, include_extras=True)
    signature = inspect.signature(verb)
    plain: list[inspect.Parameter] = []
    groups: dict[str, tuple[type, type, dict[str, str]]] = {}  # parameter -> class, what the verb gets, option -> field
    for parameter in signature.parameters.values():
        found = _dataclass_of(hints[parameter.name])
        if found is None:
            plain.append(parameter.replace(annotation=hints[parameter.name]))
            continue
        kind, gets, leave_out = found
        options = {_name(field): field for field in fields(kind) if field.name not in leave_out}
        groups[parameter.name] = kind, gets, {name: field.name for name, field in options.items()}
        types_of = get_type_hints(kind)
        plain += [_option(name, field, types_of[field.name], gets is Changes) for name, field in options.items()]

    def made(context: typer.Context, values: dict[str, Any]) -> dict[str, Any]:
        """What the verb is called with, from the values of the options."""
        values = dict(values)
        for parameter, (kind, gets, options) in groups.items():
            taken = {field: values.pop(name) for name, field in options.items()}
            if gets is Changes:
                values[parameter] = {name: value for name, value in taken.items() if value is not None}
            elif gets is Given:
                named = frozenset(field for name, field in options.items() if _is_named(context, name))
                values[parameter] = Given(kind, taken, named)
            else:
                values[parameter] = kind(**taken)
        return values

    @functools.wraps(verb)
    def run(**values: Any) -> Any:
        return verb(**made(values.pop(CONTEXT), values))

    # arguments first: they have no default
    plain.sort(key=lambda parameter: parameter.default is not inspect.Parameter.empty)
    plain.append(inspect.Parameter(CONTEXT, inspect.Parameter.KEYWORD_ONLY, annotation=typer.Context))
    keywords = [parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) for parameter in plain]
    run.__signature__ = signature.replace(parameters=keywords)  # type: ignore[attr-defined]
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in keywords}
    run.made = made  # type: ignore[attr-defined]
    return run


def _is_named(context: typer.Context, name: str) -> bool:
    """Whether the command line sets this option."""
    source = context.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"


def _dataclass_of(hint: Any) -> tuple[type, type, tuple[str, ...]] | None:
    """The dataclass that a parameter's type says, what the verb gets of it, and the fields that are left out."""
    if get_origin(hint) is Given:
        return get_args(hint)[0], Given, ()
    if get_origin(hint) is Annotated:
        for mark in get_args(hint)[1:]:
            if isinstance(mark, Changes):
                return mark.of, Changes, mark.leave_out
            if isinstance(mark, Fields):
                return get_args(hint)[0], Fields, mark.leave_out
        return None
    return (hint, Fields, ()) if isinstance(hint, type) and is_dataclass(hint) else None


def _name(field: Field[Any]) -> str:
    """The option's name as a Python name: ``flag`` says another one than the field's."""
    return str(field.metadata.get("flag", field.name)).removeprefix("--").replace("-", "_")


def _option(name: str, field: Field[Any], kind: Any, changes: bool) -> inspect.Parameter:
    """The keyword parameter that typer makes an option of."""
    said = field.metadata
    default = None if changes or field.default is MISSING else field.default
    settings = {key: said[key] for key in ("metavar", "show_default", "min", "max") if key in said}
    flag = f"--{name.replace('_', '-')}"
    kind = said.get("type", kind)
    both = bool in (kind, *get_args(kind)) and field.default is not False  # what is off by default needs no --no-
    names = [f"{flag}/--no-{flag[2:]}"] if both else [flag]
    settings["rich_help_panel"] = said.get("panel")
    info = typer.Option(*names, help=said.get("help", ""), **settings)
    optional = default is None and type(None) not in get_args(kind)
    annotation: Any = Annotated[kind | None if optional else kind, info]
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)
