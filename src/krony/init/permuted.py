"""Van Loan's factors after a permutation of the hidden neurons, as in TQCompressor (Abronin et al. 2024).

Hidden neurons can stand in any order: the activation is elementwise, so a permutation of the rows of the up matrices
cancels with the same permutation of the down matrix's columns. The order decides how near a Kronecker product can come.
For given products ``Ŵ`` the best order solves a linear assignment: neuron j at place i gains ``⟨Ŵ[i], W[j]⟩``, summed
over the MLP's matrices, each relative to its own norm. Assignment and Van Loan's factors alternate; neither can make
``Σ ‖W − Ŵ‖² / ‖W‖²`` larger. The given order is often a fixed point of both, so the search starts from others: neurons
sorted along their first principal direction, neurons grouped with the most parallel ones, and neurons grouped by shared
subspaces (``krony.init.subspaces``), which finds the order of an exact sum of several products again.

TQCompressor also permutes the channels between layers, which the model must undo at run time. This initialisation
permutes hidden neurons only, which costs nothing at run time.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from krony.errors import KronyError
from krony.init import van_loan
from krony.init.base import Factors, Initialisation, Moments, Options, Target
from krony.init.subspaces import SMALL, by_subspaces
from krony.kronecker.algebra import KronShape, dense, nearest
from krony.kronecker.assignment import assign

ROUNDS = 20
MIN_GAIN = 1e-4  # a round whose relative gain is smaller is the last


def initialise(targets: Sequence[Target], options: Options, moments: Moments | None = None) -> list[Factors]:
    """Van Loan's factors of the permuted matrices, in float64; ``Factors.order`` is the new order of the neurons.

    Raises KronyError unless the targets are an MLP's matrices, the down matrix last.
    """
    *ups, down = targets
    check_mlp([t.name for t in targets], [t.shape for t in targets], is_mlp=bool(ups) and down.role == "down")
    neuron_rows = [(t.weight.double(), t.shape) for t in ups] + [(down.weight.double().T, down.shape.transposed)]
    order = best_order([w for w, _ in neuron_rows], [s for _, s in neuron_rows])
    permuted = [replace(t, weight=t.weight[order]) for t in ups] + [replace(down, weight=down.weight[:, order])]
    factors = van_loan.initialise(permuted, options)
    biases = [None if t.bias is None else t.bias.double()[order] for t in ups] + [None]
    return [replace(f, bias=bias, order=order) for f, bias in zip(factors, biases, strict=True)]


def check_mlp(names: Sequence[str], shapes: Sequence[KronShape], *, is_mlp: bool) -> None:
    """Raises KronyError unless these are an MLP's matrices, the down matrix last."""
    if not is_mlp:
        raise KronyError(f"{names[-1]}: init permuted needs complete MLPs; for single layers use van-loan")


def best_order(matrices: Sequence[Tensor], shapes: Sequence[KronShape]) -> Tensor:
    """The best order found of the rows, ``(n,)``, for Kronecker products near to all ``matrices: (n, width)``, float64.

    No matrix is farther from its products than in the given order, ``0, 1, …, n − 1``, which is returned unless another
    is better.

    Examples:
        >>> rows = torch.arange(1.0, 5.0).outer(torch.ones(2)).double()  # any order is exact: rank one
        >>> best_order([rows], [KronShape(2, 2, 2, 1)]).sort().values.tolist()
        [0, 1, 2, 3]
    """
    scaled = [w / w.norm().clamp_min(torch.finfo(w.dtype).tiny) for w in matrices]
    given = torch.arange(len(scaled[0]), device=scaled[0].device)
    starts = [_along_first_direction(scaled), _grouped(scaled, shapes[0].m2), by_subspaces(scaled, shapes)]
    if len(given) <= SMALL:
        starts.append(by_subspaces(scaled, shapes, best_first=True))
    limits, _ = _products(scaled, shapes, given)
    candidates = [(limits, given), *(found for start in starts for found in _improved(scaled, shapes, start))]
    allowed = [(errors, order) for errors, order in candidates if (errors <= limits).all()]
    return min(allowed, key=lambda pair: pair[0].sum().item())[1]


def _improved(scaled: list[Tensor], shapes: Sequence[KronShape], order: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Alternates assignment and Van Loan's factors from ``order``; yields the remaining errors and the order of each
    round.
    """
    errors, gain = _products(scaled, shapes, order)
    yield errors, order
    for _ in range(ROUNDS):
        order = assign(gain)
        before = errors.sum()
        errors, gain = _products(scaled, shapes, order)
        yield errors, order
        if errors.sum() > before * (1 - MIN_GAIN):
            return


def _products(scaled: list[Tensor], shapes: Sequence[KronShape], order: Tensor) -> tuple[Tensor, Tensor]:
    """The squared error of each matrix's nearest products in this order, ``(matrices,)``, and the gain of neuron j at
    place i, ``(n, n)``.
    """
    errors, gain = [], torch.zeros(len(order), len(order), dtype=torch.float64, device=order.device)
    for w, shape in zip(scaled, shapes, strict=True):
        near = dense(*nearest(w[order], shape))
        errors.append((w[order] - near).square().sum())
        gain += near @ w.T
    return torch.stack(errors), gain


def _along_first_direction(scaled: list[Tensor]) -> Tensor:
    """The neurons sorted by their coordinate along the first principal direction of their rows."""
    rows = torch.cat(scaled, dim=1)  # (n, widths)
    _, vectors = torch.linalg.eigh(rows.T @ rows)
    return (rows @ vectors[:, -1]).argsort(stable=True)


def _grouped(scaled: list[Tensor], size: int) -> Tensor:
    """The neurons, largest norm first, each followed by the ``size - 1`` most parallel or antiparallel ones left."""
    rows = torch.cat(scaled, dim=1)
    norms = rows.norm(dim=1)
    rows = rows / norms.clamp_min(torch.finfo(rows.dtype).tiny)[:, None]
    similarity = (rows @ rows.T).square()  # (n, n)
    free = torch.ones(len(rows), dtype=torch.bool, device=rows.device)
    order: list[int] = []
    for lead in norms.argsort(descending=True, stable=True).tolist():
        if not free[lead]:
            continue
        free[lead] = False
        followers = similarity[lead].where(free, -1.0).topk(size - 1).indices
        free[followers] = False
        order += [lead, *followers.tolist()]
    return torch.tensor(order, device=rows.device)


PERMUTED = Initialisation(name="permuted", initialise=initialise, reorders_neurons=True, rescales=True, check=check_mlp)
