"""The paper's pruning (3.3.3): A keeps every r-th row or column, and B = [1, ε, …] stands for the others.

The shape of the right factor says what is dropped. 1x2 on ``c_fc`` drops every second input channel (section 3.1 and
the published code), 2x1 every second neuron (the shapes of the paper's figure). With k factors, k of each group of r
are kept.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from krony.init.base import Factors, Initialisation, Moments, Options, Target

EPSILON = 0.1  # paper, 3.3.3: "to ensure effective learning and avoid the zero initialization issue"


def initialise(targets: Sequence[Target], options: Options, moments: Moments | None = None) -> list[Factors]:
    """``A_f`` holds the f-th entry of every block of W; ``B_f`` is 1 at that entry and ε elsewhere. In float64.

    ε is ``options.epsilon``, by default 0.1. ``moments`` are not used.
    """
    epsilon = EPSILON if options.epsilon is None else options.epsilon
    return [_one(target, epsilon) for target in targets]


def _one(target: Target, epsilon: float) -> Factors:
    s = target.shape
    blocks = target.weight.double().reshape(s.m1, s.m2, s.n1, s.n2)  # (i, p, j, q)
    cells = range(s.factors)  # A_f takes the f-th entry of each (m2, n2) block, in row-major order
    left = torch.stack([blocks[:, f // s.n2, :, f % s.n2] for f in cells])  # (k, m1, n1)
    right = torch.full((s.factors, s.m2 * s.n2), epsilon, dtype=torch.float64, device=left.device)
    right[cells, cells] = 1.0
    return Factors(left, right.view(s.factors, s.m2, s.n2))


PRUNE = Initialisation(name="prune", initialise=initialise, per_matrix=True, default_epsilon=EPSILON)
