"""Schemes: which Kronecker shapes an MLP gets, by name, by shape, by the fraction kept, or by a parameter budget.

A scheme is the shape of the left factor of the *tall* matrix of an MLP (``c_fc``, ``gate_proj``, ``up_proj``: hidden
width by model width) and a number of factors; the matrix that leads back takes the transposed shape. It is written

- ``1536x768`` or ``1024x256:4`` (left factor, number of factors),
- ``keep=0.5``: one factor per kept neuron of a group, left factor ``(hidden/r, width)``, k of r neurons kept,
- or one of the paper's names (``67M`` … ``96M``), which mean GPT-2 124M and nothing else.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fractions import Fraction

from krony.errors import KronyError
from krony.kronecker.algebra import KronShape

GPT2_PARAMETERS = 124_439_808  # with the tied head counted once
PAPER_NAMES = {
    "67M": "64x32",
    "68M": "128x64",
    "80M": "1024x256:2",
    "81M": "768x768",
    "92M": "1024x256:4",
    "96M": "1536x768",
}
MULTI_FACTOR = ("128x128", "256x64", "1024x256")  # the paper's MF1 (Table 1), MF1 (Table 2) and MF2

KEEP_TOLERANCE = 0.01  # how far from the wished fraction k/r may lie
KEEP_GROUP = 64  # largest group of neurons that share a left factor's row


@dataclass(frozen=True)
class ModelShape:
    """What a scheme needs to know of a model: all its parameters, and the matrices to replace, written tall."""

    parameters: int
    matrices: tuple[tuple[int, int], ...]  # (rows, columns) with the hidden width as rows

    @property
    def is_gpt2(self) -> bool:
        """Whether this is GPT-2 124M, whose size the paper's names speak of."""
        return self.parameters == GPT2_PARAMETERS and self.matrices == ((3072, 768),) * 24

    def parameters_with(self, scheme: str) -> int:
        """Parameters of the model when every matrix is replaced by ``scheme``, without scalars."""
        shapes = [resolve(scheme, rows, columns) for rows, columns in self.matrices]
        return self.parameters + sum(s.parameters - s.rows * s.columns for s in shapes)


@dataclass(frozen=True)
class SchemeRow:
    """One line of ``krony schemes``: a scheme and what it makes of the model."""

    name: str
    shape: KronShape
    model_params: int

    def to_json(self) -> dict:
        s = self.shape
        return {
            "name": self.name,
            "left": list(s.left),
            "right": list(s.right),
            "factors": s.factors,
            "rank": s.rank,
            "params_per_matrix": s.parameters,
            "model_params": self.model_params,
        }


def check_name(scheme: str, layout: ModelShape) -> None:
    """Raises KronyError if ``scheme`` is one of the paper's names and the model isn't the one they speak of."""
    if scheme in PAPER_NAMES and not layout.is_gpt2:
        shape = resolve(scheme, 3072, 768)
        raise KronyError(
            f"scheme {scheme} is the paper's name for a size of GPT-2 124M, and this is another model: "
            f"keep={shape.parameters / (shape.rows * shape.columns):.2g} keeps the same share of its MLPs"
        )


def resolve(scheme: str, rows: int, columns: int) -> KronShape:
    """The split of a tall ``rows`` by ``columns`` matrix (hidden width by model width) that ``scheme`` means.

    Raises KronyError for a scheme that is misspelt or does not divide the matrix.
    """
    text = PAPER_NAMES.get(scheme, scheme)
    if text.startswith("keep="):
        return _keep(text, rows, columns)
    match = re.fullmatch(r"(\d+)x(\d+)(?::(\d+))?", text)
    if match is None:
        raise KronyError(
            f"scheme {scheme!r} is not understood: write a left factor such as 1536x768 or 1024x256:4, "
            f"a fraction such as keep=0.5, or one of {', '.join(PAPER_NAMES)}"
        )
    m1, n1, factors = (int(g or 1) for g in match.groups())
    return KronShape.split(rows, columns, m1, n1, factors)


