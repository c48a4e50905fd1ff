"""FLAP: fluctuation-based adaptive structured pruning (An et al. 2024, arXiv:2312.11983), for hidden neurons.

A neuron whose activation hardly fluctuates can be replaced by its mean, which a bias can hold. The score of neuron j is

    S_j = Var_t(x_j) · ‖W[:, j]‖²,

where x_j is its activation, t runs over the tokens of the calibration text, and W is the down matrix (the paper's
weighted fluctuation). The neurons D of the lowest scores are dropped, and the bias takes up their mean:

    b ← b + Σ_{j ∈ D} W[:, j] · mean_t(x_j).

A down layer without a bias stays without one, because a plain model of that architecture could not load it: the
compensation applies where the layer has a bias (GPT-2 and its kin, not Llama). Columns of W that stay are unchanged.

For ``allocation="global"`` the paper standardises the scores within each layer, ``(S_j − mean(S)) / std(S)``, and drops
what lies below one threshold for all layers. The cumulative sums of the sorted standard scores are a convex curve whose
slopes are these scores, so krony's allocation drops by the same threshold, in its portions of neurons.

Var and mean are weighted as the calibration weighs tokens; the paper weighs all the same (``token_weighting=False``).
"""

from __future__ import annotations

import torch
from torch import Tensor

from krony.init.base import Moments, Ranking, SecondMoment
from krony.init.whole_neurons import Selection, method


def scores(weight: Tensor, hidden: SecondMoment) -> Tensor:
    """``Var(x_j) · ‖W[:, j]‖²`` of every neuron, ``(hidden,)``, float64.

    Examples:
        >>> moments = SecondMoment(matrix=torch.diag(torch.tensor([5.0, 4.0])), mean=torch.tensor([1.0, 2.0]))
        >>> scores(torch.tensor([[3.0, 3.0]]), moments).tolist()  # the second neuron is constant
        [36.0, 0.0]
    """
    mean, second = hidden.mean.to(weight.device), hidden.matrix.diagonal().to(weight.device)
    variance = (second.double() - mean.double().square()).clamp_min(0)  # (hidden,)
    return variance * weight.double().square().sum(0)


def rank(weight: Tensor, bias: Tensor | None, moments: Moments, count: int) -> Ranking:
    """The ``count`` neurons of the lowest scores; the costs are sums of their standard scores, float64, convex.

    They fall first, as standard scores below the mean are negative. Where all scores are equal they are all zero.
    """
    assert moments.hidden is not None
    each = scores(weight, moments.hidden)
    standard = (each - each.mean()) / each.std().clamp_min(torch.finfo(each.dtype).tiny)
    order = each.argsort(descending=True, stable=True).flip(0)[:count]  # of equal ones the first stays
    return Ranking(order, torch.cat([each.new_zeros(1), standard[order].cumsum(0)]))


def with_mean(weight: Tensor, bias: Tensor | None, moments: Moments | None, kept: Tensor) -> Selection:
    """The columns of the kept neurons; the bias ``(out,)``, where there is one, takes up the mean of the others."""
    w = weight.double()
    if bias is None:
        return Selection(kept, w[:, kept])
    assert moments is not None and moments.hidden is not None
    mean = moments.hidden.mean.to(weight.device).clone()  # (hidden,)
    mean[kept] = 0.0
    return Selection(kept, w[:, kept], bias.double() + w @ mean)


FLAP = method("flap", refit=with_mean, needs_text=True, rank=rank)
