"""The choice of a forward path, and the reason it gives."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from krony import KronyError
from krony.kronecker.algebra import KronShape
from krony.kronecker.forward_path import check_path, choose_path, cost, dense_from, multiply_adds, structured_path
from krony.kronecker.schemes import resolve


def test_multiply_adds_are_those_of_the_einsums():
    s = KronShape(5, 3, 2, 7, 4)
    left_first = 4 * (5 * 3) * 7 + 4 * 5 * (7 * 2)  # A_f X, (5,3)@(3,7); then times B_fᵀ, (5,7)@(7,2)
    right_first = 4 * 3 * (7 * 2) + 4 * (5 * 3) * 2  # X B_fᵀ, (3,7)@(7,2); then A_f times it, (5,3)@(3,2)
    assert multiply_adds(s) == {"left": left_first, "right": right_first, "dense": 10 * 21}


@pytest.mark.parametrize("scheme", ["81M", "96M", "80M", "67M", "68M", "1024x256", "3072x384"])
def test_factors_that_save_arithmetic_are_never_multiplied_out(scheme):
    for shape in (resolve(scheme, 3072, 768), resolve(scheme, 3072, 768).transposed):
        for tokens in (1, 64, 512, 100_000):
            assert choose_path(shape, tokens).path in ("left", "right")
    assert structured_path(resolve("81M", 3072, 768)) == "left"  # shrinks last on the way up,
    assert structured_path(resolve("81M", 3072, 768).transposed) == "right"  # first on the way down


def test_with_many_factors_the_dense_matrix_is_faster_from_some_length_on():
    shape = resolve("92M", 3072, 768)  # four factors, 3x3: 4/3 of the dense matrix's multiply-adds, 4/9 of its numbers
    start = dense_from(shape, cached=True)
    assert 1 < start < 512
    assert choose_path(shape, start - 1).path != "dense" and choose_path(shape, start).path == "dense"
    assert dense_from(shape, cached=False) > start  # what every call makes again must save more
    assert "cached" in choose_path(shape, 512).why and "again" in choose_path(shape, 5000, cached=False).why
    assert f"dense from {start} tokens" in choose_path(shape, 1).why


def test_a_full_sum_is_dense_from_the_first_token():
    assert choose_path(KronShape(4, 4, 2, 2, 4), 1).path == "dense"


@settings(max_examples=100, deadline=None)
@given(st.tuples(*[st.integers(1, 64)] * 4), st.integers(1, 6), st.integers(1, 4096), st.booleans())
def test_the_plan_is_the_cheapest_by_its_own_costs(sides, factors, tokens, cached):
    shape = KronShape(*sides, min(factors, KronShape(*sides).max_factors))
    costs = {}
    for path in ("left", "right", "dense"):
        fixed, each = cost(shape, path, cached=cached)
        costs[path] = fixed + tokens * each
    chosen = choose_path(shape, tokens, cached=cached).path
    structured = costs[structured_path(shape)]
    if shape.parameters < shape.rows * shape.columns:
        assert (chosen == "dense") == (costs["dense"] <= structured and dense_from(shape, cached=cached) is not None)


def test_a_forced_path_is_taken_and_an_unknown_one_refused():
    forced = choose_path(resolve("81M", 3072, 768), 512, forced="dense")
    assert forced.path == "dense" and "set by the user" in forced.why
    check_path(None)
    with pytest.raises(KronyError, match="path 'fast' is unknown: it is one of left, right, dense"):
        check_path("fast")
