"""A recipe: a YAML file with ``model``, ``out`` and the options of verbs. It is read, checked and written here.

The keys of a section are the verb's options without the dashes in front. A value is what the command line would get:
YAML's own types play no part, so ``5%``, ``1e-4`` and ``no`` mean what they mean there.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any, get_args, get_origin, get_type_hints

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, create_model
from typer.models import ArgumentInfo, OptionInfo

from krony.cli import compress, evaluate, export, heal
from krony.data.yaml_files import EMPTY, keys, line, read_yaml, text
from krony.errors import KronyError

# the modules of the verbs that can be sections: ``run`` is the verb, ``check`` refuses its options before any work
VERBS: dict[str, ModuleType] = {"compress": compress, "heal": heal, "eval": evaluate, "export": export}
SEVERAL = ("export",)  # sections that may be a list
# options that a run sets itself, or that make no sense in it
OWN = ("json", "dry-run", "world-size", "resume", "report")
LIST = "tag:yaml.org,2002:seq"

Options = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Section:
    """The options of one verb.

    Attributes:
        verb: a key of ``VERBS``.
        options: option without dashes -> value, of the option's own type.
        line: where the section begins, counted from 1.
    """

    verb: str
    options: Options
    line: int

    def arguments(self) -> list[str]:
        """The options as the command line takes them."""
        return [word for name, value in self.options.items() for word in _words(name, value)]


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What a file says.

    Attributes:
        file: the file.
        model: MODEL of the first step.
        out: the folder to write.
        sections: in the order in which they are run.
    """

    file: Path
    model: str
    out: Path
    sections: tuple[Section, ...]


def read_recipe(file: Path) -> Recipe:
    """Reads and checks a recipe.

    Raises KronyError, naming the line, for what is no YAML, a section or an option that there isn't, or a value of
    another type than the option's.
    """
    root = read_yaml(file, "recipe")
    top = keys(file, root, "a recipe has the keys model, out, and a section for each verb")
    if unknown := [key for key in top if key not in ("model", "out", *VERBS)]:
        raise KronyError(
            f"{file}, line {line(top[unknown[0]])}: {unknown[0]}: it is one of model, out, {', '.join(VERBS)}"
        )
    named = {key: text(file, top[key], key) if key in top else None for key in ("model", "out")}
    for key, value in named.items():
        if value is None or value in EMPTY:
            raise KronyError(
                f"{file} names no {key}: it needs a line such as {key}: {'demo' if key == 'model' else 'out'}"
            )
    sections = tuple(found for verb in VERBS if verb in top for found in _sections(file, verb, top[verb]))
    if not sections:
        raise KronyError(f"{file} says nothing to do: it needs a section {' or '.join(VERBS)}")
    return Recipe(file=file, model=str(named["model"]), out=Path(str(named["out"])), sections=sections)


def write_recipe(verb: str, model: str, out: str, options: Options) -> str:
    """The text of a recipe with one section."""
    return yaml.safe_dump({"model": model, "out": out, verb: options}, sort_keys=False, allow_unicode=True)


def option_names(verb: str) -> dict[str, str]:
    """The verb's parameters that can be keys: parameter -> key."""
    return {name: key for name, (key, _, _) in _parameters(verb)}


def _sections(file: Path, verb: str, node: yaml.Node) -> Iterator[Section]:
    """The section of a verb, or those of its list. Raises KronyError."""
    nodes = node.value if verb in SEVERAL and node.tag == LIST else [node]
    for each in nodes:
        nodes_by_key = keys(file, each, _needs_options(verb))
        lines = {key: line(value) for key, value in nodes_by_key.items()}
        values = {key: _plain(value) for key, value in nodes_by_key.items()}
        begin = line(each) - (1 if lines and each is node else 0)
        try:
            known = _schema(verb).model_validate({k: v for k, v in values.items() if v is not None})
        except ValidationError as error:
            raise _sentence(file, verb, error, lines, begin) from None
        options = known.model_dump(by_alias=True, exclude_unset=True)
        off = {field.alias for field in type(known).model_fields.values() if field.default is False}
        kept = {key: options[key] for key in values if key in options and not (key in off and options[key] is False)}
        yield Section(verb=verb, options=kept, line=begin)  # without what has no --no- form, and is off anyway


