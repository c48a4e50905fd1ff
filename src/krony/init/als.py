"""Weighted alternating least squares: for any shape and number of factors, nearest in what the text sees.

Minimises ``tr((W − Ŵ) C (W − Ŵ)ᵀ)`` over ``Ŵ = Σ_f A_f ⊗ B_f``. For fixed B every row of A is a least-squares problem
with the same ``(k·n1)²`` Gram matrix, for fixed A every row of B one with the same ``(k·n2)²``: one Cholesky each, all
rows at once. Neither step can make the error larger, so the result is never worse than its start, which is the better
of Van Loan's factors and pruned ones.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from krony.errors import KronyError
from krony.init import prune, van_loan
from krony.init.base import Factors, Initialisation, Moments, Options, Target, regularised
from krony.kronecker.algebra import dense

ROUNDS = 30
ENOUGH = 1e-4  # relative gain of a round below which it stops
RIDGE = 1e-8  # of the small systems, relative to their mean diagonal


def initialise(targets: Sequence[Target], options: Options, moments: Moments | None = None) -> list[Factors]:
    """Factors of least calibrated error, with the error after every round in ``Factors.curve``."""
    if moments is None:
        raise KronyError("init als needs calibration text")
    starts = (van_loan.initialise(targets, options), prune.initialise(targets, options))
    return [
        descend(target, moments.of(target.role).matrix, options)
        for target, *options in zip(targets, *starts, strict=True)
    ]


def descend(target: Target, second: Tensor, starts: Sequence[Factors]) -> Factors:
    """The best of ``starts``, improved until a round gains little. ``second: (in, in)``."""
    weight = target.weight.double()
    c = regularised(second.to(weight.device))
    scale = _cost(weight, c)
    if scale == 0:  # nothing ever comes out of this layer
        return starts[0]
    pairs = [(s.left * s.scale, s.right) for s in starts]
    left, right = min(pairs, key=lambda pair: _cost(weight - dense(*pair), c))
    best = (_cost(weight - dense(left, right), c), left, right)
    curve = [(best[0] / scale) ** 0.5]
    wc = weight @ c
    for _ in range(ROUNDS):
        left = _solve_left(right, c, wc, left.shape)
        right = _solve_right(left, c, wc, right.shape)
        left, right = _balance(left, right)
        cost = _cost(weight - dense(left, right), c)
        if not cost < best[0]:
            break
        gain = 1 - cost / best[0]
        best = (cost, left, right)
        curve.append((cost / scale) ** 0.5)
        if gain < ENOUGH:
            break
    return Factors(best[1], best[2], curve=tuple(curve))


def _solve_left(right: Tensor, c: Tensor, wc: Tensor, shape: torch.Size) -> Tensor:
    (k, m1, n1), (_, m2, n2) = shape, right.shape
    blocks = c.view(n1, n2, n1, n2)  # (j, q, J, Q)
    products = torch.einsum("fpq,gpr->fqgr", right, right)
    gram = torch.einsum("fqgr,jqlr->fjgl", products, blocks).reshape(k * n1, k * n1)
    ahead = torch.einsum("ipjq,fpq->ifj", wc.view(m1, m2, n1, n2), right).reshape(m1, k * n1)
    return _solve(gram, ahead.T).T.view(m1, k, n1).transpose(0, 1)


def _solve_right(left: Tensor, c: Tensor, wc: Tensor, shape: torch.Size) -> Tensor:
    (k, m1, n1), (_, m2, n2) = left.shape, shape
    blocks = c.view(n1, n2, n1, n2)  # (j, q, J, Q)
    products = torch.einsum("fij,gil->fjgl", left, left)
    gram = torch.einsum("fjgl,jqlr->fqgr", products, blocks).reshape(k * n2, k * n2)
    ahead = torch.einsum("ipjq,fij->pfq", wc.view(m1, m2, n1, n2), left).reshape(m2, k * n2)
    return _solve(gram, ahead.T).T.view(m2, k, n2).transpose(0, 1)


def _solve(gram: Tensor, ahead: Tensor) -> Tensor:
    ridge = RIDGE * gram.diagonal().mean().clamp_min(torch.finfo(gram.dtype).tiny)
    factor = torch.linalg.cholesky(gram + ridge * torch.eye(len(gram), dtype=gram.dtype, device=gram.device))
    return torch.cholesky_solve(ahead, factor)


def _balance(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """The same products with both factors of each of the same norm."""
    a, b = left.flatten(1).norm(dim=1), right.flatten(1).norm(dim=1)
    ratio = torch.where((a > 0) & (b > 0), (b / a.clamp_min(1e-300)).sqrt(), 1.0)[:, None, None]
    return left * ratio, right / ratio


def _cost(lost: Tensor, c: Tensor) -> float:
    return ((lost @ c) * lost).sum().item()


ALS = Initialisation(name="als", initialise=initialise, needs_text=True, default_epsilon=prune.EPSILON)
