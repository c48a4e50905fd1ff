"""Linear assignment: which neuron goes to which place."""

from __future__ import annotations

import torch
from torch import Tensor


def assign(gain: Tensor) -> Tensor:
    """Which neuron goes to each place so that the gains add up to the most."""
    from scipy.optimize import linear_sum_assignment  # heavy

    _, columns = linear_sum_assignment(gain.cpu().numpy(), maximize=True)
    return torch.from_numpy(columns).to(gain.device)
