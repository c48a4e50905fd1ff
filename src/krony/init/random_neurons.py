"""Random neurons: a control for the choice of neurons. It keeps any of them, as they are, and reads no text.

Whatever a method that chooses neurons gains, it has to gain over this one, which leaves the same structure and the same
number of parameters.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence

import torch
from torch import Tensor

from krony.init.base import Factors, Initialisation, Moments, Options, Target
from krony.init.whole_neurons import EPSILON, as_they_are, check_for, factors_of, neurons_to_keep

NAME = "random-neurons"


def initialise(targets: Sequence[Target], options: Options, moments: Moments | None = None) -> list[Factors]:
    """Factors that keep neurons drawn at random, as they are, in float64; ``moments`` are not used.

    The choice depends on ``options.seed`` and the name of the down layer only. Raises KronyError for single layers, and
    for schemes that split neurons.
    """
    keep, down = neurons_to_keep(targets, NAME), targets[-1]
    kept = draw(down.weight.shape[1], keep, options.seed, down.name)
    return factors_of(as_they_are(down, kept.to(down.weight.device)), targets, options)


def draw(neurons: int, keep: int, seed: int, name: str) -> Tensor:
    """``keep`` of the numbers below ``neurons``, each set as likely as any other, in rising order: ``(keep,)``.

    Examples:
        >>> draw(4, 4, seed=0, name="h.0.mlp.c_proj").tolist()
        [0, 1, 2, 3]
    """
    generator = torch.Generator().manual_seed(zlib.crc32(f"{seed} {name}".encode()))
    return torch.randperm(neurons, generator=generator)[:keep].sort().values


RANDOM_NEURONS = Initialisation(
    name=NAME,
    initialise=initialise,
    reorders_neurons=True,
    default_epsilon=EPSILON,
    whole_neurons=True,
    check=check_for(NAME),
)
