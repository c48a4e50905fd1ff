"""Random neurons: a control for the choice of neurons. It keeps any of them, as they are, and reads no text.

Whatever a method that chooses neurons gains, it has to gain over this one, which leaves the same structure and the same
number of parameters.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence

import torch
from torch import Tensor

from krony.init.base import Moments, Options, Target
from krony.init.whole_neurons import method


def choose(targets: Sequence[Target], keep: int, options: Options, moments: Moments | None) -> Tensor:
    """Neurons drawn at random, from ``options.seed`` and the name of the down layer only."""
    down = targets[-1]
    return draw(down.weight.shape[1], keep, options.seed, down.name).to(down.weight.device)


def draw(neurons: int, keep: int, seed: int, name: str) -> Tensor:
    """``keep`` of the numbers below ``neurons``, each set as likely as any other, in rising order: ``(keep,)``.

    Examples:
        >>> draw(4, 4, seed=0, name="h.0.mlp.c_proj").tolist()
        [0, 1, 2, 3]
    """
    generator = torch.Generator().manual_seed(zlib.crc32(f"{seed} {name}".encode()))
    return torch.randperm(neurons, generator=generator)[:keep].sort().values


RANDOM_NEURONS = method("random-neurons", choose)
