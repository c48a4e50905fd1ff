"""What the initialisations that keep complete hidden neurons share: from a choice of neurons to factors.

Hidden neurons can be permuted freely (the activation is elementwise, and the permutation cancels between the matrices).
So the kept neurons become the first ones of each group of r, and the right factors select them: ``B_f = e_f``. With
epsilon 0 the outputs are those of a narrower MLP, and ``krony export --to slim`` is exact. A method of this kind
chooses which neurons stay, and may then refit the down matrix and its bias; ``method`` makes its record, and everything
else is here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from krony.errors import KronyError
from krony.init.base import Check, Factors, Initialisation, Moments, Options, Rank, Target
from krony.kronecker.algebra import KronShape

EPSILON = 0.0  # dropped neurons contribute nothing: the outputs are those of a narrower MLP


@dataclass(frozen=True)
class Selection:
    """The neurons that are kept, in rising order, and the down matrix and bias for them; float64.

    Attributes:
        kept: ``(n_kept,)``.
        down: ``(out, n_kept)``.
        bias: ``(out,)``; None leaves the bias as it is.
    """

    kept: Tensor
    down: Tensor
    bias: Tensor | None = None


class Choose(Protocol):
    """The ``keep`` hidden neurons of an MLP that stay, in rising order, ``(keep,)``.

    ``targets`` are its matrices, the down matrix last. ``moments`` hold second moments of the hidden neurons where the
    method needs text, and may be None elsewhere.
    """

    def __call__(self, targets: Sequence[Target], keep: int, options: Options, moments: Moments | None) -> Tensor: ...


class Refit(Protocol):
    """What becomes of the down matrix ``weight: (out, hidden)`` and its bias when the neurons ``kept`` stay."""

    def __call__(self, weight: Tensor, bias: Tensor | None, moments: Moments | None, kept: Tensor) -> Selection: ...


def as_they_are(weight: Tensor, bias: Tensor | None, moments: Moments | None, kept: Tensor) -> Selection:
    """The columns of the kept neurons, unchanged, and the same bias."""
    return Selection(kept, weight[:, kept].double())


def by_rank(rank: Rank) -> Choose:
    """The choice of the neurons that ``rank`` would drop last."""

    def choose(targets: Sequence[Target], keep: int, options: Options, moments: Moments | None) -> Tensor:
        down = targets[-1]
        assert moments is not None
        neurons = down.weight.shape[1]
        return rank(down.weight, down.bias, moments, neurons - keep).kept(neurons, keep)

    return choose


def method(
    name: str,
    choose: Choose | None = None,
    *,
    refit: Refit = as_they_are,
    needs_text: bool = False,
    rank: Rank | None = None,
    predicts_loss: bool = False,
) -> Initialisation:
    """The record of a method that keeps the neurons that ``choose`` chooses, or that ``rank`` drops last.

    Its ``initialise`` raises KronyError for single layers, for schemes that split neurons, and without text where that
    is needed.
    """
    check = check_for(name)
    if choose is None:
        assert rank is not None
        choose = by_rank(rank)

    def initialise(targets: Sequence[Target], options: Options, moments: Moments | None = None) -> list[Factors]:
        is_mlp = len(targets) > 1 and targets[-1].role == "down"
        check([t.name for t in targets], [t.shape for t in targets], is_mlp=is_mlp)
        if needs_text and (moments is None or moments.hidden is None):
            raise KronyError(f"init {name} needs calibration text")
        kept = choose(targets, targets[0].shape.kept_rows, options, moments)
        return initialise_kept(targets, options, moments, kept)

    def initialise_kept(
        targets: Sequence[Target], options: Options, moments: Moments | None, kept: Tensor
    ) -> list[Factors]:
        down = targets[-1]
        return factors_of(refit(down.weight, down.bias, moments, kept), targets, options)

    return Initialisation(
        name=name,
        initialise=initialise,
        needs_text=needs_text,
        reorders_neurons=True,
        default_epsilon=EPSILON,
        whole_neurons=True,
        rank=rank,
        initialise_kept=initialise_kept,
        predicts_loss=predicts_loss,
        check=check,
    )


def check_for(name: str) -> Check:
    """The check of init ``name``: an MLP's matrices, the down matrix last, and no neuron is split."""

    def check(names: Sequence[str], shapes: Sequence[KronShape], *, is_mlp: bool) -> None:
        if not is_mlp:
            raise KronyError(f"{names[-1]}: init {name} needs complete MLPs; for single layers use van-loan or als")
        shape = shapes[0]
        if {*shapes[:-1], shapes[-1].transposed} != {shape}:
            raise KronyError(
                f"{names[0]}: init {name} keeps the same neurons in all matrices of an MLP, and their schemes differ: "
                "give them one, or use init als or van-loan"
            )
        if shape.n2 != 1:
            raise KronyError(
                f"{names[0]}: init {name} keeps complete neurons, and a left factor of {shape.m1}x{shape.n1} splits "
                f"them: use keep=0.5, a left factor with {shape.columns} columns, or init als or van-loan"
            )

    return check


