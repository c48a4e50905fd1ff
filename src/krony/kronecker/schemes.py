"""Schemes: which Kronecker shapes an MLP gets, by name, by shape, by the fraction to keep, or by a parameter budget.

A scheme is the shape of the left factor of the *tall* matrix of an MLP (``c_fc``, ``gate_proj``, ``up_proj``: hidden
width by model width) and a number of factors; the down matrix takes the transposed shape. It is written

- ``1536x768`` or ``1024x256:4`` (left factor, number of factors),
- ``keep=0.5``: left factor ``(hidden/r, width)`` and k factors, which keep k of every r neurons,
- or one of the paper's names (``67M`` … ``96M``), which are sizes of GPT-2 124M only.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

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

KEEP_TOLERANCE = 0.01  # how far k/r may be from the requested fraction
KEEP_GROUP = 64  # largest group of neurons that share a left factor's row


@dataclass(frozen=True)
class ModelShape:
    """A model's number of parameters and the shapes of the matrices to replace, written tall.

    Examples:
        >>> ModelShape(124_439_808, ((3072, 768),) * 24).parameters_with("81M")
        81972576
    """

    parameters: int
    matrices: tuple[tuple[int, int], ...]  # (rows, columns) with the hidden width as rows

    @property
    def is_gpt2(self) -> bool:
        """Whether this is GPT-2 124M, the model that the paper's names are sizes of."""
        return self.parameters == GPT2_PARAMETERS and self.matrices == ((3072, 768),) * 24

    def parameters_with(self, scheme: str) -> int:
        """Parameters of the model when every matrix is replaced by ``scheme``, without scalars."""
        shapes = [resolve(scheme, rows, columns) for rows, columns in self.matrices]
        return self.parameters + sum(s.parameters - s.rows * s.columns for s in shapes)


@dataclass(frozen=True)
class SchemeRow:
    """One line of ``krony schemes``: a scheme and the number of parameters of the compressed model."""

    name: str
    shape: KronShape
    model_params: int

    def to_json(self) -> dict[str, Any]:
        """The entry of ``krony schemes --json``."""
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


def check_name(scheme: str, model: ModelShape) -> None:
    """Raises KronyError if ``scheme`` is one of the paper's names and the model isn't GPT-2 124M."""
    if scheme in PAPER_NAMES and not model.is_gpt2:
        shape = resolve(scheme, 3072, 768)
        raise KronyError(
            f"scheme {scheme} is the paper's name for a size of GPT-2 124M, and this is another model: "
            f"keep={shape.parameters / (shape.rows * shape.columns):.2g} keeps the same share of its MLPs"
        )


def resolve(scheme: str, rows: int, columns: int) -> KronShape:
    """The split of a tall ``rows`` by ``columns`` matrix (hidden width by model width) that ``scheme`` means.

    Raises:
        KronyError: the scheme is misspelt or does not divide the matrix.

    Examples:
        >>> resolve("1024x256:2", 3072, 768)
        KronShape(m1=1024, n1=256, m2=3, n2=3, factors=2)
        >>> str(resolve("keep=0.75", 3072, 768)), str(resolve("81M", 3072, 768))
        ('768x768:3', '768x768')
    """
    written = check_written(scheme)
    if isinstance(written, Fraction):
        return _keep(scheme, written, rows, columns)
    m1, n1, factors = written
    return KronShape.split(rows, columns, m1, n1, factors)


def check_written(scheme: str) -> Fraction | tuple[int, int, int]:
    """What a scheme says without a matrix: the fraction to keep, or rows and columns of the left factor, and factors.

    Raises KronyError if it is misspelt.

    Examples:
        >>> check_written("keep=0.5"), check_written("80M")
        (Fraction(1, 2), (1024, 256, 2))
    """
    text = PAPER_NAMES.get(scheme, scheme)
    if text.startswith("keep="):
        try:
            wanted = Fraction(text.removeprefix("keep="))
        except (ValueError, ZeroDivisionError):
            wanted = Fraction(0)
        if not 0 < wanted < 1:
            raise KronyError(f"scheme {text!r}: keep= takes a fraction between 0 and 1, such as keep=0.5")
        return wanted
    match = re.fullmatch(r"(\d+)x(\d+)(?::(\d+))?", text)
    if match is None:
        raise KronyError(
            f"scheme {scheme!r} is not understood: write a left factor such as 1536x768 or 1024x256:4, "
            f"a fraction such as keep=0.5, or one of {', '.join(PAPER_NAMES)}"
        )
    m1, n1, factors = (int(g or 1) for g in match.groups())
    return m1, n1, factors


