"""inspect_model reports the errors that compress reported; its picture stays readable for deep models."""

import pytest
import torch

from krony import KronyConfig, KronyError, compress
from krony.evaluation.inspection import inspect_model
from krony.evaluation.inspection_tables import by_layer, explanations, picture, table
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
    errors = {view.name: view.error for view in inspect_model(model, base)}
    near = 0.03 if "epsilon" in options else 1e-5
    for layer in report.layers:
        assert errors[layer.name] == pytest.approx(layer.error, rel=near)


@pytest.mark.parametrize("init", ["van-loan", "prune", "svd", "als"])
def test_where_none_was_moved_none_is(init, ids):
    base, model = gpt2(), gpt2()
    report = compress(model, KronyConfig("keep=0.5", init=init), calibration=ids)
    for view, layer in zip(inspect_model(model, base), report.layers, strict=True):
        assert view.name == layer.name and view.error == pytest.approx(layer.error, rel=1e-5)


@pytest.mark.parametrize("first", [0, 1])
@pytest.mark.parametrize("by", ["layers", "scheme"])
def test_layers_that_were_compressed_by_two_methods(first, by, ids):
    """The neurons of one layer were moved, those of the other were not, whichever came first."""
    base, model, errors = gpt2(), gpt2(), {}
    chosen = [{"init": "magnitude", "layers": "0"}, {"init": "van-loan", "layers": "1", "rescale": False}]
    if by == "scheme":
        chosen[0] = {"init": "magnitude", "scheme": {"transformer.h.0.mlp": "keep=0.5"}}
    for options in (chosen[first], chosen[1 - first]):
        report = compress(model, KronyConfig(**({"scheme": "keep=0.5"} | options)))
        errors |= {layer.name: layer.error for layer in report.layers}
    found = {view.name: view.error for view in inspect_model(model, base)}
    for name, error in errors.items():
        assert found[name] == pytest.approx(error, rel=1e-5), name


def test_permuted_neurons_are_put_back_as_well_as_can_be():
    """Places are found by the whole MLP's distance, which is then no larger than compress's."""
    base, model = gpt2(), gpt2()
    report = compress(model, KronyConfig("keep=0.5", init="permuted", rescale=False))
    ours = sum(view.error**2 for view in inspect_model(model, base))
    assert 0.8 < ours / sum(layer.error**2 for layer in report.layers) <= 1 + 1e-6


def test_a_compressed_base():
    base, model = gpt2(), gpt2()
    for made in (base, model):
        compress(made, KronyConfig("keep=0.5", init="van-loan"))
    with pytest.raises(KronyError, match="the base is a compressed model itself"):
        inspect_model(model, base)


def test_the_picture_has_one_curve_per_kind_of_matrix():
    base, model = gpt2(n_layer=30), gpt2(n_layer=30)
    compress(model, KronyConfig("keep=0.5", init="van-loan", layers="1-29"))
    views = inspect_model(model, base)
    curves = by_layer([(view.name, view.error) for view in views])
    assert list(curves) == ["mlp.c_fc", "mlp.c_proj"]
    assert [layer for layer, _ in curves["mlp.c_fc"]] == list(range(1, 30))
    svg = picture(views)
    worst = max(views, key=lambda view: view.error)
    assert f"largest {worst.error:.3f}" in svg and worst.name in svg and "less is better" in svg
    assert svg.count("transformer.h.") == 2  # in the title, which the picture also has for screen readers
    assert "Frobenius norm of every matrix" in picture(inspect_model(base))


def test_names_without_a_number_have_a_curve_of_their_own():
    assert by_layer([("transformer.wte", 1.0), ("h.2.a.b", 2.0), ("h.0.a.b", 3.0)]) == {
        "transformer.wte": [(0.0, 1.0)],
        "a.b": [(0.0, 3.0), (2.0, 2.0)],
    }


def test_the_table_and_the_reasons():
    base, model = gpt2(), gpt2()
    compress(model, KronyConfig("keep=0.5", init="van-loan"))
    views = inspect_model(model, base)
    shown = table(views)
    assert shown.columns[-2:] == ["of base", "error"] and shown.rows[0][-1] == f"{views[0].error:.3f}"
    assert table(inspect_model(base)).columns[-1] == "path"
    assert views[0].why in explanations(views)[0] and explanations(views)[-1].startswith("fused: ")
