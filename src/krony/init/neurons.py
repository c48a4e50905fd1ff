"""Neuron selection: the start that needs almost no training.

In the scheme ``(hidden/r, width)`` the right factors are ``r×1`` and ``1×r``: the Kronecker structure ties groups of
r hidden neurons. Hidden neurons can be permuted freely (the activation is elementwise, and the permutation cancels
between the matrices), so choose *which* neurons lead the groups and let least squares make up for the rest.

With C the second moment of the hidden activations and W the down matrix, dropping neuron j and letting the others take
over costs ``‖W[:, j]‖² / (C⁻¹)_jj`` (optimal brain surgeon). The cheapest are dropped block by block, and after each
block W and C⁻¹ are what they would be had those neurons never been there:

    S = (C⁻¹[D, D])⁻¹ C⁻¹[D, K],   W ← W[:, K] − W[:, D] S,   C⁻¹ ← C⁻¹[K, K] − C⁻¹[K, D] S.

Where the loss's sensitivity G to the MLP's output is known, ``‖W[:, j]‖²`` is ``W[:, j]ᵀ G W[:, j]``: costs are then in
nats (but for a factor) and layers can be compared. The repair does not depend on G.

The rows of the up matrices that are kept stay exact, biases too.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from krony.errors import KronyError, KronyWarning
from krony.init.base import Factors, Initialisation, Moments, Options, SecondMoment, Target, regularised
from krony.kronecker.algebra import KronShape

EPSILON = 0.0  # dropped neurons leave nothing behind: the model has the narrower model's outputs
BLOCK = 32  # neurons dropped between two updates, at least,
BLOCKS = 96  # and about how many updates it takes to drop all: each goes through the whole inverse


@dataclass(frozen=True)
class Selection:
    """Which neurons stay, in rising order, and the down matrix and bias that make up for the rest."""

    kept: Tensor  # (n_kept,)
    down: Tensor  # (out, n_kept)
    bias: Tensor | None  # (out,)


def initialise(targets: Sequence[Target], options: Options, moments: Moments | None = None) -> list[Factors]:
    """Factors whose A hold the chosen neurons and whose B are ``e_f``, with ε for the neurons that were dropped."""
    *ups, down = targets
    is_mlp = len(targets) > 1 and down.role == "down"
    check_shapes([t.name for t in targets], [t.shape for t in targets], is_mlp=is_mlp)
    if moments is None or moments.hidden is None:
        raise KronyError("init neurons needs calibration text")
    shape = ups[0].shape
    selection = select(down.weight, down.bias, moments, shape.factors * shape.m1)
    epsilon = EPSILON if options.epsilon is None else options.epsilon
    order = hidden_order(selection.kept, shape)
    made = [_up(target, selection.kept, order, epsilon) for target in ups]
    left = selection.down.view(down.shape.m1, shape.m1, shape.factors).permute(2, 0, 1)  # (k, out, groups)
    return [*made, Factors(left, _selectors(down.shape, epsilon), bias=selection.bias, order=order)]


def check_shapes(names: Sequence[str], shapes: Sequence[KronShape], *, is_mlp: bool) -> None:
    """Raises KronyError unless these are an MLP's matrices, the one that leads back last, and keep whole neurons."""
    if not is_mlp:
        raise KronyError(f"{names[-1]}: init neurons needs whole MLPs; for single layers take van-loan or als")
    shape = shapes[0]
    if shape.n2 != 1:
        raise KronyError(
            f"{names[0]}: init neurons keeps whole neurons, and a left factor of {shape.m1}x{shape.n1} splits them: "
            f"take keep=0.5, a left factor with {shape.columns} columns, or init als or van-loan"
        )


def select(weight: Tensor, bias: Tensor | None, moments: Moments, keep: int) -> Selection:
    """Chooses ``keep`` of the hidden neurons and refits the down matrix ``weight: (out, n)`` to them.

    Where there is a bias it takes up the mean of what was dropped, and C is the covariance. Warns where the text has
    fewer tokens than the MLP has neurons.
    """
    assert moments.hidden is not None
    neurons = weight.shape[1]
    if moments.tokens < neurons:
        warnings.warn(
            f"calibration has {moments.tokens:,} tokens for {neurons:,} neurons: "
            "the selection will be rough, give more text",
            KronyWarning,
            stacklevel=2,
        )
    w, c = weight.double(), _centred_covariance(moments.hidden, bias, weight.device)
    diagonal = c.diagonal().clone()
    dropped, _ = drop(_sensitivity_scaled(w, moments), c, neurons - keep, consume=True)
    c = _centred(moments.hidden, bias, weight.device).clone()  # the same again: it is large, and was not needed
    c.diagonal().copy_(diagonal)
    stays = torch.ones(neurons, dtype=torch.bool, device=weight.device)
    stays[dropped] = False
    kept = stays.nonzero().squeeze(1)
    down = refit(w, c, kept)
    mean = moments.hidden.mean.to(weight.device)
    return Selection(kept, down, None if bias is None else bias.double() + w @ mean - down @ mean[kept])


def cost_curve(weight: Tensor, bias: Tensor | None, moments: Moments, count: int) -> Tensor:
    """The cost of dropping the n cheapest neurons, for n from 0 to ``count``: ``(count + 1,)``."""
    assert moments.hidden is not None
    _, costs = drop(
        _sensitivity_scaled(weight.double(), moments), _centred_covariance(moments.hidden, bias, weight.device), count
    )
    return torch.cat([costs.new_zeros(1), costs])


def _sensitivity_scaled(weight: Tensor, moments: Moments) -> Tensor:
    """``weight`` in a basis in which ``‖w‖²`` of a column is ``wᵀ · sensitivity · w``."""
    if moments.sensitivity is None:
        return weight
    return torch.linalg.cholesky(regularised(moments.sensitivity.to(weight.device))).T @ weight


