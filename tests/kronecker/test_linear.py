"""Every forward path and its gradients against the dense layer."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from krony.kronecker.algebra import KronShape
from krony.kronecker.linear import KroneckerLinear

PATHS = ("left", "right", "dense")
SHAPES = [
    KronShape(8, 6, 4, 1),
    KronShape(6, 8, 1, 4, 3),
    KronShape(8, 6, 3, 3, 2),
    KronShape(4, 4, 2, 5, 4),
    KronShape(1, 1, 6, 4),
    KronShape(6, 4, 1, 1),
]


def layer_of(shape: KronShape, *, bias=True, scalars=True, seed=0) -> KroneckerLinear:
    torch.manual_seed(seed)
    layer = KroneckerLinear(shape, bias=bias, scalars=scalars, dtype=torch.float64)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter)
    return layer


def check_against_dense(layer: KroneckerLinear, x: torch.Tensor) -> None:
    """Output and all gradients equal those of ``F.linear`` with numpy-style kron products summed up."""
    scalars = torch.ones(layer.shape.factors) if layer.scalars is None else layer.scalars
    factors = zip(scalars, layer.weight, layer.right, strict=True)
    expected = F.linear(x, sum(s * torch.kron(a, b) for s, a, b in factors), layer.bias)
    cotangent = torch.randn_like(expected)
    wanted = torch.autograd.grad(expected, [x, *layer.parameters()], cotangent)
    for path in PATHS:
        layer.path = path
        actual = layer(x)
        torch.testing.assert_close(actual, expected)
        torch.testing.assert_close(torch.autograd.grad(actual, [x, *layer.parameters()], cotangent), wanted)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("batch", [(5,), (2, 3), ()])
def test_forward_and_gradients(shape, batch):
    x = torch.randn(*batch, shape.columns, dtype=torch.float64, requires_grad=True)
    check_against_dense(layer_of(shape), x)


@settings(max_examples=40, deadline=None)
@given(st.tuples(*[st.integers(1, 6)] * 4), st.integers(1, 4), st.booleans(), st.booleans(), st.integers(0, 99))
def test_forward_and_gradients_of_any_shape(sides, factors, bias, scalars, seed):
    shape = KronShape(*sides, min(factors, KronShape(*sides).max_factors))
    layer = layer_of(shape, bias=bias, scalars=scalars, seed=seed)
    check_against_dense(layer, torch.randn(3, shape.columns, dtype=torch.float64, requires_grad=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lower_precision_stays_close(dtype):
    layer = layer_of(KronShape(32, 24, 3, 2, 2))
    x = torch.randn(7, 48, dtype=torch.float64)
    expected = layer(x)
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 5e-2}[dtype]
    for path in PATHS:
        low = layer_of(KronShape(32, 24, 3, 2, 2)).to(dtype)
        low.path = path
        error = (low(x.to(dtype)).double() - expected).norm() / expected.norm()
        assert error < tolerance


def test_the_left_factor_is_not_a_matrix():
    layer = KroneckerLinear(KronShape(3, 2, 1, 1))
    assert layer.weight.ndim == 3  # a dense checkpoint's or model's weight never fits


@pytest.mark.parametrize(
    ("shape", "path"), [(SHAPES[1], "right"), (SHAPES[1].transposed, "left"), (SHAPES[2], "dense")]
)
def test_every_call_reads_the_factors(shape, path):
    layer = layer_of(shape).eval()
    layer.path = path
    x = torch.randn(3, shape.columns, dtype=torch.float64)

    def check():
        expected = F.linear(x, layer.dense_weight(), layer.bias)
        for _ in range(2):
            torch.testing.assert_close(layer(x), expected)

    with torch.no_grad():
        check()
        layer.weight.mul_(2)
        check()
        layer.weight.data.mul_(2)
        check()
        layer.load_state_dict(layer_of(shape, seed=1).state_dict())
        check()
        copied = copy.deepcopy(layer)
        copied.right.mul_(3)
        torch.testing.assert_close(copied(x), F.linear(x, copied.dense_weight(), copied.bias))
        check()
        layer.float()
        x = x.float()
        check()