def _sentence(file: Path, verb: str, error: ValidationError, lines: dict[str, int], begin: int) -> KronyError:
    """The first mistake that pydantic found, with its line."""
    first = error.errors(include_url=False)[0]
    key = str(first["loc"][0])
    if first["type"] == "extra_forbidden":
        return KronyError(f"{file}, line {lines[key]}: {key}: {_unknown(verb, key)}")
    if first["type"] == "missing":
        return KronyError(f"{file}, line {begin}: {verb} needs {key}")
    if isinstance(first["input"], yaml.Node):
        file_of = ": name a file that holds it" if key == "scheme" else ""
        return KronyError(f"{file}, line {lines[key]}: {key} takes a value, and this is a mapping{file_of}")
    return KronyError(f"{file}, line {lines[key]}: {key}: {first['input']}: {first['msg'].lower()}")


def _unknown(verb: str, key: str) -> str:
    """Why a verb has no such key, and which may be meant."""
    if key in OWN:
        return "a run sets this itself: leave it out"
    keys = _schema_keys(verb)
    near = get_close_matches(key, keys, n=1)
    hint = f"did you mean {near[0]}?" if near else f"it is one of {', '.join(keys)}"
    return f"krony {verb} has no such option: {hint}"


def _schema(verb: str) -> type[BaseModel]:
    """The options of a verb as a pydantic model, made from the verb's own signature."""
    fields = {name: (kind, info) for name, (_, kind, info) in _parameters(verb)}
    made: type[BaseModel] = create_model(verb, __config__=ConfigDict(extra="forbid"), **fields)  # type: ignore[call-overload]
    return made


def _schema_keys(verb: str) -> list[str]:
    return [key for _, (key, _, _) in _parameters(verb)]


def _parameters(verb: str) -> Iterator[tuple[str, tuple[str, Any, Any]]]:
    """Every parameter that can be a key: its name; and its key, its type and pydantic's field."""
    hints = get_type_hints(VERBS[verb].run, include_extras=True)
    for name, parameter in inspect.signature(VERBS[verb].run).parameters.items():
        kind, info = _split(hints[name])
        if not isinstance(info, OptionInfo):
            continue
        flags = (info.default, *(info.param_decls or ()), f"--{name.replace('_', '-')}")  # typer keeps the first apart
        key = next(str(flag) for flag in flags if str(flag).startswith("--")).partition("/")[0].removeprefix("--")
        if key in OWN:
            continue
        default: Any = ... if parameter.default is inspect.Parameter.empty else parameter.default
        if list in (kind, *map(get_origin, get_args(kind))):  # one value is a list of one
            kind = Annotated[kind, BeforeValidator(lambda value: [value] if isinstance(value, str) else value)]
        yield name, (key, kind, Field(default, alias=key, ge=info.min, le=info.max))


def _split(hint: Any) -> tuple[Any, Any]:
    """The type and typer's description of a parameter."""
    if get_origin(hint) is not Annotated:
        return hint, None
    kind, *marks = get_args(hint)
    return kind, next((mark for mark in marks if isinstance(mark, (OptionInfo, ArgumentInfo))), None)


def _words(name: str, value: Any) -> list[str]:
    """One option as the command line takes it."""
    if isinstance(value, bool):
        return [f"--{name}"] if value else [f"--no-{name}"]
    words = [f"{each}" for each in (value if isinstance(value, list) else [value])]
    return [part for word in words for part in ([f"--{name}={word}"] if word.startswith("-") else [f"--{name}", word])]


def _needs_options(verb: str) -> str:
    return f"{verb} needs options, each on a line such as {_schema_keys(verb)[0]}: value"


def _plain(node: yaml.Node) -> Any:
    """A value as it is written; None where there is none. Mappings stay nodes, which no option takes."""
    if isinstance(node, yaml.ScalarNode):
        return None if node.style is None and node.value in EMPTY else node.value
    if isinstance(node, yaml.SequenceNode):
        return [_plain(each) for each in node.value]
    return node
