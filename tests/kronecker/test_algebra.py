"""The algebra against numpy's kron and a dense SVD, in float64."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from krony import KronyError
from krony.kronecker.algebra import KronShape, dense, nearest, rearrange

sides = st.integers(1, 5)


@st.composite
def shapes(draw) -> KronShape:
    m1, n1, m2, n2 = (draw(sides) for _ in range(4))
    return KronShape(m1, n1, m2, n2, draw(st.integers(1, min(m1 * n1, m2 * n2))))


def random_matrix(shape: KronShape, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape.rows, shape.columns, generator=generator, dtype=torch.float64)


@given(shapes(), st.integers(0, 99))
def test_dense_is_the_sum_of_numpys_kron(shape, seed):
    import numpy as np

    generator = torch.Generator().manual_seed(seed)
    left = torch.randn(shape.factors, *shape.left, generator=generator, dtype=torch.float64)
    right = torch.randn(shape.factors, *shape.right, generator=generator, dtype=torch.float64)
    scalars = torch.randn(shape.factors, generator=generator, dtype=torch.float64)
    expected = sum(s * np.kron(a, b) for a, b, s in zip(left.numpy(), right.numpy(), scalars.numpy(), strict=True))
    torch.testing.assert_close(dense(left, right, scalars), torch.from_numpy(expected))


@given(shapes(), st.integers(0, 99))
def test_nearest_has_the_error_of_the_svd(shape, seed):
    weight = random_matrix(shape, seed)
    tail = torch.linalg.svdvals(rearrange(weight, shape))[shape.factors :]
    error = (weight - dense(*nearest(weight, shape))).norm()
    torch.testing.assert_close(error, tail.norm(), rtol=1e-6, atol=1e-9 * weight.norm().item())


@pytest.mark.parametrize(("m1", "n1"), [(48, 48), (96, 48), (64, 16), (12, 6), (192, 24)])
def test_nearest_from_one_factor_to_all(m1, n1):
    weight = torch.randn(192, 48, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    full = KronShape.split(192, 48, m1, n1)
    sigma = torch.linalg.svdvals(rearrange(weight, full))
    for k in range(1, full.max_factors + 1):
        error = (weight - dense(*nearest(weight, KronShape.split(192, 48, m1, n1, k)))).norm()
        torch.testing.assert_close(error, sigma[k:].norm(), rtol=1e-6, atol=1e-12 * weight.norm().item())
    torch.testing.assert_close(dense(*nearest(weight, KronShape.split(192, 48, m1, n1, full.max_factors))), weight)


def test_nearest_orders_factors_and_splits_the_singular_value():
    shape = KronShape(6, 4, 2, 3, 3)
    left, right = nearest(random_matrix(shape, 3), shape)
    norms = left.flatten(1).norm(dim=1)
    assert norms.tolist() == sorted(norms.tolist(), reverse=True)
    torch.testing.assert_close(norms, right.flatten(1).norm(dim=1))


def test_nearest_of_a_matrix_of_lower_rank_is_finite_and_exact():
    shape = KronShape(4, 3, 2, 2, 4)
    a, b = random_matrix(KronShape(4, 3, 1, 1), 0), random_matrix(KronShape(2, 2, 1, 1), 1)
    weight = torch.kron(a, b)
    torch.testing.assert_close(dense(*nearest(weight, shape)), weight)
    left, right = nearest(torch.zeros_like(weight), shape)
    assert left.isfinite().all() and right.isfinite().all()


@given(shapes())
def test_rank_bounds_the_numerical_rank(shape):
    weight = dense(*nearest(random_matrix(shape, 5), shape))
    assert torch.linalg.matrix_rank(weight) <= shape.rank


def test_nearest_keeps_the_dtype():
    shape = KronShape(2, 2, 2, 2)
    assert nearest(torch.randn(4, 4, dtype=torch.bfloat16), shape)[0].dtype == torch.bfloat16


@pytest.mark.parametrize("left", [(5, 48), (96, 7), (0, 48), (384, 48)])
def test_a_left_factor_that_does_not_divide_is_refused(left):
    with pytest.raises(KronyError, match="does not divide a matrix of 192x48"):
        KronShape.split(192, 48, *left)


@pytest.mark.parametrize("factors", [0, 3])
def test_too_many_factors_are_refused(factors):
    with pytest.raises(KronyError, match="from 1 to 2"):
        KronShape.split(192, 48, 96, 48, factors)


def test_transposed_is_the_split_of_the_transpose():
    shape = KronShape(6, 4, 2, 3, 2)
    weight = random_matrix(shape, 7)
    left, right = nearest(weight, shape)
    approximation = dense(left.mT, right.mT)
    torch.testing.assert_close(approximation, dense(left, right).T)
    assert (shape.transposed.rows, shape.transposed.columns) == (weight.shape[1], weight.shape[0])
    assert shape.transposed.parameters == shape.parameters and shape.transposed.rank == shape.rank
