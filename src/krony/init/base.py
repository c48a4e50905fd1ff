"""The inputs and outputs that all initialisations share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from krony.kronecker.algebra import KronShape

RIDGE = 1e-3  # added to C's diagonal, relative to each entry


@dataclass(frozen=True)
class SecondMoment:
    """Weighted means over tokens of activations x; float64 tensors that hold float32 values.

    Attributes:
        matrix: the mean of ``x xᵀ``, ``(n, n)``.
        mean: the mean of ``x``, ``(n,)``.
    """

    matrix: Tensor
    mean: Tensor


@dataclass(frozen=True)
class Moments:
    """Statistics of one group (an MLP, or a single layer) on the calibration text.

    Attributes:
        inputs: second moment of the inputs of the first matrix.
        hidden: second moment of the inputs of the down matrix; None for a single layer.
        tokens: the number of tokens read.
        sensitivity: ``(out, out)``, float64: the Fisher information of the group's outputs, which is the mean of
            ``g gᵀ`` over tokens, where g is the gradient of the loss with respect to the outputs; None unless it was
            asked for.
    """

    inputs: SecondMoment
    hidden: SecondMoment | None
    tokens: int
    sensitivity: Tensor | None = None

    def of(self, role: str) -> SecondMoment:
        """The second moment of the inputs of a matrix with this role (``up``, ``down`` or ``other``)."""
        return self.hidden if role == "down" and self.hidden is not None else self.inputs


@dataclass(frozen=True)
class Target:
    """A matrix to be replaced.

    Attributes:
        name: dotted name of its layer.
        role: ``up`` (to the hidden width of an MLP), ``down`` (back from it) or ``other``.
        weight: ``(out, in)``, in the model's dtype.
        bias: ``(out,)`` or None.
        shape: how the replacement splits it.
    """

    name: str
    role: str
    weight: Tensor
    bias: Tensor | None
    shape: KronShape


@dataclass(frozen=True)
class Factors:
    """First values for one target, in float64: ``scale · Σ_f left[f] ⊗ right[f]``.

    Attributes:
        left: ``(k, m1, n1)``.
        right: ``(k, m2, n2)``.
        scale: multiplies the sum; it becomes the scalars where the layer has them.
        bias: ``(out,)`` where the initialisation changes it, else None.
        order: ``(hidden,)``, the old index of the hidden neuron at each new index; None where their order stays.
        curve: relative output error on the calibration text after each round, where the initialisation iterates.
    """

    left: Tensor
    right: Tensor
    scale: float = 1.0
    bias: Tensor | None = None
    order: Tensor | None = None
    curve: tuple[float, ...] | None = None


@dataclass(frozen=True)
class Ranking:
    """An MLP's hidden neurons in the order in which a method drops them, and what that costs.

    Attributes:
        order: the neurons that are dropped, first the cheapest, ``(count,)``.
        costs: the cost of dropping the first n of them, for n from 0 to ``count``: ``(count + 1,)``, 0 first.
    """

    order: Tensor
    costs: Tensor

    def kept(self, neurons: int, keep: int) -> Tensor:
        """The neurons that are left when ``keep`` of all ``neurons`` stay, in rising order: ``(keep,)``.

        Examples:
            >>> Ranking(torch.tensor([3, 0, 1]), torch.arange(4.0)).kept(neurons=4, keep=2)
            tensor([1, 2])
        """
        stay = torch.ones(neurons, dtype=torch.bool, device=self.order.device)
        stay[self.order[: neurons - keep]] = False
        return stay.nonzero().squeeze(1)


def regularised(c: Tensor, ridge: float = RIDGE) -> Tensor:
    """``c: (n, n)`` with a ridge relative to each neuron's own second moment, and a floor for neurons that never fire.

    The ridge is relative because neurons differ in scale by orders of magnitude, and units must not decide the result.
    The result is positive definite for a matrix of rank one, of zeros, or one that rounding has made indefinite: the
    ridge grows tenfold until a Cholesky factorisation succeeds. Keeps the dtype; ``c`` does not change.

    Examples:
        >>> regularised(torch.tensor([[4.0, 0.0], [0.0, 0.0]])).diagonal() > 0
        tensor([True, True])
    """
    diagonal = c.diagonal().clamp_min(0)
    floor = 1e-10 * diagonal.mean() if diagonal.any() else 1.0
    while True:
        raised = c.clone()
        raised.diagonal().add_((ridge * diagonal).clamp_min(floor))
        if torch.linalg.cholesky_ex(raised).info == 0:
            return raised
        ridge, floor = 10 * ridge, 10 * floor


class Options(Protocol):
    """The attributes of ``KronyConfig`` that initialisations read."""

    @property
    def rescale(self) -> bool: ...
    @property
    def epsilon(self) -> float | None: ...
    @property
    def seed(self) -> int: ...


class Initialise(Protocol):
    """Computes first values for the matrices of one group (an MLP, or a single layer), in the order of ``targets``.

    Raises KronyError if the method needs ``moments`` and they are missing, or if it can't initialise these targets.
    """

    def __call__(
        self, targets: Sequence[Target], options: Options, moments: Moments | None = None
    ) -> list[Factors]: ...


class InitialiseKept(Protocol):
    """``Initialise`` for an MLP of which the neurons that stay are chosen already: ``kept``, in rising order."""

    def __call__(
        self, targets: Sequence[Target], options: Options, moments: Moments | None, kept: Tensor
    ) -> list[Factors]: ...


class Rank(Protocol):
    """Ranks the hidden neurons of an MLP, until ``count`` of them are dropped.

    ``weight: (out, hidden)`` and ``bias: (out,)`` belong to the down matrix. Only the slopes of the costs matter to the
    allocation: it drops the next neurons where they rise least, so costs may also fall.
    """

    def __call__(self, weight: Tensor, bias: Tensor | None, moments: Moments, count: int) -> Ranking: ...


class Check(Protocol):
    """Raises KronyError unless the method can initialise layers of these names and shapes.

    ``is_mlp`` says whether they are all the matrices of one MLP, the down matrix last.
    """

    def __call__(self, names: Sequence[str], shapes: Sequence[KronShape], *, is_mlp: bool) -> None: ...


def accept_all(names: Sequence[str], shapes: Sequence[KronShape], *, is_mlp: bool) -> None:
    """The check of a method that accepts every layer: it raises nothing."""


def same_shape(shape: KronShape) -> KronShape:
    """``shape`` itself: the split that the scheme asks for."""
    return shape


@dataclass(frozen=True, kw_only=True)
class Initialisation:
    """Everything that the rest of krony knows about one initialisation.

    To add a method, write a file with a record and list the record in ``krony.init.registry``.

    Attributes:
        name: its name in ``--init``.
        initialise: computes the factors.
        needs_text: whether it needs the moments of calibration text.
        per_matrix: whether it works on one matrix at a time, so that streaming holds only one in memory.
        reorders_neurons: whether it changes the order of the hidden neurons; ``Factors.order`` is the new order.
        rescales: whether it follows ``KronyConfig.rescale``.
        default_epsilon: entry of the right factor for dropped neurons; None for a method without such an entry.
        whole_neurons: whether it works only with schemes that don't split hidden neurons.
        rank: ranks neurons by costs, by which ``allocation="global"`` compares layers; None where the method has none.
        initialise_kept: computes the factors for given neurons; None for a method that does not keep complete ones.
        predicts_loss: whether these costs, with sensitivity, are proportional to nats per token.
        shape: maps the split that the scheme asks for to the split that the method uses.
        check: raises KronyError for layers that the method can't initialise.
    """

    name: str
    initialise: Initialise
    needs_text: bool = False
    per_matrix: bool = False
    reorders_neurons: bool = False
    rescales: bool = False
    default_epsilon: float | None = None
    whole_neurons: bool = False
    rank: Rank | None = None
    initialise_kept: InitialiseKept | None = None
    predicts_loss: bool = False
    shape: Callable[[KronShape], KronShape] = same_shape
    check: Check = accept_all

    @property
    def takes_allocation(self) -> bool:
        """Whether ``allocation="global"`` works with this method."""
        return self.rank is not None