def _centred_covariance(second: SecondMoment, bias: Tensor | None, device: torch.device) -> Tensor:
    """C with its ridge: about zero, or about the mean where a bias takes the mean up."""
    return regularised(_centred(second, bias, device))


def _centred(second: SecondMoment, bias: Tensor | None, device: torch.device) -> Tensor:
    matrix, mean = second.matrix.to(device), second.mean.to(device)
    return matrix if bias is None else matrix - mean.outer(mean)


def drop(
    weight: Tensor, c: Tensor, count: int, block: int | None = None, *, consume: bool = False
) -> tuple[Tensor, Tensor]:
    """The ``count`` neurons that are cheapest to drop, in the order they go, and the cost of all so far, ``(count,)``.

    Args:
        weight: ``(out, n)``, float64.
        c: second moment of the neurons' activations, ``(n, n)``, positive definite, float64.
        block: how many go between two exact updates; None is ``BLOCK``, or more of many neurons.
        consume: work in the memory of ``c``, whose values are lost.

    The cost is what ``tr((W − Ŵ) C (W − Ŵ)ᵀ)`` has grown to; within a block it is spread by the neurons' own costs.
    """
    block = block or max(BLOCK, weight.shape[1] // BLOCKS)
    weight = weight.clone()
    inverse = (c if consume else c.clone()).mT  # symmetric, and stored by columns as LAPACK wants it
    torch.linalg.cholesky(inverse, out=inverse)
    torch.cholesky_inverse(inverse, out=inverse)
    inverse = inverse.mT.contiguous()  # nothing is copied
    left = torch.arange(weight.shape[1], device=weight.device)
    order, costs, spent = [], [], torch.zeros((), dtype=weight.dtype, device=weight.device)
    while count > 0:
        single = weight.square().sum(0) / inverse.diagonal()  # (n_left,)
        cheapest = single.topk(min(block, count), largest=False).indices
        own = single[cheapest]
        stay = torch.ones(len(left), dtype=torch.bool, device=weight.device)
        stay[cheapest] = False
        inner = torch.linalg.cholesky(inverse[cheapest][:, cheapest])  # (block, block)
        shift = torch.cholesky_solve(inverse[cheapest][:, stay], inner)  # S: (block, n_left - block)
        gone = weight[:, cheapest]  # (out, block)
        cost = (gone * torch.cholesky_solve(gone.T, inner).T).sum()  # tr(W_D (C⁻¹_DD)⁻¹ W_Dᵀ)
        costs.append(spent + own.cumsum(0) * (cost / own.sum().clamp_min(torch.finfo(own.dtype).tiny)))
        spent = spent + cost
        order.append(left[cheapest])
        weight = weight[:, stay] - gone @ shift
        inverse = _shrink(inverse, stay, inverse[:, cheapest][stay], shift)
        left, count = left[stay], count - len(cheapest)
    return torch.cat(order), torch.cat(costs)


def _shrink(matrix: Tensor, stay: Tensor, across: Tensor, shift: Tensor, rows: int = 1024) -> Tensor:
    """``matrix[stay][:, stay] - across @ shift`` in the memory of ``matrix``, which is contiguous, some rows at a time.

    A row moves up or stays where it is, so none is overwritten before it is read.
    """
    kept = stay.nonzero().squeeze(1)
    small = matrix.view(-1)[: len(kept) ** 2].view(len(kept), len(kept))
    for begin in range(0, len(kept), rows):
        end = begin + rows
        small[begin:end] = matrix[kept[begin:end]][:, kept] - across[begin:end] @ shift
    return small


def refit(weight: Tensor, c: Tensor, kept: Tensor) -> Tensor:
    """The ``(out, n_kept)`` matrix on the kept neurons whose output is nearest to all of ``weight``'s."""
    factor = torch.linalg.cholesky(c[kept][:, kept])
    return torch.cholesky_solve(c[kept] @ weight.T, factor).T


def hidden_order(kept: Tensor, shape: KronShape) -> Tensor:
    """Which old neuron stands at each new place ``i·r + p``: the kept ones at p < k of every group, in rising order."""
    groups, size, k = shape.m1, shape.m2, shape.factors
    others = torch.ones(groups * size, dtype=torch.bool, device=kept.device)
    others[kept] = False
    rest = others.nonzero().squeeze(1)
    return torch.cat([kept.view(groups, k), rest.view(groups, size - k)], dim=1).flatten()


def _up(target: Target, kept: Tensor, order: Tensor, epsilon: float) -> Factors:
    s = target.shape
    left = target.weight.double()[kept].view(s.m1, s.factors, s.n1).transpose(0, 1)  # (k, groups, width)
    bias = None
    if target.bias is not None:
        bias = target.bias.double()[order].view(s.m1, s.m2).clone()
        bias[:, s.factors :] = 0.0  # of neurons that are gone
        bias = bias.flatten()
    return Factors(left, _selectors(s, epsilon), bias=bias, order=order)


def _selectors(shape: KronShape, epsilon: float) -> Tensor:
    """``B_f = e_f``, with ε for the dropped neurons of the group: ``(k, r, 1)`` or ``(k, 1, r)``."""
    k, size = shape.factors, shape.m2 * shape.n2
    right = torch.zeros(k, size, dtype=torch.float64)
    right[:, k:] = epsilon
    right[range(k), range(k)] = 1.0
    return right.view(k, *shape.right)


NEURONS = Initialisation(
    name="neurons",
    initialise=initialise,
    needs_text=True,
    reorders_neurons=True,
    default_epsilon=EPSILON,
    whole_neurons=True,
    cost_curve=cost_curve,
    check=check_shapes,
)
