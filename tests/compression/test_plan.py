"""What is foretold of a model's size is what compress makes of it."""

import pytest
import torch

from krony import KronyConfig, KronyError, compress
from krony.compression.plan import check_global, parameters_after, portion, within
from krony.models.source import empty_model
from krony.models.surgery import count_parameters, find_groups
from small_models import BUILDERS, gpt2

CONFIGS = (
    {"scheme": "keep=0.5", "init": "van-loan"},
    {"scheme": "48x48:2", "init": "van-loan", "scalars": False},
    {"scheme": "keep=0.75", "init": "prune", "scalar_init": 4.0, "embedding": 2},
    {"scheme": "keep=0.5", "init": "svd"},
    {"scheme": "keep=0.25", "init": "random", "layers": "odd"},
)


@pytest.fixture
def ids() -> torch.Tensor:
    return torch.randint(0, 256, (12, 32), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("config", CONFIGS, ids=str)
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", list(BUILDERS))
def test_it_is_what_compress_makes(family, tied, config, ids):
    model = BUILDERS[family](tie_word_embeddings=tied)
    empty = empty_model(model.config)
    foretold = parameters_after(empty, find_groups(empty, layers=config.get("layers", "all")), KronyConfig(**config))
    compress(model, KronyConfig(**config), calibration=ids)
    assert foretold == count_parameters(model)


@pytest.mark.parametrize("options", [{}, {"scalars": False}, {"max_width": 100}, {"multiple_of": 48}])
def test_global_allocation_is_within_what_is_foretold(model, ids, options):
    """Exactly so where every layer loses a portion; a layer that stays whole has no factors."""
    config = KronyConfig("keep=0.5", allocation="global", **options)
    foretold = parameters_after(model, find_groups(model), config)
    report = compress(model, config, calibration=ids)
    assert report.params_after <= foretold < 1.03 * report.params_after


@pytest.mark.parametrize("budget", [70_000, 80_000, 90_000])
def test_the_scheme_for_a_size_is_the_largest_within_it(budget):
    config = within(gpt2(), KronyConfig("", init="prune"), budget)
    sizes = [
        parameters_after(gpt2(), find_groups(gpt2()), KronyConfig(s, init="prune")) for s in ("keep=0.25", "keep=0.5")
    ]
    made = parameters_after(gpt2(), find_groups(gpt2()), config)
    assert made <= budget and all(made >= size for size in sizes if size <= budget)


def test_a_size_of_matrices_that_differ():
    """Left factors that divide one matrix and not another are no candidates, and no reason to stop."""
    options = {"modules": "mlp|attn", "init": "van-loan"}
    budget = count_parameters(gpt2()) - 20_000
    config = within(gpt2(), KronyConfig("", **options), budget)
    model = gpt2()
    compress(model, config)
    assert parameters_after(gpt2(), find_groups(gpt2(), "mlp|attn"), config) == count_parameters(model) <= budget


def test_portions():
    assert (portion(192, None), portion(3072, None), portion(1536, 64)) == (8, 128, 64)
    with pytest.raises(KronyError, match="multiple_of 7 does not divide the hidden width 192"):
        portion(192, 7)


def test_a_width_that_does_not_divide():
    model = gpt2(n_inner=193)
    config = KronyConfig("keep=0.5", allocation="global")
    words = (
        "hidden width 193 divides into portions of 1 only, more than a layer can have factors: use allocation uniform"
    )
    with pytest.raises(KronyError, match=words):
        check_global(find_groups(model), config)
