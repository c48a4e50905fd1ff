"""Van Loan after a permutation of the neurons: the function stays that of the matrices, and the error is smaller."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import krony
from krony.init import permuted
from krony.kronecker.algebra import KronShape, dense, nearest
from small_models import BUILDERS


def error(weight, shape):
    return ((weight - dense(*nearest(weight, shape))).norm() / weight.norm()).item()


@pytest.mark.parametrize("scheme", ["keep=0.5", pytest.param("256x128:4", marks=pytest.mark.slow)])
def test_every_matrix_of_the_shipped_model_is_nearer_than_by_plain_van_loan(scheme):
    """``error`` is recomputed here from the factors that were put in and the permuted original."""
    reports = {}
    for init in ("van-loan", "permuted"):
        model = krony.demo_model()
        reports[init] = krony.compress(model, krony.KronyConfig(scheme, init=init, rescale=False)).layers
    assert len(reports["permuted"]) == 12
    for plain, better in zip(reports["van-loan"], reports["permuted"], strict=True):
        assert plain.name == better.name and better.error < 0.99 * plain.error


@pytest.mark.parametrize("family", BUILDERS)
def test_with_as_many_factors_as_it_takes_the_model_is_the_same(family, ids):
    """A permutation alone changes nothing: biases move along, gates too."""
    model = BUILDERS[family]()
    expected = model(ids).logits
    krony.compress(model, krony.KronyConfig("48x24:6" if family == "llama" else "48x24:8", init="permuted"))
    torch.testing.assert_close(model(ids).logits, expected, rtol=1e-4, atol=1e-4)
    assert any(not torch.equal(p, q) for p, q in zip(model.parameters(), BUILDERS[family]().parameters(), strict=False))


SHAPES = st.builds(
    KronShape, m1=st.integers(1, 5), n1=st.integers(1, 5), m2=st.integers(1, 4), n2=st.integers(1, 4)
).flatmap(lambda s: st.integers(1, s.max_factors).map(lambda k: replace(s, factors=k)))


@settings(deadline=None, max_examples=100)
@given(seed=st.integers(0, 10_000), shape=SHAPES, matrices=st.integers(1, 3), kind=st.sampled_from("gsrz"))
def test_no_matrix_is_farther_than_by_van_loan_in_the_given_order(seed, shape, matrices, kind):
    """Gaussian matrices, sparse ones, ones of few distinct rows, and ones with neurons of zeros."""
    generator = torch.Generator().manual_seed(seed)
    rows = [torch.randn(shape.rows, shape.columns, generator=generator, dtype=torch.float64) for _ in range(matrices)]
    if kind == "s":
        rows = [w.where(w.abs() > 1, 0.0) for w in rows]
    elif kind == "r":
        rows = [w[torch.randint(0, (len(w) + 1) // 2, (len(w),), generator=generator)] for w in rows]
    elif kind == "z":
        rows = [w * (torch.arange(len(w)) % 2)[:, None] for w in rows]
    order = permuted.best_order(rows, [shape] * matrices)
    assert sorted(order.tolist()) == list(range(shape.rows))
    for w in rows:
        given, found = ((w[o] - dense(*nearest(w[o], shape))).norm() for o in (slice(None), order))
        assert found <= given + 1e-7 * w.norm()


def planted(shape, seed, *, matrices=2, noise=0.0):
    """The rows of exact sums of products, shuffled alike in all matrices."""
    generator = torch.Generator().manual_seed(seed)
    shuffled = torch.randperm(shape.rows, generator=generator)
    made = []
    for _ in range(matrices):
        left, right = (
            torch.randn(shape.factors, *size, generator=generator, dtype=torch.float64)
            for size in (shape.left, shape.right)
        )
        whole = dense(left, right)
        extra = torch.randn(whole.shape, generator=generator, dtype=torch.float64)
        made.append((whole / whole.norm() + noise * extra / extra.norm())[shuffled])
    return made


@pytest.mark.parametrize("matrices", [1, 2])
@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize(
    "shape",
    [
        KronShape(16, 8, 2, 1, 1),
        KronShape(12, 12, 3, 3, 1),
        KronShape(32, 16, 4, 2, 4),  # as TQCompressor's 768x384:4
        KronShape(64, 32, 3, 3, 4),  # as the paper's 1024x256:4
        KronShape(16, 24, 8, 1, 4),
        KronShape(32, 64, 4, 1, 2),
        KronShape(6, 4, 16, 9, 2),
    ],
    ids=str,
)
def test_a_planted_order_is_found(shape, seed, matrices):
    rows = planted(shape, seed, matrices=matrices)
    assert min(error(w, shape) for w in rows) > 0.25
    order = permuted.best_order(rows, [shape] * matrices)
    assert max(error(w[order], shape) for w in rows) < 1e-6


def test_a_planted_order_is_found_through_noise():
    shape = KronShape(64, 32, 3, 3, 4)
    rows = planted(shape, 0, noise=0.05)
    order = permuted.best_order(rows, [shape] * 2)
    assert max(error(w[order], shape) for w in rows) < 0.05  # the noise is not in the products' span alone


def test_neurons_that_were_shuffled_out_of_an_exact_product_are_brought_back():
    generator = torch.Generator().manual_seed(0)
    left, right = torch.randn(1, 16, 8, generator=generator), torch.tensor([[[1.0], [-0.5]]])
    whole = dense(left, right).double()
    shuffled = whole[torch.randperm(32, generator=generator)]
    shape = KronShape(16, 8, 2, 1)
    assert error(shuffled, shape) > 0.3
    assert error(shuffled[permuted.best_order([shuffled], [shape])], shape) < 1e-6


def test_matrices_of_zeros():
    zero = torch.zeros(8, 4, dtype=torch.float64)
    assert sorted(permuted.best_order([zero], [KronShape(4, 4, 2, 1)]).tolist()) == list(range(8))


def test_single_layers_are_refused():
    model = BUILDERS["gpt2"]()
    with pytest.raises(krony.KronyError, match=r"c_attn: init permuted needs complete MLPs"):
        krony.compress(model, krony.KronyConfig("72x48", init="permuted", modules="c_attn"))
