"""Wanda's score, summed over a hidden neuron: weights times activations (Sun et al. 2024, arXiv:2306.11695).

Wanda scores the weight from input j to output i by ``|W[i, j]| · ‖x_j‖₂``, the norm taken over the calibration tokens.
The structured form, named Wanda-sp by An et al. (2024, arXiv:2312.11983), sums it over the outputs of the down matrix:

    S_j = ‖x_j‖₂ · Σ_i |W[i, j]|.

The neurons of the lowest scores are dropped, and nothing is refitted. Here the norm is the root of the mean of x_j²,
which orders a layer's neurons in the same way.

The mean is weighted as the calibration weighs tokens; the paper weighs all the same (``token_weighting=False``).
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from krony.init.base import Moments, Options, SecondMoment, Target
from krony.init.whole_neurons import highest, method


def choose(targets: Sequence[Target], keep: int, options: Options, moments: Moments | None) -> Tensor:
    """The neurons of the highest scores."""
    assert moments is not None and moments.hidden is not None
    return highest(scores(targets[-1].weight, moments.hidden), keep)


def scores(weight: Tensor, hidden: SecondMoment) -> Tensor:
    """``sqrt(mean(x_j²)) · Σ_i |W[i, j]|`` of every neuron of ``weight: (out, hidden)``: ``(hidden,)``, float64.

    Examples:
        >>> import torch
        >>> moments = SecondMoment(matrix=torch.diag(torch.tensor([4.0, 9.0])), mean=torch.zeros(2))
        >>> scores(torch.tensor([[1.0, 0.5], [-2.0, 0.5]]), moments).tolist()
        [6.0, 3.0]
    """
    second = hidden.matrix.diagonal().to(weight.device).double().clamp_min(0)  # (hidden,)
    return second.sqrt() * weight.double().abs().sum(0)


WANDA = method("wanda", choose, needs_text=True)
