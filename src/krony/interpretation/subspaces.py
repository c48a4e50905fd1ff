"""Effective ranks, and principal angles between subspaces."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from krony.interpretation.views import Similarity

DIRECTIONS = 16  # leading directions of a left factor that are compared, at most a quarter of the space


def effective_rank(values: Tensor) -> float:
    """The effective rank of a matrix with these singular values ``(n,)``; 0 for a matrix of zeros.

    ``exp(-Σ p log p)`` with ``p = σ/Σσ`` (Roy & Vetterli, The effective rank: a measure of effective dimensionality,
    2007): n for n equal values, 1 for a single one.

    Examples:
        >>> effective_rank(torch.tensor([2.0, 2.0, 2.0, 0.0]))
        3.0
    """
    total = values.double().sum()
    if total == 0:
        return 0.0
    return round(torch.special.entr(values.double() / total).sum().exp().item(), 9)


def cosines(one: Tensor, other: Tensor) -> Tensor:
    """The cosines of the principal angles between two subspaces, descending, ``(min(r, s),)`` (Björck & Golub 1973).

    Args:
        one: an orthonormal basis as columns, ``(n, r)``.
        other: another, ``(n, s)``.

    Examples:
        >>> cosines(torch.eye(3)[:, :2], torch.eye(3)[:, 1:])
        tensor([1., 0.])
    """
    return torch.linalg.svdvals(one.T @ other).clamp_max(1.0)


def leading(vectors: Tensor) -> Tensor:
    """The first columns of ``(n, r)`` singular vectors: ``DIRECTIONS``, at most a quarter of n and at least one."""
    return vectors[:, : max(1, min(DIRECTIONS, len(vectors) // 4))]


def span(right: Tensor) -> Tensor:
    """An orthonormal basis of what the right factors ``(k, m2, n2)`` span: ``(m2*n2, rank)``, float64.

    It is the same whichever of the equivalent factors stand for the layer's matrix.
    """
    vectors, values, _ = torch.linalg.svd(right.flatten(1).double().T, full_matrices=False)
    rank = int((values > values[0] * max(right.flatten(1).shape) * torch.finfo(torch.float32).eps).sum())
    return vectors[:, :rank]


@dataclass(frozen=True, kw_only=True)
class Subspace:
    """A subspace by an orthonormal basis ``(n, r)``, and where it comes from.

    Attributes:
        layer: the layer's name.
        label: how it is called beside others of its kind.
    """

    layer: str
    label: str
    basis: Tensor


def similarities(of: Literal["left", "right"], subspaces: Sequence[Subspace]) -> list[Similarity]:
    """Compares the subspaces of each kind of layer, such as ``mlp.c_fc``, if there are several layers of it.

    Subspaces that fill their space are the same always, and left out.
    """
    kinds: dict[tuple[str, int], list[Subspace]] = {}
    for one in subspaces:
        kinds.setdefault((kind_of(one.layer), len(one.basis)), []).append(one)
    made = []
    for (kind, space), members in kinds.items():
        sizes = {one.basis.shape[1] for one in members}
        if len({one.layer for one in members}) > 1 and min(sizes) > 0 and max(sizes) < space:
            made.append(_compare(of, kind, members))
    return made


def kind_of(name: str) -> str:
    """A layer's name without its number and what is before it.

    Examples:
        >>> kind_of("transformer.h.3.mlp.c_fc")
        'mlp.c_fc'
    """
    return re.sub(r"^.*?(?:^|\.)\d+\.", "", name)


def number_of(name: str) -> str:
    """The number of the transformer layer in a layer's name; the name itself where there is none.

    Examples:
        >>> number_of("transformer.h.3.mlp.c_fc"), number_of("lm_head")
        ('3', 'lm_head')
    """
    return next((part for part in name.split(".") if part.isdigit()), name)


def _compare(of: Literal["left", "right"], kind: str, members: Sequence[Subspace]) -> Similarity:
    pairs = [[cosines(one.basis, other.basis) for other in members] for one in members]
    means = [[angles.square().mean().item() for angles in row] for row in pairs]
    apart = [
        means[i][j] for i, one in enumerate(members) for j, other in enumerate(members) if one.layer != other.layer
    ]
    space, directions = members[0].basis.shape
    return Similarity(
        kind=kind,
        of=of,
        names=[one.label for one in members],
        directions=directions,
        space=space,
        chance=directions / space,
        mean_cos2=means,
        smallest=[[torch.rad2deg(angles[0].acos()).item() for angles in row] for row in pairs],
        across=sum(apart) / len(apart),
    )