def _keep(text: str, rows: int, columns: int) -> KronShape:
    try:
        wish = Fraction(text.removeprefix("keep="))
    except (ValueError, ZeroDivisionError):
        raise KronyError(f"scheme {text!r}: keep= takes a fraction between 0 and 1, such as keep=0.5") from None
    if not 0 < wish < 1:
        raise KronyError(f"scheme {text!r}: keep= takes a fraction between 0 and 1, such as keep=0.5")
    options = [
        (abs(Fraction(k, r) - wish), r, k)
        for r in range(2, min(rows, KEEP_GROUP) + 1)
        if rows % r == 0
        for k in {max(1, int(wish * r)), min(r - 1, int(wish * r) + 1)}
    ]
    if not options or (best := min(options))[0] > KEEP_TOLERANCE:
        near = f"; the nearest is keep={min(options)[2] / min(options)[1]:.3g}" if options else ""
        raise KronyError(f"scheme {text!r}: {rows} hidden neurons can't be grouped so that this share is kept{near}")
    _, r, k = best
    return KronShape.split(rows, columns, rows // r, columns, k)


def full_rank_shapes(rows: int, columns: int) -> Iterator[KronShape]:
    """Every one-factor split whose rank can be full (paper, Table 1), fewest parameters first.

    Of a split and its mirror (A and B exchanged), which cost the same, the one with the larger left factor is listed;
    the last is the matrix itself with a 1x1 right factor. Table 1 starts at 64x32; 48x32 and 64x24 are smaller.
    """
    shapes = [
        KronShape(m1, n1, rows // m1, columns // n1)
        for m1 in _divisors(rows)
        for n1 in _divisors(columns)
        if m1 * n1 >= (rows // m1) * (columns // n1)
    ]
    full = [s for s in shapes if s.rank == min(rows, columns)]
    yield from sorted(full, key=lambda s: (s.parameters, s.m1, s.n1))


def table(layout: ModelShape, *, everything: bool = False, factors: list[int] | None = None) -> list[SchemeRow]:
    """The rows of ``krony schemes``: the paper's names on GPT-2 124M, fractions kept on any other model.

    ``everything`` lists every full-rank shape (Table 1); ``factors`` each shape with each of these counts (Table 2).
    Raises KronyError for a model whose matrices differ in shape, of which there is no one table.
    """
    if len(set(layout.matrices)) != 1:
        raise KronyError(f"the matrices differ in shape ({sorted(set(layout.matrices))}): no one scheme fits them all")
    rows, columns = layout.matrices[0]
    names = {resolve(s, rows, columns): n for n, s in PAPER_NAMES.items()} if layout.is_gpt2 else {}
    if everything:
        shapes = list(full_rank_shapes(rows, columns))
    elif layout.is_gpt2 and factors:
        shapes = sorted(
            {resolve(s.split(":")[0], rows, columns) for s in (*PAPER_NAMES.values(), *MULTI_FACTOR)}, key=_size
        )
    elif layout.is_gpt2:
        shapes = list(names)
    else:
        return [row for e in range(7, 0, -1) for row in _kept(f"keep={e / 8:g}", layout, rows, columns, factors)]
    return [_row(layout, s, names) for shape in shapes for s in with_factors(shape, factors)]


def with_factors(shape: KronShape, counts: list[int] | None) -> Iterator[KronShape]:
    """``shape`` with each of the ``counts`` of factors it can have; as it is where none are asked for."""
    if not counts:
        yield shape
    for k in counts or []:
        if 1 <= k <= shape.max_factors:
            yield KronShape(*shape.left, *shape.right, k)


def for_budget(
    layout: ModelShape, parameters: int, *, neurons: bool, size: Callable[[str], int | None] | None = None
) -> str:
    """The scheme whose model is the largest within ``parameters``; with ``neurons``, of those that keep neurons whole.

    ``size`` tells the parameters of the model with a scheme, or None where it can't be had; ``layout.parameters_with``
    counts no scalars.

    Raises KronyError if the budget is not smaller than the model or too small for any scheme.
    """
    rows, columns = layout.matrices[0]
    if parameters >= layout.parameters:
        raise KronyError(f"a budget of {parameters:,} parameters, but the model has only {layout.parameters:,}")
    if neurons:
        groups = [r for r in _divisors(rows) if 2 <= r <= KEEP_GROUP]
        candidates = [f"{rows // r}x{columns}:{k}" for r in groups for k in range(1, r)]
    else:
        shapes = list(full_rank_shapes(rows, columns))[:-1]
        candidates = [str(s) for shape in shapes for s in with_factors(shape, [1, 2, 3, 4])]
    counted = {c: (size or layout.parameters_with)(c) for c in candidates}
    sizes = {c: count for c, count in counted.items() if count is not None}
    fitting = [c for c in sizes if sizes[c] <= parameters]
    if not sizes:
        raise KronyError("no scheme fits the matrices of this model with these options")
    if not fitting:
        raise KronyError(f"no scheme is within {parameters:,} parameters: the smallest has {min(sizes.values()):,}")
    return max(fitting, key=lambda c: sizes[c])


def parse_parameters(text: str) -> int:
    """``82M``, ``1.2B``, ``82_000_000`` -> a number of parameters. Raises KronyError."""
    match = re.fullmatch(r"([\d_]+(?:\.\d+)?)([kMBG]?)", text)
    if match is None:
        raise KronyError(f"{text!r} is not a number of parameters: write 82M, 1.2B or 82000000")
    return round(float(match[1]) * {"": 1, "k": 1e3, "M": 1e6, "B": 1e9, "G": 1e9}[match[2]])


def _kept(scheme: str, layout: ModelShape, rows: int, columns: int, factors: list[int] | None) -> Iterator[SchemeRow]:
    try:
        shape = resolve(scheme, rows, columns)
    except KronyError:  # this share can't be had of so many neurons
        return
    for s in with_factors(shape, factors):
        yield _row(layout, s, {shape: scheme})


def _row(layout: ModelShape, shape: KronShape, names: dict[KronShape, str]) -> SchemeRow:
    return SchemeRow(names.get(shape, str(shape)), shape, layout.parameters_with(str(shape)))


def _divisors(number: int) -> list[int]:
    return [d for d in range(1, number + 1) if number % d == 0]


def _size(shape: KronShape) -> int:
    return shape.parameters
