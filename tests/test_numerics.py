"""Matrices and activations that are hard for numerics: the factors are finite and the errors bounded."""

import pytest
import torch

from krony import KronyConfig, compress
from krony.models.surgery import kronecker_layers
from small_models import gpt2, llama

INITS = ["van-loan", "prune", "magnitude", "neurons", "als", "svd", "flap", "wanda"]


def low_rank(weight):
    weight.copy_(torch.outer(weight[:, 0], weight[0]))


WEIGHTS = {
    "zero": lambda w: w.zero_(),
    "of rank one": low_rank,
    "constant": lambda w: w.fill_(0.5),
    "huge": lambda w: w.mul_(1e15),
    "tiny": lambda w: w.mul_(1e-18),
    "of subnormal numbers": lambda w: w.mul_(1e-41),
    "with one huge entry": lambda w: w[0].fill_(1e12),
    "with zero neurons": lambda w: w[: len(w) // 2].zero_(),
}


def text():
    return torch.randint(0, 256, (12, 32), generator=torch.Generator().manual_seed(3))


def compressed(model, init: str, scheme: str = "keep=0.5"):
    return compress(model, KronyConfig(scheme, init=init), calibration=text() if init in INITS[3:] else None)


def check(model, report, bound: float) -> None:
    for name, layer in kronecker_layers(model).items():
        assert all(torch.isfinite(p).all() for p in layer.parameters()), name
    for layer in report.layers:
        assert 0 <= layer.error <= bound, layer
        assert layer.calibrated_error is None or 0 <= layer.calibrated_error < float("inf")


@pytest.mark.parametrize("kind", list(WEIGHTS))
@pytest.mark.parametrize("init", INITS)
def test_odd_matrices(kind, init):
    """The down matrix of the middle layer is odd: later layers' activations, and so their moments, depend on it."""
    model = llama()
    with torch.no_grad():
        WEIGHTS[kind](model.model.layers[1].mlp.down_proj.weight)
    report = compressed(model, init)
    middle = [layer for layer in report.layers if "layers.1.mlp.down_proj" in layer.name]
    check(model, report, float("inf"))
    if init in ("van-loan", "svd") and kind != "with zero neurons":
        assert middle[0].error <= 1.5
    if kind == "zero":
        assert middle[0].error == 0
        assert not kronecker_layers(model)[middle[0].name].dense_weight().any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("init", INITS)
@pytest.mark.parametrize("family", [gpt2, llama])
def test_half_precision_loses_only_rounding(dtype, init, family):
    """The errors equal those of float32 up to the rounding of the dtype."""
    exact = compressed(family(), init)
    model = family().to(dtype)
    report = compressed(model, init)
    check(model, report, 3.0)
    slack = 20 * torch.finfo(dtype).eps
    for rounded, layer in zip(report.layers, exact.layers, strict=True):
        if init in ("van-loan", "prune"):
            assert rounded.error == pytest.approx(layer.error, abs=slack)
        assert rounded.calibrated_error is None or rounded.calibrated_error < layer.calibrated_error + 0.2


@pytest.mark.parametrize("init", ["neurons", "als", "svd", "flap", "wanda"])
def test_constant_activations(init):
    """Every hidden neuron has the same activation on every token: second moments of rank one, a covariance of zero."""
    for model in (gpt2(), llama()):
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name.endswith(("c_fc.weight", "up_proj.weight", "gate_proj.weight")):
                    parameter.zero_()
        check(model, compressed(model, init), float("inf"))


@pytest.mark.parametrize("init", ["neurons", "als", "svd", "flap", "wanda"])
def test_a_text_of_one_repeated_token(init):
    model = llama()
    report = compress(model, KronyConfig("keep=0.5", init=init), calibration=torch.full((4, 16), 7))
    check(model, report, float("inf"))
