"""Neuron selection: the initialisation that needs almost no training.

In the scheme ``(hidden/r, width)`` the right factors are ``r×1`` and ``1×r``: the Kronecker structure ties groups of
r hidden neurons. Hidden neurons can be permuted freely (the activation is elementwise, and the permutation cancels
between the matrices), so this initialisation chooses *which* neurons lead the groups, and least squares makes up for
the others.

With C the second moment of the hidden activations and W the down matrix, dropping neuron j and refitting the others
costs ``‖W[:, j]‖² / (C⁻¹)_jj`` (optimal brain surgeon, Hassibi & Stork 1993). The cheapest neurons D are dropped block
by block. After each block W and C⁻¹ are updated exactly for the neurons K that are kept:

    S = (C⁻¹[D, D])⁻¹ C⁻¹[D, K],   W ← W[:, K] − W[:, D] S,   C⁻¹ ← C⁻¹[K, K] − C⁻¹[K, D] S.

Where the sensitivity G of the loss to the MLP's outputs is known, ``W[:, j]ᵀ G W[:, j]`` replaces ``‖W[:, j]‖²``: costs
are then proportional to nats, and layers can be compared. The refit does not depend on G.

The rows and biases of the up matrices that are kept stay exact.
"""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from krony.errors import KronyWarning
from krony.init.base import Moments, Ranking, SecondMoment, regularised
from krony.init.whole_neurons import Selection, method

BLOCK = 32  # neurons dropped between two exact updates, at least
BLOCKS = 96  # about how many updates dropping all neurons takes: each one passes over the full inverse
GONE = 1 / 8  # of the neurons: when more than these are dropped, the matrices are copied without them


def rank(weight: Tensor, bias: Tensor | None, moments: Moments, count: int) -> Ranking:
    """The ``count`` neurons that the others replace best; the costs are in float64, and rise.

    ``weight: (out, hidden)`` and ``bias: (out,)`` belong to the down matrix; ``moments.hidden`` must be there. With
    ``moments.sensitivity`` the costs are proportional to nats per token, otherwise they are the mean squared error of
    the MLP's outputs. Warns (KronyWarning) if the text has fewer tokens than the MLP has neurons.
    """
    assert moments.hidden is not None
    neurons = weight.shape[1]
    if moments.tokens < neurons:
        warnings.warn(
            f"calibration has {moments.tokens:,} tokens for {neurons:,} neurons: "
            "the selection will be rough, so give more text",
            KronyWarning,
            stacklevel=2,
        )
    c = _centred_covariance(moments.hidden, bias, weight.device)
    order, costs = drop(_sensitivity_scaled(weight.double(), moments), c, count, consume=True)
    return Ranking(order, torch.cat([costs.new_zeros(1), costs]))


def refitted(weight: Tensor, bias: Tensor | None, moments: Moments | None, kept: Tensor) -> Selection:
    """The down matrix ``weight: (out, hidden)`` refitted to the kept neurons.

    With a bias ``(out,)``, the refitted bias absorbs the mean output of the dropped neurons, and C is the covariance
    instead of the second moment. ``moments.hidden`` must be there.
    """
    assert moments is not None and moments.hidden is not None
    w, mean = weight.double(), moments.hidden.mean.to(weight.device)
    down = refit(w, _centred_covariance(moments.hidden, bias, weight.device), kept)
    return Selection(kept, down, None if bias is None else bias.double() + w @ mean - down @ mean[kept])


def _sensitivity_scaled(weight: Tensor, moments: Moments) -> Tensor:
    """``weight`` in a basis in which ``‖w‖²`` of a column is ``wᵀ · sensitivity · w``."""
    if moments.sensitivity is None:
        return weight
    return torch.linalg.cholesky(regularised(moments.sensitivity.to(weight.device))).T @ weight


def _centred_covariance(second: SecondMoment, bias: Tensor | None, device: torch.device) -> Tensor:
    """C with its ridge: the second moment, or the covariance where a bias absorbs the mean."""
    matrix, mean = second.matrix.to(device), second.mean.to(device)
    return regularised(matrix if bias is None else matrix - mean.outer(mean))


