"""Linear assignment: which neuron goes to which position."""

from __future__ import annotations

import torch
from torch import Tensor


def assign(gain: Tensor) -> Tensor:
    """The neuron for each position that makes the sum of gains the largest.

    Args:
        gain: ``(positions, neurons)``, at least as many neurons as positions.

    Returns:
        ``(positions,)`` int64, on the device of ``gain``; no neuron occurs twice.

    Examples:
        >>> assign(torch.tensor([[1.0, 5.0], [0.0, 9.0]]))
        tensor([0, 1])
    """
    from scipy.optimize import linear_sum_assignment  # slow to import

    _, columns = linear_sum_assignment(gain.cpu().numpy(), maximize=True)
    return torch.from_numpy(columns).to(gain.device)
