"""The paper's initialisations against their formulas, in float64."""

import pytest
import torch

from krony import KronyConfig, KronyError
from krony.init.base import Target
from krony.init.registry import find_initialisation
from krony.init.van_loan import lost_norm
from krony.kronecker.algebra import KronShape, dense, rearrange


def target(shape: KronShape, seed=0, weight=None) -> Target:
    generator = torch.Generator().manual_seed(seed)
    if weight is None:
        weight = torch.randn(shape.rows, shape.columns, generator=generator, dtype=torch.float64)
    return Target("transformer.h.0.mlp.c_fc", "up", weight, None, shape)


def start(name: str, one: Target, **options):
    return find_initialisation(name).initialise([one], KronyConfig("-", init=name, **options))[0]


@pytest.mark.parametrize("factors", [1, 2, 4])
def test_adaptive_normalisation_restores_the_norm(factors):
    one = target(KronShape(16, 12, 3, 3, factors))
    made = start("van-loan", one)
    approximation = made.scale * dense(made.left, made.right)
    torch.testing.assert_close(approximation.norm(), one.weight.norm(), rtol=1e-6, atol=0)
    assert made.scale == pytest.approx(float(one.weight.norm() / dense(made.left, made.right).norm()))


def test_without_normalisation_it_is_the_nearest():
    one = target(KronShape(16, 12, 3, 3, 2))
    made = start("van-loan", one, rescale=False)
    tail = torch.linalg.svdvals(rearrange(one.weight, one.shape))[2:]
    torch.testing.assert_close((one.weight - made.scale * dense(made.left, made.right)).norm(), tail.norm())


def test_a_zero_matrix_has_no_norm_to_restore():
    made = start("van-loan", target(KronShape(2, 2, 2, 2), weight=torch.zeros(4, 4)))
    assert made.scale == 1.0 and not dense(made.left, made.right).any()
    assert lost_norm(torch.ones(1), torch.zeros(1)) == 1.0


def test_pruning_drops_every_second_input_channel():
    """The published code: c_fc's ``fc[0::2]`` of GPT-2's (in, out) layout, with 0.1 for what was 0 there."""
    one = target(KronShape(12, 3, 1, 2))
    made = start("prune", one)
    assert torch.equal(made.left[0], one.weight[:, ::2])
    assert made.right.tolist() == [[[1.0, 0.1]]]


def test_pruning_drops_every_second_neuron():
    """The paper's figure: rows 1, 3, 5 are kept, [1, 0]ᵀ is the second factor."""
    one = target(KronShape(3, 5, 2, 1))
    made = start("prune", one, epsilon=0.0)
    assert torch.equal(made.left[0], one.weight[::2])
    assert made.right.tolist() == [[[1.0], [0.0]]]
    expected = one.weight.clone()
    expected[1::2] = 0
    assert torch.equal(dense(made.left, made.right), expected)


def test_pruning_with_more_factors_keeps_more_of_each_group():
    one = target(KronShape(3, 5, 4, 1, 3))
    made = start("prune", one, epsilon=0.0)
    kept = one.weight.clone()
    kept[3::4] = 0
    assert torch.equal(dense(made.left, made.right), kept)


def test_pruning_keeps_one_cell_of_a_block():
    one = target(KronShape(2, 2, 3, 3))
    assert torch.equal(start("prune", one).left[0], one.weight[::3, ::3])


def test_random_factors_have_the_spread_of_a_new_model():
    made = start("random", target(KronShape(256, 64, 4, 8, 3)))
    assert dense(made.left, made.right).std().item() == pytest.approx(0.02, rel=0.1)


def test_random_depends_on_the_seed_and_the_layer_alone():
    one = target(KronShape(4, 4, 2, 2))
    first = start("random", one, seed=1)
    torch.randn(3)  # the global generator plays no part
    assert torch.equal(first.left, start("random", one, seed=1).left)
    assert not torch.equal(first.left, start("random", one, seed=2).left)
    other = Target("transformer.h.1.mlp.c_fc", "up", one.weight, None, one.shape)
    assert not torch.equal(first.left, start("random", other, seed=1).left)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"init": "magic"}, "init 'magic' is unknown: it is one of neurons"),
        ({"allocation": "some"}, "allocation 'some' is unknown"),
        ({"reinit": "most"}, "reinit 'most' is unknown"),
        ({"scalars": False, "scalar_init": 4.0}, "drop one of the two"),
        ({"scalar_init": 0.0}, "another number"),
        ({"epsilon": float("nan")}, "finite number"),
    ],
)
def test_options_are_checked_where_they_are_set(options, words):
    with pytest.raises(KronyError, match=words):
        KronyConfig("keep=0.5", **options)
