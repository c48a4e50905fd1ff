"""Truncated SVD whitened by the calibration text (SVD-LLM, Wang et al. 2024): low rank for comparison.

A matrix of rank k is a sum of k Kronecker products of a column and a row, ``(out, 1) ⊗ (1, in)``. The best one for
``tr((W − Ŵ) C (W − Ŵ)ᵀ)`` is the truncated SVD of ``W L`` with ``C = L Lᵀ``, times ``L⁻¹``.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from krony.errors import KronyError
from krony.init.base import Factors, Initialisation, Moments, Options, Target, regularised
from krony.kronecker.algebra import KronShape


def low_rank(shape: KronShape) -> KronShape:
    """The split into columns and rows, with as many factors as fit into the parameters of ``shape``, at least one.

    Examples:
        >>> low_rank(KronShape.split(8, 4, 4, 2))
        KronShape(m1=8, n1=1, m2=1, n2=4, factors=1)
    """
    rows, columns = shape.rows, shape.columns
    factors = max(1, min(shape.parameters // (rows + columns), rows, columns))
    return KronShape(rows, 1, 1, columns, factors)


def initialise(targets: Sequence[Target], options: Options, moments: Moments | None = None) -> list[Factors]:
    """The matrices of rank k whose outputs on the calibration text are nearest, as k factors each, in float64.

    Raises KronyError without ``moments``.
    """
    if moments is None:
        raise KronyError("init svd needs calibration text")
    return [_one(target, moments) for target in targets]


def _one(target: Target, moments: Moments) -> Factors:
    weight, k = target.weight.double(), target.shape.factors
    whitening = torch.linalg.cholesky(regularised(moments.of(target.role).matrix.to(weight.device)))
    u, s, vt = torch.linalg.svd(weight @ whitening, full_matrices=False)
    root = s[:k].sqrt()
    left = (u[:, :k] * root).T[:, :, None]  # (k, out, 1)
    rows = torch.linalg.solve_triangular(whitening.T, vt[:k].T, upper=True).T  # vt L⁻¹: (k, in)
    return Factors(left, (root[:, None] * rows)[:, None, :])  # right: (k, 1, in)


SVD = Initialisation(name="svd", initialise=initialise, needs_text=True, shape=low_rank)