def drop(
    weight: Tensor, c: Tensor, count: int, block: int | None = None, *, consume: bool = False
) -> tuple[Tensor, Tensor]:
    """The ``count`` neurons that are cheapest to drop, in the order of dropping, and the total cost after each.

    Both results are ``(count,)``. The cost is ``tr((W − Ŵ) C (W − Ŵ)ᵀ)``; within a block it is divided in proportion to
    the neurons' single costs.

    Args:
        weight: ``(out, n)``, float64.
        c: second moment of the neurons' activations, ``(n, n)``, positive definite, float64.
        block: neurons dropped between two exact updates; None for ``BLOCK``, or more where there are many neurons.
        consume: works in the memory of ``c``, and so overwrites its values.

    Raises:
        torch.linalg.LinAlgError: ``c`` is not positive definite.

    Examples:
        >>> weight = torch.tensor([[3.0, 1.0, 2.0]], dtype=torch.float64)
        >>> order, costs = drop(weight, torch.eye(3, dtype=torch.float64), count=2, block=1)
        >>> order.tolist(), costs.tolist()
        ([1, 2], [1.0, 5.0])
    """
    block = block or max(BLOCK, weight.shape[1] // BLOCKS)
    weight = weight.clone(memory_format=torch.contiguous_format)
    inverse = (c if consume else c.clone()).mT  # symmetric, and column-major as LAPACK requires
    torch.linalg.cholesky(inverse, out=inverse)
    torch.cholesky_inverse(inverse, out=inverse)
    inverse = inverse.mT.contiguous()  # a view, not a copy
    left = torch.arange(weight.shape[1], device=weight.device)
    gone = torch.zeros_like(left, dtype=torch.bool)  # dropped, and still in the matrices
    order, costs, total = [], [], torch.zeros((), dtype=weight.dtype, device=weight.device)
    while count > 0:
        single = torch.linalg.vector_norm(weight, dim=0).square() / inverse.diagonal()  # (n,)
        cheapest = single.masked_fill_(gone, torch.inf).topk(min(block, count), largest=False).indices
        own = single[cheapest]
        across = inverse[cheapest]  # C⁻¹[D, :]: (block, n)
        inner = torch.linalg.cholesky(across[:, cheapest])  # (block, block)
        shift = torch.cholesky_solve(across, inner)  # S: (block, n)
        dropped = weight[:, cheapest]  # (out, block)
        cost = (dropped * torch.cholesky_solve(dropped.T, inner).T).sum()  # tr(W_D (C⁻¹_DD)⁻¹ W_Dᵀ)
        costs.append(total + own.cumsum(0) * (cost / own.sum().clamp_min(torch.finfo(own.dtype).tiny)))
        total = total + cost
        order.append(left[cheapest])
        weight.addmm_(dropped, shift, alpha=-1)
        inverse.addmm_(across.T, shift, alpha=-1)
        gone[cheapest] = True
        count -= len(cheapest)
        if gone.sum() > GONE * len(gone):
            kept = (~gone).nonzero().squeeze(1)
            weight, inverse = weight[:, kept], _compacted(inverse, kept)
            left, gone = left[kept], gone[kept]
    return torch.cat(order), torch.cat(costs)


def _compacted(matrix: Tensor, kept: Tensor, rows: int = 128) -> Tensor:
    """``matrix[kept][:, kept]`` in the memory of the contiguous ``matrix``; ``kept`` is rising.

    It works on a few rows at a time. A row moves up or stays, so none is overwritten before it is read.
    """
    small = matrix.view(-1)[: len(kept) ** 2].view(len(kept), len(kept))
    for part, target in zip(kept.split(rows), small.split(rows), strict=True):
        target.copy_(matrix[part][:, kept])
    return small


def refit(weight: Tensor, c: Tensor, kept: Tensor) -> Tensor:
    """The down matrix on the kept neurons whose outputs are nearest to those of ``weight``, by least squares.

    ``weight: (out, n)``, ``c: (n, n)`` and ``kept: (n_kept,)`` give ``(out, n_kept)``, in float64 as they are.
    """
    factor = torch.linalg.cholesky(c[kept][:, kept])
    return torch.cholesky_solve(c[kept] @ weight.T, factor).T


NEURONS = method("neurons", refit=refitted, needs_text=True, rank=rank, predicts_loss=True)