def highest(scores: Tensor, count: int) -> Tensor:
    """The ``count`` neurons of the highest scores, in rising order, ``(count,)``; of equal ones the first.

    Examples:
        >>> highest(torch.tensor([0.5, 2.0, 0.5, 1.0]), 3).tolist()
        [0, 1, 3]
    """
    return scores.argsort(descending=True, stable=True)[:count].sort().values


def factors_of(selection: Selection, targets: Sequence[Target], options: Options) -> list[Factors]:
    """Factors whose A hold the kept neurons and whose B are ``e_f``, with ε for the dropped neurons; float64."""
    *ups, down = targets
    shape = ups[0].shape
    epsilon = EPSILON if options.epsilon is None else options.epsilon
    order = hidden_order(selection.kept, shape)
    up_factors = [_up(target, selection.kept, order, epsilon) for target in ups]
    left = selection.down.view(down.shape.m1, shape.m1, shape.factors).permute(2, 0, 1)  # (k, out, groups)
    return [*up_factors, Factors(left, _selectors(down.shape, epsilon), bias=selection.bias, order=order)]


def hidden_order(kept: Tensor, shape: KronShape) -> Tensor:
    """The old index of the neuron at each new index ``i·r + p``, ``(groups·r,)``.

    The kept neurons take the places p < k of every group i, in rising order; the others follow in rising order.
    """
    groups, size, k = shape.m1, shape.m2, shape.factors
    others = torch.ones(groups * size, dtype=torch.bool, device=kept.device)
    others[kept] = False
    rest = others.nonzero().squeeze(1)
    return torch.cat([kept.view(groups, k), rest.view(groups, size - k)], dim=1).flatten()


def _up(target: Target, kept: Tensor, order: Tensor, epsilon: float) -> Factors:
    """The factors of an up matrix: its kept rows, unchanged."""
    s = target.shape
    left = target.weight.double()[kept].view(s.m1, s.factors, s.n1).transpose(0, 1)  # (k, groups, width)
    bias = None
    if target.bias is not None:
        bias = target.bias.double()[order].view(s.m1, s.m2).clone()
        bias[:, s.factors :] = 0.0  # dropped neurons have no bias
        bias = bias.flatten()
    return Factors(left, _selectors(s, epsilon), bias=bias, order=order)


def _selectors(shape: KronShape, epsilon: float) -> Tensor:
    """``B_f = e_f``, with ε for the dropped neurons of the group: ``(k, r, 1)`` or ``(k, 1, r)``."""
    k, size = shape.factors, shape.m2 * shape.n2
    right = torch.zeros(k, size, dtype=torch.float64)
    right[:, k:] = epsilon
    right[range(k), range(k)] = 1.0
    return right.view(k, *shape.right)
