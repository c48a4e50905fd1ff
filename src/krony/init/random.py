"""Random factors (paper, Appendix C): the control that inherits nothing from the matrix it replaces."""

from __future__ import annotations

import zlib
from collections.abc import Sequence

import torch

from krony.init.base import Factors, Initialisation, Moments, Options, Target

STD = 0.02  # of every entry of the sum: what GPT-2 and Llama draw their matrices with


def initialise(targets: Sequence[Target], options: Options, moments: Moments | None = None) -> list[Factors]:
    """Normal factors whose sum has entries of standard deviation 0.02; each layer's draw depends on seed and name."""
    return [_one(target, options.seed) for target in targets]


def _one(target: Target, seed: int) -> Factors:
    s = target.shape
    generator = torch.Generator().manual_seed(zlib.crc32(f"{seed} {target.name}".encode()))
    std = (STD / s.factors**0.5) ** 0.5  # of A's and of B's entries: k of their products add up
    left = torch.randn(s.factors, *s.left, generator=generator, dtype=torch.float64) * std
    right = torch.randn(s.factors, *s.right, generator=generator, dtype=torch.float64) * std
    return Factors(left.to(target.weight.device), right.to(target.weight.device))


RANDOM = Initialisation(name="random", initialise=initialise, per_matrix=True)
