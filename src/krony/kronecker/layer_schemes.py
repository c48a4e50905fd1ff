"""A scheme per layer: patterns of layer names, each with a scheme, or with ``dense`` for what stays as it is.

A pattern is a glob, in which ``*`` stands for any characters, dots included. It matches a layer if it matches its
dotted name or that of a module around it, so ``transformer.h.0.mlp`` means both matrices. The last pattern that matches
a layer decides, as in a ``.gitignore``; a layer that no pattern matches stays as it is.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path

from krony.errors import KronyError

DENSE = "dense"


@dataclass(frozen=True)
class LayerSchemes:
    """Patterns with their schemes, and where they are written.

    Attributes:
        patterns: pattern -> scheme or ``dense``, in the order in which they are written.
        file: the file that they are from; empty if from none.
        lines: pattern -> its line in the file, counted from 1.

    Raises:
        KronyError: there is no pattern, or something is no text.

    Examples:
        >>> schemes = LayerSchemes({"h.*.mlp": "keep=0.5", "h.0.mlp": "dense"})
        >>> schemes.choose(["h.0.mlp.c_fc", "h.1.mlp.c_fc", "h.1.attn.c_attn"])
        {'h.1.mlp.c_fc': 'keep=0.5'}
    """

    patterns: Mapping[str, str]
    file: str = ""
    lines: Mapping[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.patterns:
            raise KronyError("a scheme per layer has at least one pattern, such as {'transformer.h.*.mlp': 'keep=0.5'}")
        for pattern, scheme in self.patterns.items():
            if not (isinstance(pattern, str) and isinstance(scheme, str)):
                raise KronyError(f"scheme {pattern!r}: {scheme!r}: a pattern and its scheme are texts")

    def __str__(self) -> str:
        return self.file or "per layer"

    def where(self, pattern: str) -> str:
        """Where a pattern is written, in words."""
        line = self.lines.get(pattern)
        return f"{self.file}, line {line}: {pattern}" if line else f"scheme of {pattern!r}"

    def deciding(self, name: str) -> str | None:
        """The pattern that decides about the layer of this name: the last one that matches; None if none does."""
        return next((pattern for pattern in reversed([*self.patterns]) if matches(pattern, name)), None)

    def scheme_for(self, name: str) -> str:
        """The scheme of the layer of this name, ``dense`` if it stays as it is."""
        pattern = self.deciding(name)
        return DENSE if pattern is None else self.patterns[pattern]

    def choose(self, names: Iterable[str]) -> dict[str, str]:
        """The scheme of each layer to replace, in the order of ``names``: all layers of the model that can be.

        Raises KronyError for a pattern that matches no layer, or all of whose layers a later one matches too, and where
        no layer is replaced.
        """
        names, patterns = list(names), list(self.patterns)
        for index, pattern in enumerate(patterns):
            own = [name for name in names if matches(pattern, name)]
            if not own:
                known = ", ".join(names[:4]) or "none at all"
                raise KronyError(f"{self.where(pattern)} matches no linear layer; there are, for example, {known}")
            for later in patterns[index + 1 :]:
                if all(matches(later, name) for name in own):
                    raise KronyError(
                        f"{self.where(pattern)} decides nothing, because {later} comes later and matches all of its "
                        f"layers, and the last pattern that matches decides: move {pattern} below {later}"
                    )
        decided = {name: self.deciding(name) for name in names}
        chosen = {name: self.patterns[pattern] for name, pattern in decided.items() if pattern is not None}
        chosen = {name: scheme for name, scheme in chosen.items() if scheme != DENSE}
        if not chosen:
            raise KronyError(f"{self.file or 'scheme'}: every pattern says {DENSE}, so there is nothing to replace")
        return chosen


def is_file(scheme: str | Path) -> bool:
    """Whether this is the name of a file with a scheme per layer, and not a scheme (``krony.data.scheme_file``).

    Examples:
        >>> is_file("layers.yaml"), is_file("1024x256:4"), is_file("keep=0.5")
        (True, False, False)
    """
    return Path(scheme).suffix.lower() in (".yaml", ".yml")


def matches(pattern: str, name: str) -> bool:
    """Whether a pattern matches a layer's dotted name, or that of a module around it.

    Examples:
        >>> [matches(pattern, "h.10.mlp.c_fc") for pattern in ("h.10", "*.c_fc", "h.1", "mlp.c_fc")]
        [True, True, False, False]
    """
    parts = name.split(".")
    return any(fnmatchcase(".".join(parts[:count]), pattern) for count in range(len(parts), 0, -1))