def _keep(text: str, wanted: Fraction, rows: int, columns: int) -> KronShape:
    options = [
        (abs(Fraction(k, r) - wanted), r, k)
        for r in range(2, min(rows, KEEP_GROUP) + 1)
        if rows % r == 0
        for k in {max(1, int(wanted * r)), min(r - 1, int(wanted * r) + 1)}
    ]
    if not options or (best := min(options))[0] > KEEP_TOLERANCE:
        near = f"; the nearest is keep={min(options)[2] / min(options)[1]:.3g}" if options else ""
        raise KronyError(f"scheme {text!r}: {rows} hidden neurons can't be grouped to keep this fraction{near}")
    _, r, k = best
    return KronShape.split(rows, columns, rows // r, columns, k)


def full_rank_shapes(rows: int, columns: int) -> Iterator[KronShape]:
    """Every one-factor split whose rank can be full (paper, Table 1), fewest parameters first.

    Exchanging A and B costs the same: of the two splits the one with the larger left factor is listed. The last one is
    the matrix itself with a 1x1 right factor. Table 1 starts at 64x32; 48x32 and 64x24 are smaller.

    Examples:
        >>> [str(shape) for shape in full_rank_shapes(4, 2)]
        ['2x2', '4x2']
    """
    shapes = [
        KronShape(m1, n1, rows // m1, columns // n1)
        for m1 in _divisors(rows)
        for n1 in _divisors(columns)
        if m1 * n1 >= (rows // m1) * (columns // n1)
    ]
    full = [s for s in shapes if s.rank == min(rows, columns)]
    yield from sorted(full, key=lambda s: (s.parameters, s.m1, s.n1))


def table(model: ModelShape, *, everything: bool = False, factors: list[int] | None = None) -> list[SchemeRow]:
    """The rows of ``krony schemes``: the paper's names for GPT-2 124M, fractions to keep for any other model.

    Args:
        everything: list every full-rank shape (paper, Table 1).
        factors: list each shape with each of these numbers of factors (paper, Table 2).

    Raises:
        KronyError: the model's matrices differ in shape, so that no single table describes it.
    """
    if len(set(model.matrices)) != 1:
        raise KronyError(
            f"the matrices differ in shape ({sorted(set(model.matrices))}): no single scheme fits all of them"
        )
    rows, columns = model.matrices[0]
    names = {resolve(s, rows, columns): n for n, s in PAPER_NAMES.items()} if model.is_gpt2 else {}
    if everything:
        shapes = list(full_rank_shapes(rows, columns))
    elif model.is_gpt2 and factors:
        shapes = sorted(
            {resolve(s.split(":")[0], rows, columns) for s in (*PAPER_NAMES.values(), *MULTI_FACTOR)}, key=_size
        )
    elif model.is_gpt2:
        shapes = list(names)
    else:
        return [
            row for e in range(7, 0, -1) for row in _fraction_rows(f"keep={e / 8:g}", model, rows, columns, factors)
        ]
    return [_row(model, s, names) for shape in shapes for s in with_factors(shape, factors)]


def with_factors(shape: KronShape, counts: list[int] | None) -> Iterator[KronShape]:
    """``shape`` with each number of factors in ``counts`` that it can have; ``shape`` itself without ``counts``."""
    if not counts:
        yield shape
    for k in counts or []:
        if 1 <= k <= shape.max_factors:
            yield KronShape(*shape.left, *shape.right, k)


def for_budget(
    model: ModelShape, parameters: int, *, neurons: bool, size: Callable[[str], int | None] | None = None
) -> str:
    """The scheme of the largest compressed model with at most ``parameters`` parameters.

    Args:
        neurons: consider only schemes that keep or drop complete neurons.
        size: returns the number of parameters of the model with a scheme, or None if the scheme doesn't apply; None
            stands for ``model.parameters_with``, which counts no scalars.

    Raises:
        KronyError: the budget is not smaller than the model, or too small for any scheme.
    """
    rows, columns = model.matrices[0]
    if parameters >= model.parameters:
        raise KronyError(f"a budget of {parameters:,} parameters, but the model has only {model.parameters:,}")
    if neurons:
        groups = [r for r in _divisors(rows) if 2 <= r <= KEEP_GROUP]
        candidates = [f"{rows // r}x{columns}:{k}" for r in groups for k in range(1, r)]
    else:
        shapes = list(full_rank_shapes(rows, columns))[:-1]
        candidates = [str(s) for shape in shapes for s in with_factors(shape, [1, 2, 3, 4])]
    counted = {c: (size or model.parameters_with)(c) for c in candidates}
    sizes = {c: count for c, count in counted.items() if count is not None}
    fitting = [c for c in sizes if sizes[c] <= parameters]
    if not sizes:
        raise KronyError("no scheme fits the matrices of this model with these options")
    if not fitting:
        raise KronyError(f"no scheme is within {parameters:,} parameters: the smallest has {min(sizes.values()):,}")
    return max(fitting, key=lambda c: sizes[c])


def parse_parameters(text: str) -> int:
    """The number of parameters that a text such as ``82M`` means. Raises KronyError if it means none.

    Examples:
        >>> parse_parameters("1.2B"), parse_parameters("82_000_000")
        (1200000000, 82000000)
    """
    match = re.fullmatch(r"(\d[\d_]*(?:\.\d+)?)([kMBG]?)", text)
    if match is None:
        raise KronyError(f"{text!r} is not a number of parameters: write 82M, 1.2B or 82000000")
    return round(float(match[1]) * {"": 1, "k": 1e3, "M": 1e6, "B": 1e9, "G": 1e9}[match[2]])


def _fraction_rows(
    scheme: str, model: ModelShape, rows: int, columns: int, factors: list[int] | None
) -> Iterator[SchemeRow]:
    try:
        shape = resolve(scheme, rows, columns)
    except KronyError:  # the number of neurons does not allow this fraction
        return
    for s in with_factors(shape, factors):
        yield _row(model, s, {shape: scheme})


def _row(model: ModelShape, shape: KronShape, names: dict[KronShape, str]) -> SchemeRow:
    return SchemeRow(names.get(shape, str(shape)), shape, model.parameters_with(str(shape)))


def _divisors(number: int) -> list[int]:
    return [d for d in range(1, number + 1) if number % d == 0]


def _size(shape: KronShape) -> int:
    return shape.parameters
