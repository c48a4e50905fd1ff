"""The bootstrap of a ratio: against its formula, and against what it is for."""

import math

import torch

from krony.evaluation.interval import SAMPLES, ratio_interval, sequence_losses
from krony.evaluation.perplexity import measure_perplexity
from small_models import gpt2


def test_the_ratio_is_that_of_the_perplexities():
    model, other = gpt2(), gpt2(n_layer=1)
    ids = torch.randint(0, 256, (5, 16), generator=torch.Generator().manual_seed(0))
    losses, original = sequence_losses(model, ids), sequence_losses(other, ids)
    perplexities = [
        measure_perplexity(m, ids.flatten(), protocol="token", window=16, stride=16)[0] for m in (model, other)
    ]
    found = ratio_interval(losses, original)
    assert math.isclose(found.ratio, perplexities[0] / perplexities[1], rel_tol=1e-9)
    assert found.low <= found.ratio <= found.high and losses.shape == (5,)


def test_the_interval_holds_the_truth_as_often_as_it_says():
    """Of 200 samples of 40 sequences, about 95 % have an interval that holds the true ratio; fewer sequences, wider."""
    generator = torch.Generator().manual_seed(1)
    held = 0
    for trial in range(200):
        original = 3 + torch.randn(40, generator=generator).double()
        excess = 0.1 + 0.05 * torch.randn(40, generator=generator).double()
        found = ratio_interval(original + excess, original, seed=trial)
        held += found.low <= math.exp(0.1) <= found.high
    assert 0.88 <= held / 200 <= 0.99
    wide = ratio_interval((original + excess)[:5], original[:5])
    assert wide.high - wide.low > found.high - found.low and SAMPLES >= 1000


def test_what_is_hard_for_both_cancels_and_one_sequence_says_nothing_of_others():
    original = torch.tensor([1.0, 5.0, 3.0, 9.0])
    found = ratio_interval(original + 0.2, original)
    assert math.isclose(found.low, math.exp(0.2), rel_tol=1e-6) and math.isclose(found.high, found.low, rel_tol=1e-6)
    assert ratio_interval(original[:1], original[:1])[1:] == (0.0, math.inf)


def test_the_same_seed_gives_the_same_interval():
    losses = torch.rand(9, generator=torch.Generator().manual_seed(2))
    assert ratio_interval(losses, torch.zeros(9), seed=3) == ratio_interval(losses, torch.zeros(9), seed=3)
    assert str(ratio_interval(torch.zeros(9), torch.zeros(9))) == "1.000 (1.000 to 1.000)"
