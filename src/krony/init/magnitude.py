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

from krony.init.base import Moments, Options, Target
from krony.init.whole_neurons import highest, method


def choose(targets: Sequence[Target], keep: int, options: Options, moments: Moments | None) -> Tensor:
    """The neurons of the highest scores; ``moments`` are not used."""
    *ups, down = targets
    return highest(scores([up.weight for up in ups], down.weight), keep)


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


MAGNITUDE = method("magnitude", choose)
