"""Whitened truncated SVD against the theorem it rests on."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from krony import KronyConfig
from krony.init.base import Moments, SecondMoment, Target, regularised
from krony.init.registry import find_initialisation
from krony.init.svd import low_rank
from krony.kronecker.algebra import KronShape, dense


@given(st.integers(2, 9), st.integers(2, 9), st.integers(0, 99), st.data())
@settings(max_examples=40, deadline=None)
def test_the_cost_is_the_tail_of_the_whitened_singular_values(out, into, seed, data):
    """Eckart-Young: no matrix of this rank is nearer in the outputs."""
    k = data.draw(st.integers(1, min(out, into)))
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(out, into, generator=generator, dtype=torch.float64)
    x = torch.randn(50, into, generator=generator, dtype=torch.float64)
    c = regularised(x.T @ x)
    target = Target("fc", "other", weight, None, KronShape(out, 1, 1, into, k))
    moments = Moments(SecondMoment(x.T @ x, x.mean(0)), None, 50)
    (made,) = find_initialisation("svd").initialise([target], KronyConfig("1x1", init="svd"), moments)
    lost = weight - dense(made.left, made.right)
    tail = torch.linalg.svdvals(weight @ torch.linalg.cholesky(c))[k:].square().sum()
    torch.testing.assert_close(((lost @ c) * lost).sum(), tail, rtol=1e-6, atol=1e-9)


def test_a_rank_of_the_same_parameters():
    half = low_rank(KronShape(768, 576, 2, 1, 1))  # half of a 1536x576
    assert half == KronShape(1536, 1, 1, 576, 209)
    assert half.parameters <= 768 * 576 + 2
