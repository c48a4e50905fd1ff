"""Random factors (paper, Appendix C): a control that uses no value of the matrix it replaces."""

from __future__ import annotations

import zlib
from collections.abc import Sequence

import torch

from krony.init.base import Factors, Initialisation, Moments, Options, Target

STD = 0.02  # standard deviation of the entries of the sum: GPT-2 and Llama draw their matrices with it


def initialise(targets: Sequence[Target], options: Options, moments: Moments | None = None) -> list[Factors]:
    """Normal factors, in float64, whose sum has entries of standard deviation 0.02.

    A layer's factors depend on ``options.seed`` and the layer's name only. ``moments`` are not used.
    """
    return [_one(target, options.seed) for target in targets]


def _one(target: Target, seed: int) -> Factors:
    s = target.shape
    generator = torch.Generator().manual_seed(zlib.crc32(f"{seed} {target.name}".encode()))
    std = (STD / s.factors**0.5) ** 0.5  # of the entries of A and B: an entry of the sum adds k products
    left = torch.randn(s.factors, *s.left, generator=generator, dtype=torch.float64) * std
    right = torch.randn(s.factors, *s.right, generator=generator, dtype=torch.float64) * std
    return Factors(left.to(target.weight.device), right.to(target.weight.device))


RANDOM = Initialisation(name="random", initialise=initialise, per_matrix=True)
