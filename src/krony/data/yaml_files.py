"""YAML files as they are written: keys and values as texts with their lines, so that a mistake is named with its line.

YAML's own types play no part: ``no`` is the text ``no``.
"""

from __future__ import annotations

from pathlib import Path

import yaml

from krony.data.text_files import read_text
from krony.errors import KronyError
from krony.storage.paths import check_regular

LARGEST = 1 << 20  # bytes
EMPTY = ("", "~", "null")  # how YAML writes that there is no value


def read_yaml(file: Path, kind: str) -> yaml.Node | None:
    """The root of a YAML file; None where it holds only comments.

    ``kind`` says what the file is meant to be, such as ``recipe``. Raises KronyError, naming the line, for what is no
    YAML, and for a file that can't be read.
    """
    check_regular(file)
    if file.stat().st_size > LARGEST:
        raise KronyError(f"{file} is no {kind}: it is larger than {LARGEST:,} bytes")
    try:
        root: yaml.Node | None = yaml.compose(read_text(file), yaml.SafeLoader)
    except yaml.YAMLError as error:
        mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None) or str(error)
        where = f", line {mark.line + 1}" if mark else ""
        quote = "; a text that begins with * stands in quotes" if "alias" in f"{error}" else ""
        raise KronyError(f"{file}{where}: this is no YAML: {problem}{quote}") from None
    return root


def line(node: yaml.Node) -> int:
    """The line on which a node begins, counted from 1."""
    return int(node.start_mark.line) + 1


def keys(file: Path, node: yaml.Node | None, needs: str) -> dict[str, yaml.Node]:
    """The keys of a mapping with their values. Raises KronyError where it is none, or has a key twice.

    ``needs`` says what belongs there, in words.
    """
    if isinstance(node, yaml.ScalarNode) and node.value in EMPTY:
        return {}
    if not isinstance(node, yaml.MappingNode):
        where = "" if node is None else f", line {line(node)}"
        raise KronyError(f"{file}{where}: {needs}")
    found: dict[str, yaml.Node] = {}
    for key, value in node.value:
        name = str(key.value)
        if name in found:
            raise KronyError(f"{file}, line {line(key)}: {name} is there twice")
        found[name] = value
    return found


def text(file: Path, node: yaml.Node, key: str, what: str = "a name") -> str:
    """The text of a value. Raises KronyError for a list or a mapping."""
    if not isinstance(node, yaml.ScalarNode):
        raise KronyError(f"{file}, line {line(node)}: {key} is {what}")
    return str(node.value)
