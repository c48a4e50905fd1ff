"""What every initialisation takes and gives."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from krony.config import KronyConfig
from krony.kron import KronShape

RIDGE = 1e-3  # added to C's diagonal, relative to it


@dataclass(frozen=True)
class Second:
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

    inputs: Second
    hidden: Second | None
    tokens: int
    sensitivity: Tensor | None = None

    def of(self, role: str) -> Second:
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


class Init(Protocol):
    """First values for the matrices of one group (an MLP, or a single layer), in the order of ``targets``."""

    def __call__(
        self, targets: Sequence[Target], config: KronyConfig, moments: Moments | None = None
    ) -> list[Factors]: ...
