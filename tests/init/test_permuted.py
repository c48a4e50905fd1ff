"""Van Loan after a permutation of the neurons: the function stays that of the matrices, and the error is smaller."""

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


@pytest.mark.parametrize("scheme", ["keep=0.5", "256x128:4"])
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


@settings(deadline=None, max_examples=25)
@given(seed=st.integers(0, 10_000), r=st.sampled_from([2, 3, 4]), groups=st.integers(1, 6), width=st.integers(1, 5))
def test_an_order_is_a_permutation_that_is_never_worse_than_the_given_one(seed, r, groups, width):
    generator = torch.Generator().manual_seed(seed)
    ups = [torch.randn(r * groups, width, generator=generator, dtype=torch.float64) for _ in range(2)]
    shapes = [KronShape(groups, width, r, 1)] * 2
    order = permuted.best_order(ups, shapes)
    assert sorted(order.tolist()) == list(range(r * groups))

    def squares(o):
        return sum(error(w[o], s) ** 2 for w, s in zip(ups, shapes, strict=True))

    assert squares(order) <= squares(torch.arange(r * groups)) + 1e-12


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
