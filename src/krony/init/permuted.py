"""Van Loan's products after the hidden neurons were permuted, as TQCompressor does (Abronin et al. 2024).

Hidden neurons can stand in any order: the activation is elementwise, so a permutation of the rows of the up matrices
cancels with the same one of the down matrix's columns. The order decides how near a Kronecker product can come. With
the products ``Ŵ`` at hand, the best order is a linear assignment: neuron j to place i gains ``⟨Ŵ[i], W[j]⟩``, summed
over the MLP's matrices, each relative to its own norm. Assignment and Van Loan take turns; neither can make
``Σ ‖W − Ŵ‖² / ‖W‖²`` larger. As given, the order is often a fixed point of both, so they start from two others: neurons
sorted along their first principal direction, and neurons grouped with those most parallel to them.

TQCompressor permutes the channels between the layers too, which has to be undone while the model runs. Here it is the
hidden neurons alone, which costs nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from krony.errors import KronyError
from krony.init import van_loan
from krony.init.base import Factors, Initialisation, Moments, Options, Target
from krony.kronecker.algebra import KronShape, dense, nearest
from krony.kronecker.assignment import assign

ROUNDS = 20
ENOUGH = 1e-4  # relative gain of a round below which it stops


def initialise(targets: Sequence[Target], options: Options, moments: Moments | None = None) -> list[Factors]:
    """Van Loan's factors of the permuted matrices; ``Factors.order`` says which neuron stands where.

    Raises KronyError unless the targets are an MLP's matrices.
    """
    *ups, down = targets
    check_mlp([t.name for t in targets], [t.shape for t in targets], is_mlp=bool(ups) and down.role == "down")
    tall = [(t.weight.double(), t.shape) for t in ups] + [(down.weight.double().T, down.shape.transposed)]
    order = best_order([w for w, _ in tall], [s for _, s in tall])
    moved = [replace(t, weight=t.weight[order]) for t in ups] + [replace(down, weight=down.weight[:, order])]
    made = van_loan.initialise(moved, options)
    biases = [None if t.bias is None else t.bias.double()[order] for t in ups] + [None]
    return [replace(f, bias=bias, order=order) for f, bias in zip(made, biases, strict=True)]


def check_mlp(names: Sequence[str], shapes: Sequence[KronShape], *, is_mlp: bool) -> None:
    """Raises KronyError unless these are an MLP's matrices, the one that leads back last."""
    if not is_mlp:
        raise KronyError(f"{names[-1]}: init permuted needs whole MLPs; for single layers take van-loan")


def best_order(matrices: Sequence[Tensor], shapes: Sequence[KronShape]) -> Tensor:
    """The order of the rows, ``(n,)``, in which Kronecker products come nearest to all ``matrices: (n, width)``.

    The best that was found, the given order among them: no other is returned unless its error is smaller.
    """
    scaled = [w / w.norm().clamp_min(torch.finfo(w.dtype).tiny) for w in matrices]
    given = torch.arange(len(scaled[0]), device=scaled[0].device)
    starts = [_along_first_direction(scaled), _grouped(scaled, shapes[0].m2)]
    found = [(_products(scaled, shapes, given)[0], given)] + [_improved(scaled, shapes, start) for start in starts]
    return min(found, key=lambda pair: pair[0])[1]


def _improved(scaled: list[Tensor], shapes: Sequence[KronShape], order: Tensor) -> tuple[float, Tensor]:
    """Assignment and Van Loan in turns from ``order``: the error that is left, and the order."""
    error, gain = _products(scaled, shapes, order)
    for _ in range(ROUNDS):
        new = assign(gain)
        new_error, gain = _products(scaled, shapes, new)
        if new_error > error * (1 - ENOUGH):
            return min((error, order), (new_error, new), key=lambda pair: pair[0])
        error, order = new_error, new
    return error, order


def _products(scaled: list[Tensor], shapes: Sequence[KronShape], order: Tensor) -> tuple[float, Tensor]:
    """The error of the nearest products in this order, and what each neuron would gain at each place, ``(n, n)``."""
    error, gain = 0.0, torch.zeros(len(order), len(order), dtype=torch.float64, device=order.device)
    for w, shape in zip(scaled, shapes, strict=True):
        near = dense(*nearest(w[order], shape))
        error += (w[order] - near).square().sum().item()
        gain += near @ w.T
    return error, gain


def _along_first_direction(scaled: list[Tensor]) -> Tensor:
    gram = torch.cat(scaled, dim=1)  # (n, widths)
    _, vectors = torch.linalg.eigh(gram.T @ gram)
    return (gram @ vectors[:, -1]).argsort(stable=True)


def _grouped(scaled: list[Tensor], size: int) -> Tensor:
    """The neurons, longest first, each followed by those most parallel or antiparallel to it."""
    rows = torch.cat(scaled, dim=1)
    lengths = rows.norm(dim=1)
    rows = rows / lengths.clamp_min(torch.finfo(rows.dtype).tiny)[:, None]
    alike = (rows @ rows.T).square()  # (n, n)
    free = torch.ones(len(rows), dtype=torch.bool, device=rows.device)
    order: list[int] = []
    for lead in lengths.argsort(descending=True, stable=True).tolist():
        if not free[lead]:
            continue
        free[lead] = False
        followers = alike[lead].where(free, -1.0).topk(size - 1).indices
        free[followers] = False
        order += [lead, *followers.tolist()]
    return torch.tensor(order, device=rows.device)


PERMUTED = Initialisation(name="permuted", initialise=initialise, reorders_neurons=True, rescales=True, check=check_mlp)
