"""What inspect says of a compressed model and its base is what compress said."""

import pytest
import torch

from krony import KronyConfig, KronyError, compress
from krony.evaluation.inspection import inspect
from small_models import BUILDERS, gpt2


@pytest.fixture
def ids() -> torch.Tensor:
    return torch.randint(0, 256, (12, 32), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("options", [{}, {"allocation": "global"}, {"layers": "odd"}, {"epsilon": 0.05}], ids=str)
@pytest.mark.parametrize("family", list(BUILDERS))
def test_neurons_that_were_moved_are_put_back(family, options, ids):
    """With epsilon any place of a dropped neuron is as good as another, but for little."""
    base, model = BUILDERS[family](), BUILDERS[family]()
    report = compress(model, KronyConfig("keep=0.5", **options), calibration=ids)
    errors = {view.name: view.error for view in inspect(model, base)}
    near = 0.03 if "epsilon" in options else 1e-5
    for layer in report.layers:
        assert errors[layer.name] == pytest.approx(layer.error, rel=near)


@pytest.mark.parametrize("init", ["van-loan", "prune", "svd", "als"])
def test_where_none_was_moved_none_is(init, ids):
    base, model = gpt2(), gpt2()
    report = compress(model, KronyConfig("keep=0.5", init=init), calibration=ids)
    for view, layer in zip(inspect(model, base), report.layers, strict=True):
        assert view.name == layer.name and view.error == pytest.approx(layer.error, rel=1e-5)


def test_permuted_neurons_are_put_back_as_well_as_can_be():
    """Places are found by the whole MLP's distance, which is then no larger than compress's."""
    base, model = gpt2(), gpt2()
    report = compress(model, KronyConfig("keep=0.5", init="permuted", rescale=False))
    ours = sum(view.error**2 for view in inspect(model, base))
    assert 0.8 < ours / sum(layer.error**2 for layer in report.layers) <= 1 + 1e-6


def test_a_compressed_base():
    base, model = gpt2(), gpt2()
    for made in (base, model):
        compress(made, KronyConfig("keep=0.5", init="van-loan"))
    with pytest.raises(KronyError, match="the base is a compressed model itself"):
        inspect(model, base)
