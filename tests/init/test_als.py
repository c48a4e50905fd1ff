"""Weighted alternating least squares: each half step is the least-squares optimum, and the whole never climbs."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from krony import KronyConfig
from krony.init import als
from krony.init.base import Moments, SecondMoment, Target
from krony.init.registry import find_initialisation
from krony.kronecker.algebra import KronShape, dense


def second(width: int, seed: int) -> SecondMoment:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(300, width, generator=generator, dtype=torch.float64) * torch.logspace(-1, 1, width)
    return SecondMoment(x.T @ x / 300, x.mean(0))


def cost(weight, factors, c) -> float:
    lost = weight - dense(factors.left * factors.scale, factors.right)
    return float(((lost @ c) * lost).sum())


shapes = st.tuples(*[st.integers(1, 4)] * 4, st.integers(1, 3)).filter(
    lambda s: s[4] <= min(s[0] * s[1], s[2] * s[3]) and s[2] * s[3] > 1
)


@given(shapes, st.integers(0, 99))
@settings(max_examples=40, deadline=None)
def test_never_worse_than_its_start_and_never_climbs(sizes, seed):
    shape = KronShape(*sizes)
    weight = torch.randn(shape.rows, shape.columns, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    target, moments = Target("fc", "other", weight, None, shape), Moments(second(shape.columns, seed), None, 300)
    (made,) = find_initialisation("als").initialise([target], KronyConfig("1x1", init="als"), moments)
    (start,) = find_initialisation("van-loan").initialise([target], KronyConfig("1x1", init="van-loan", rescale=False))
    assert cost(weight, made, moments.inputs.matrix) <= cost(weight, start, moments.inputs.matrix) * (1 + 1e-2) + 1e-12
    assert list(made.curve) == sorted(made.curve, reverse=True)


def test_a_sum_of_products_is_found_again():
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randn(2, 6, 4, generator=generator, dtype=torch.float64) for _ in range(2))
    weight, c = dense(left, right), second(16, 1)
    shape = KronShape(6, 4, 6, 4, 2)
    target, config = Target("fc", "other", weight, None, shape), KronyConfig("6x4:2", init="als")
    (made,) = find_initialisation("als").initialise([target], config, Moments(c, None, 300))
    torch.testing.assert_close(dense(made.left, made.right), weight, rtol=1e-6, atol=1e-6)


def test_half_steps_solve_their_least_squares():
    """Against lstsq over the explicit design matrix."""
    generator = torch.Generator().manual_seed(2)
    (k, m1, n1, m2, n2) = (2, 3, 2, 2, 3)
    weight = torch.randn(m1 * m2, n1 * n2, generator=generator, dtype=torch.float64)
    left = torch.randn(k, m1, n1, generator=generator, dtype=torch.float64)
    right = torch.randn(k, m2, n2, generator=generator, dtype=torch.float64)
    c = second(n1 * n2, 3).matrix
    root = torch.linalg.cholesky(c)

    def best(make, count):
        columns = torch.stack([(make(unit) @ root).flatten() for unit in torch.eye(count, dtype=torch.float64)], dim=1)
        return torch.linalg.lstsq(columns, (weight @ root).flatten()).solution

    found = als._solve_left(right, c, weight @ c, left.shape)
    expected = best(lambda v: dense(v.view(k, m1, n1), right), k * m1 * n1).view(k, m1, n1)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    found = als._solve_right(left, c, weight @ c, right.shape)
    expected = best(lambda v: dense(left, v.view(k, m2, n2)), k * m2 * n2).view(k, m2, n2)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("weight", [torch.zeros(6, 4), torch.ones(6, 4)])
def test_matrices_of_rank_zero_and_one(weight):
    target = Target("fc", "other", weight, None, KronShape(3, 2, 2, 2, 2))
    (made,) = find_initialisation("als").initialise(
        [target], KronyConfig("3x2:2", init="als"), Moments(second(4, 0), None, 300)
    )
    torch.testing.assert_close(dense(made.left, made.right), weight.double(), atol=1e-6, rtol=1e-6)
