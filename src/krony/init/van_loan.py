"""The nearest sum of Kronecker products, with adaptive normalisation (paper, 3.3.1, 3.3.2 and Algorithm 1).

The method is Van Loan & Pitsianis 1993.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from krony.init.base import Factors, Initialisation, Moments, Options, Target
from krony.kronecker.algebra import dense, nearest


def initialise(targets: Sequence[Target], options: Options, moments: Moments | None = None) -> list[Factors]:
    """The factors nearest to each matrix in Frobenius norm, in float64.

    With ``options.rescale``, ``Factors.scale`` gives the sum the norm of the matrix (paper, 3.3.2). ``moments`` are not
    used.
    """
    return [_one(target, options.rescale) for target in targets]


def _one(target: Target, rescale: bool) -> Factors:
    weight = target.weight.double()
    left, right = nearest(weight, target.shape)
    return Factors(left, right, scale=lost_norm(weight, dense(left, right)) if rescale else 1.0)


def lost_norm(weight: Tensor, approximation: Tensor) -> float:
    """α = ‖W‖ / ‖Ŵ‖, which gives the approximation the norm of the original (paper, 3.3.2); 1 where Ŵ is zero.

    Examples:
        >>> import torch
        >>> lost_norm(torch.tensor([3.0, 4.0]), torch.tensor([0.0, 4.0]))
        1.25
    """
    norm = approximation.norm().item()
    return weight.norm().item() / norm if norm > 0 else 1.0


VAN_LOAN = Initialisation(name="van-loan", initialise=initialise, per_matrix=True, rescales=True)
