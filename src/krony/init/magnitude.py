"""Magnitude: the hidden neurons of the largest weights stay; no text is read.

Han et al. (2015, arXiv:1506.02626) remove the weights of the smallest magnitude, and Li et al. (2017,
arXiv:1608.08710) complete filters by their norm. A hidden neuron owns a row of each up matrix U and a column of the
down matrix W, and its score is the squared norm of all of them:

    S_j = Σ_U ‖U[j, :]‖² + ‖W[:, j]‖².

Biases do not count. The neurons of the lowest scores are dropped, and nothing is refitted.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from krony.init.base import Factors, Initialisation, Moments, Options, Target
from krony.init.whole_neurons import EPSILON, as_they_are, check_for, factors_of, highest, neurons_to_keep

NAME = "magnitude"


def initialise(targets: Sequence[Target], options: Options, moments: Moments | None = None) -> list[Factors]:
    """Factors that keep the neurons of the highest scores as they are, in float64; ``moments`` are not used.

    Raises KronyError for single layers, and for schemes that split neurons.
    """
    keep, (*ups, down) = neurons_to_keep(targets, NAME), targets
    kept = highest(scores([up.weight for up in ups], down.weight), keep)
    return factors_of(as_they_are(down, kept), targets, options)


def scores(ups: Sequence[Tensor], down: Tensor) -> Tensor:
    """The squared norm of every neuron's weights, ``(hidden,)``, float64.

    ``ups`` are ``(hidden, width)`` and ``down`` is ``(out, hidden)``.

    Examples:
        >>> import torch
        >>> scores([torch.tensor([[1.0], [2.0]])], torch.tensor([[3.0, 1.0]])).tolist()
        [10.0, 5.0]
    """
    score = down.double().square().sum(0)  # (hidden,)
    for up in ups:
        score = score + up.double().square().sum(1)
    return score


MAGNITUDE = Initialisation(
    name=NAME,
    initialise=initialise,
    reorders_neurons=True,
    default_epsilon=EPSILON,
    whole_neurons=True,
    check=check_for(NAME),
)
