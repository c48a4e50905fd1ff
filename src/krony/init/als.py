"""Weighted alternating least squares: for any shape and number of factors, least output error on the calibration text.

Minimises ``tr((W − Ŵ) C (W − Ŵ)ᵀ)`` over ``Ŵ = Σ_f A_f ⊗ B_f``. For fixed B every row of A is a least-squares problem
with the same ``(k·n1)²`` Gram matrix. For fixed A every row of B is one with the same ``(k·n2)²`` Gram matrix. One
Cholesky factorisation per side solves all rows at once. Neither step can make the error larger, so the result is never
worse than its start: the better of Van Loan's factors and the paper's pruned ones (3.3.1, 3.3.3).
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
MIN_GAIN = 1e-4  # a round whose relative gain is smaller is the last
RIDGE = 1e-8  # added to the diagonal of the small systems, relative to its mean


def initialise(targets: Sequence[Target], options: Options, moments: Moments | None = None) -> list[Factors]:
    """Factors with the least output error on the calibration text, in float64, one ``Factors`` per target.

    ``Factors.curve`` holds the relative error at the start and after each round. Raises KronyError without ``moments``.
    """
    if moments is None:
        raise KronyError("init als needs calibration text")
    starts = (van_loan.initialise(targets, options), prune.initialise(targets, options))
    return [
        descend(target, moments.of(target.role).matrix, candidates)
        for target, *candidates in zip(targets, *starts, strict=True)
    ]


def descend(target: Target, second: Tensor, starts: Sequence[Factors]) -> Factors:
    """The best of ``starts``, improved until a round gains less than ``MIN_GAIN``, at most ``ROUNDS`` times.

    ``second: (in, in)`` is the second moment of the layer's inputs. The factors are float64. Where the layer's outputs
    are all zero on the text, the first start is returned.
    """
    weight = target.weight.double()
    c = regularised(second.to(weight.device))
    scale = _cost(weight, c)
    if scale == 0:  # the outputs are zero on the text
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
        if gain < MIN_GAIN:
            break
    return Factors(best[1], best[2], curve=tuple(curve))


def _solve_left(right: Tensor, c: Tensor, wc: Tensor, shape: torch.Size) -> Tensor:
    """The left factors ``(k, m1, n1)`` of least cost for these right ones; ``wc: (out, in)`` is W C."""
    (k, m1, n1), (_, m2, n2) = shape, right.shape
    blocks = c.view(n1, n2, n1, n2)  # (j, q, J, Q)
    products = torch.einsum("fpq,gpr->fqgr", right, right)
    gram = torch.einsum("fqgr,jqlr->fjgl", products, blocks).reshape(k * n1, k * n1)
    rhs = torch.einsum("ipjq,fpq->ifj", wc.view(m1, m2, n1, n2), right).reshape(m1, k * n1)
    return _solve(gram, rhs.T).T.view(m1, k, n1).transpose(0, 1)


def _solve_right(left: Tensor, c: Tensor, wc: Tensor, shape: torch.Size) -> Tensor:
    """The right factors ``(k, m2, n2)`` of least cost for these left ones; ``wc: (out, in)`` is W C."""
    (k, m1, n1), (_, m2, n2) = left.shape, shape
    blocks = c.view(n1, n2, n1, n2)  # (j, q, J, Q)
    products = torch.einsum("fij,gil->fjgl", left, left)
    gram = torch.einsum("fjgl,jqlr->fqgr", products, blocks).reshape(k * n2, k * n2)
    rhs = torch.einsum("ipjq,fij->pfq", wc.view(m1, m2, n1, n2), left).reshape(m2, k * n2)
    return _solve(gram, rhs.T).T.view(m2, k, n2).transpose(0, 1)


def _solve(gram: Tensor, rhs: Tensor) -> Tensor:
    """Solves ``gram · x = rhs``: ``(n, n), (n, rows) -> (n, rows)``. A small ridge keeps ``gram`` invertible."""
    ridge = RIDGE * gram.diagonal().mean().clamp_min(torch.finfo(gram.dtype).tiny)
    factor = torch.linalg.cholesky(gram + ridge * torch.eye(len(gram), dtype=gram.dtype, device=gram.device))
    return torch.cholesky_solve(rhs, factor)


def _balance(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """The same sum of products, where both factors of a product have the same norm."""
    a, b = left.flatten(1).norm(dim=1), right.flatten(1).norm(dim=1)
    ratio = torch.where((a > 0) & (b > 0), (b / a.clamp_min(1e-300)).sqrt(), 1.0)[:, None, None]
    return left * ratio, right / ratio


def _cost(difference: Tensor, c: Tensor) -> float:
    """tr(E C Eᵀ) of ``difference: (out, in)``: the mean squared norm of E x over the text."""
    return ((difference @ c) * difference).sum().item()


ALS = Initialisation(name="als", initialise=initialise, needs_text=True, default_epsilon=prune.EPSILON)
