"""A scheme file: YAML with a pattern of layer names per line, and its scheme. ``--scheme FILE.yaml`` reads it."""

from __future__ import annotations

from pathlib import Path

from krony.data.yaml_files import EMPTY, keys, line, read_yaml, text
from krony.errors import KronyError
from krony.kronecker.layer_schemes import DENSE, LayerSchemes
from krony.kronecker.schemes import check_written

NEEDS = 'a scheme file has a pattern and its scheme on each line, such as "*.mlp": keep=0.5'


def read_scheme_file(file: Path) -> LayerSchemes:
    """Reads and checks a scheme file.

    Raises KronyError, naming the line, for what is no YAML, a pattern that is there twice, and a value that is neither
    a scheme nor ``dense``.
    """
    nodes = keys(file, read_yaml(file, "scheme file"), NEEDS)
    if not nodes:
        raise KronyError(f"{file} names no layer: {NEEDS}")
    schemes = {}
    for pattern, node in nodes.items():
        where = f"{file}, line {line(node)}"
        schemes[pattern] = text(file, node, pattern, f"one scheme, such as keep=0.5 or 1024x256:4, or {DENSE}")
        if schemes[pattern] in EMPTY:
            raise KronyError(f"{where}: {pattern} has no scheme: {DENSE} leaves a layer as it is")
        try:
            _ = schemes[pattern] == DENSE or check_written(schemes[pattern])
        except KronyError as error:
            raise KronyError(f"{where}: {pattern}: {error}") from None
    return LayerSchemes(schemes, file=str(file), lines={pattern: line(node) for pattern, node in nodes.items()})
