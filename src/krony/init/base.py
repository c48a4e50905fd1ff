"""What every initialisation takes and gives."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from krony.kronecker.algebra import KronShape

RIDGE = 1e-3  # added to C's diagonal, relative to it


@dataclass(frozen=True)
class SecondMoment:
    """A weighted mean of ``x xᵀ``, ``(n, n)``, and of ``x``, ``(n,)``; float64 holding float32 values."""

    matrix: Tensor
    mean: Tensor


@dataclass(frozen=True)
class Moments:
    """What is known of one group.

    Attributes:
        inputs: of what enters its first matrix.
        hidden: of what enters the down matrix; None for a single layer.
        tokens: how many were read.
        sensitivity: ``(out, out)``, the mean of ``g gᵀ`` over tokens, g the gradient of the loss with respect to what
            comes out of the group; None unless it was asked for.
    """

    inputs: SecondMoment
    hidden: SecondMoment | None
    tokens: int
    sensitivity: Tensor | None = None

    def of(self, role: str) -> SecondMoment:
        """The moments of the inputs of a matrix with this role."""
        return self.hidden if role == "down" and self.hidden is not None else self.inputs


@dataclass(frozen=True)
class Target:
    """A matrix to be replaced.

    Attributes:
        name: dotted name of its layer.
        role: ``up`` (to the hidden width of an MLP), ``down`` (back from it) or ``other``.
        weight: ``(out, in)``, in the model's dtype.
        bias: ``(out,)`` or None.
        shape: the split it gets.
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
        scale: one number for the whole sum; it becomes the scalars where the layer has them.
        bias: ``(out,)`` where the initialisation changes it, else None.
        order: which old hidden neuron stands at each new place, where an initialisation permutes them.
        curve: calibrated error after each round, where an initialisation iterates.
    """

    left: Tensor
    right: Tensor
    scale: float = 1.0
    bias: Tensor | None = None
    order: Tensor | None = None
    curve: tuple[float, ...] | None = None


def regularised(c: Tensor, ridge: float = RIDGE) -> Tensor:
    """C with a ridge relative to each neuron's own second moment, and a floor for neurons that never fire.

    Relative, because neurons differ in scale by orders of magnitude, and what a matter of units is must not decide.
    Positive definite whatever comes in: a matrix of rank one, of zeros, or one that rounding has made indefinite, for
    which the ridge grows tenfold until it suffices.
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
    """What an initialisation reads of ``KronyConfig``."""

    @property
    def rescale(self) -> bool: ...
    @property
    def epsilon(self) -> float | None: ...
    @property
    def seed(self) -> int: ...


class Initialise(Protocol):
    """First values for the matrices of one group (an MLP, or a single layer), in the order of ``targets``."""

    def __call__(
        self, targets: Sequence[Target], options: Options, moments: Moments | None = None
    ) -> list[Factors]: ...


class CostCurve(Protocol):
    """The cost of dropping the n cheapest hidden neurons, for n from 0 to ``count``: ``(count + 1,)``, rising.

    ``weight: (out, n)`` and ``bias: (out,)`` are the down matrix's.
    """

    def __call__(self, weight: Tensor, bias: Tensor | None, moments: Moments, count: int) -> Tensor: ...


class Check(Protocol):
    """Raises KronyError unless the method can initialise layers of these names and shapes.

    ``is_mlp`` says whether they are all the matrices of one MLP, the down matrix last.
    """

    def __call__(self, names: Sequence[str], shapes: Sequence[KronShape], *, is_mlp: bool) -> None: ...


def accept_all(names: Sequence[str], shapes: Sequence[KronShape], *, is_mlp: bool) -> None:
    """The check of a method that takes every layer."""


def same_shape(shape: KronShape) -> KronShape:
    """The shape that a method gives a matrix where it follows the scheme."""
    return shape


@dataclass(frozen=True, kw_only=True)
class Initialisation:
    """All that the rest of krony knows about a method.

    To add a method, write a file with a record and list the record in ``krony.init.registry``.

    Attributes:
        name: what ``--init`` calls it.
        initialise: computes the factors.
        needs_text: reads the moments of calibration text.
        per_matrix: looks at one matrix at a time, so streaming holds no more than one.
        reorders_neurons: gives hidden neurons other places; ``Factors.order`` says which.
        rescales: follows ``KronyConfig.rescale``.
        default_epsilon: entry of the right factor for dropped neurons; None for a method without such an entry.
        whole_neurons: takes only schemes that keep hidden neurons whole.
        cost_curve: costs by which ``allocation="global"`` compares layers; None for a method without.
        shape: the shape that a matrix gets where the scheme says another.
        check: refuses layers that the method can't initialise.
    """

    name: str
    initialise: Initialise
    needs_text: bool = False
    per_matrix: bool = False
    reorders_neurons: bool = False
    rescales: bool = False
    default_epsilon: float | None = None
    whole_neurons: bool = False
    cost_curve: CostCurve | None = None
    shape: Callable[[KronShape], KronShape] = same_shape
    check: Check = accept_all

    @property
    def takes_allocation(self) -> bool:
        """Whether ``allocation="global"`` works with it."""
        return self.cost_curve is not None
