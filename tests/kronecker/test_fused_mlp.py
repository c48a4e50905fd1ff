"""Fused MLPs against the dense matrices of the same layers."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F
from transformers.activations import ACT2FN

from krony.kronecker import fused_mlp
from krony.kronecker.algebra import KronShape
from krony.kronecker.fused_mlp import fused_forward
from krony.kronecker.linear import KroneckerLinear


def layers_of(up, *, gated=False, bias=True, scalars=False, dtype=torch.float64, seed=0):
    torch.manual_seed(seed)
    shapes = [up] * (1 + gated) + [up.transposed]
    layers = [KroneckerLinear(shape, bias=bias, scalars=scalars, dtype=dtype) for shape in shapes]
    for layer in layers:
        for parameter in layer.parameters():
            nn.init.normal_(parameter)
    return layers[:-1], layers[-1]


def reference(x, ups, act, down):
    hidden = [F.linear(x, up.dense_weight(), up.bias) for up in ups]
    h = act(hidden[0]) * (hidden[1] if len(hidden) > 1 else 1)
    return F.linear(h, down.dense_weight(), down.bias)


def check(ups, act, down, tokens=(2, 3), paths=((None, None),)):
    """Compares outputs without and with gradients, and all gradients, on each of these paths."""
    parameters = [p for layer in (*ups, down) for p in layer.parameters() if p.requires_grad]
    x = torch.randn(*tokens, ups[0].in_features, dtype=ups[0].weight.dtype, requires_grad=True)
    expected = reference(x, ups, act, down)
    cotangent = torch.randn_like(expected)
    wanted = torch.autograd.grad(expected, [x, *parameters], cotangent)
    for up_path, down_path in paths:
        for layer in ups:
            layer.path = up_path
        down.path = down_path
        for mode in (True, False):
            for layer in (*ups, down):
                layer.train(mode)
            with torch.no_grad():
                for _ in range(2):
                    torch.testing.assert_close(fused_forward(x, ups, act, down), expected)
            actual = fused_forward(x, ups, act, down)
            torch.testing.assert_close(actual, expected)
            torch.testing.assert_close(torch.autograd.grad(actual, [x, *parameters], cotangent), wanted)


EVERY = [(a, b) for a in ("left", "right", "dense", None) for b in ("left", "right", "dense", None)]


@pytest.mark.parametrize("act", ["gelu_new", "silu"])
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("shape", [KronShape(8, 6, 4, 1), KronShape(8, 6, 4, 1, 3), KronShape(8, 2, 3, 3, 2)], ids=str)
def test_every_path(shape, gated, act):
    ups, down = layers_of(shape, gated=gated, scalars=True)
    check(ups, ACT2FN[act], down, paths=EVERY)


@settings(max_examples=40, deadline=None)
@given(
    st.tuples(*[st.integers(1, 6)] * 4), st.integers(1, 4), st.booleans(), st.booleans(), st.booleans(),
    st.integers(0, 99),
)  # fmt: skip
def test_any_shape(sides, factors, gated, bias, scalars, seed):
    shape = KronShape(*sides, min(factors, KronShape(*sides).max_factors))
    ups, down = layers_of(shape, gated=gated, bias=bias, scalars=scalars, seed=seed)
    check(ups, ACT2FN["gelu_new"], down)


@pytest.mark.parametrize("small", [0, 2**16], ids=["many features", "few features"])
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("zeros", [0, 3])
@pytest.mark.parametrize("factors", [(1, 2), (2, 1), (3, 2)], ids=str)
def test_sides_with_different_numbers_of_factors(factors, zeros, gated, small, monkeypatch):
    """As a scheme per matrix asks for; also where only one neuron of a group is computed."""
    monkeypatch.setattr(fused_mlp, "SMALL", small)
    (ups, _), (_, down) = (layers_of(KronShape(8, 6, 4, 1, k), gated=gated) for k in factors)
    with torch.no_grad():
        down.right[:, :, :zeros] = 0
    for layer in (*ups, down):
        layer.right.requires_grad_(not zeros)
    check(ups, ACT2FN["gelu_new"], down)


# Right factors with zeros, r x k: dropped neurons, constant ones, scaled ones, and patterns that only look similar.
PATTERNS = {
    "one of four": ([[1], [0], [0], [0]], [[1], [0], [0], [0]]),
    "dropped by the way down only": ([[1], [0.5], [2], [1]], [[1], [0], [0], [0.5]]),
    "constant: only the way up is zero": ([[1], [0], [0], [1]], [[1], [0.5], [0], [1]]),
    "two selections": ([[1, 0], [0, 1], [0, 0]], [[1, 0], [0, 1], [0, 0]]),
    "two scaled selections": ([[3, 0], [0, 1], [0, 0]], [[1, 0], [0, -2], [0, 0]]),
    "exchanged": ([[0, 1], [1, 0], [0, 0]], [[1, 0], [0, 1], [0, 0]]),
    "all of them": ([[1, 0], [0, 1]], [[1, 0], [0, 1]]),
    "nothing comes back": ([[1], [1]], [[0], [0]]),
    "epsilon": ([[1], [0.1]], [[1], [0.1]]),
}


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("pattern", list(PATTERNS))
@pytest.mark.parametrize("scalars", [None, "ones", "others"])
def test_zeros_cost_nothing_and_change_nothing(pattern, gated, frozen, scalars):
    b, c = (torch.tensor(m, dtype=torch.float64) for m in PATTERNS[pattern])
    ups, down = layers_of(KronShape(5, 6, len(b), 1, b.shape[1]), gated=gated, scalars=scalars is not None)
    for layer in (*ups, down):
        layer.right.requires_grad_(not frozen)
        with torch.no_grad():
            layer.right.copy_((c if layer is down else b).T.reshape(layer.right.shape))
            if scalars == "ones":
                layer.scalars.fill_(1)
    check(ups, ACT2FN["gelu_new"], down, paths=[("left", "right")])


class Counting(nn.Module):
    """An activation that counts its inputs."""

    def __init__(self):
        super().__init__()
        self.seen = 0

    def forward(self, x):
        self.seen += x.numel()
        return F.silu(x)


def test_dropped_neurons_are_not_computed():
    ups, down = layers_of(KronShape(5, 6, 4, 1, 2))
    with torch.no_grad():
        for layer in (*ups, down):
            layer.right.zero_()
            layer.right.view(2, 4)[:, :2] = torch.eye(2)
            layer.eval()
            layer.path = "right" if layer is down else "left"
        act, x = Counting(), torch.randn(7, 6, dtype=torch.float64)
        fused_forward(x, ups, act, down)
        assert act.seen == 7 * 5 * 2  # two neurons of each group of four
        down.right.view(2, 4)[1, 3] = 1  # the fourth neuron depends on the input again
        ups[0].right.view(2, 4)[1, 3] = 1
        torch.testing.assert_close(fused_forward(x, ups, act, down), reference(x, ups, F.silu, down))
    act = Counting()
    for layer in (*ups, down):
        layer.train()
        layer.right.requires_grad_(False)
    fused_forward(x, ups, act, down).sum().backward()
    assert act.seen == 7 * 5 * 3 and ups[0].weight.grad is not None  # while training, if they are frozen


@pytest.mark.parametrize(
    "shape", [KronShape(32, 24, 4, 1), KronShape(32, 8, 3, 3, 2), KronShape(32, 24, 4, 1, 3)], ids=str
)
@pytest.mark.parametrize("training", [False, True])
def test_autocast_and_lower_precision(shape, training):
    ups, down = layers_of(shape, dtype=torch.float32)
    for layer in (*ups, down):
        layer.train(training)
    x, act = torch.randn(400, shape.columns), ACT2FN["gelu_new"]
    expected = reference(x, ups, act, down)
    with torch.set_grad_enabled(training):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = fused_forward(x, ups, act, down)
        assert (y.float() - expected).norm() / expected.norm() < 0.03
        if training:
            y.float().sum().backward()
            assert all(p.grad is not None and p.grad.isfinite().all() for p in down.parameters())
        for layer in (*ups, down):
            layer.bfloat16()
        y = fused_forward(x.bfloat16(), ups, act, down)
        assert y.dtype == torch.bfloat16 and (y.float() - expected).norm() / expected.norm() < 0.03


def test_every_call_reads_the_factors():
    ups, down = layers_of(KronShape(5, 6, 4, 1))
    x, act = torch.randn(3, 6, dtype=torch.float64), ACT2FN["silu"]
    for layer in (*ups, down):
        layer.eval()
    with torch.no_grad():
        fused_forward(x, ups, act, down)
        for layer, name in ((ups[0], "right"), (ups[0], "bias"), (down, "right"), (down, "weight"), (down, "bias")):
            getattr(layer, name).data.mul_(2)
            torch.testing.assert_close(fused_forward(x, ups, act, down), reference(x, ups, act, down))
        other = copy.deepcopy(down)
        ups[0].load_state_dict(layers_of(KronShape(5, 6, 4, 1), seed=1)[0][0].state_dict())
        torch.testing.assert_close(fused_forward(x, ups, act, down), reference(x, ups, act, down))
        torch.testing.assert_close(fused_forward(x, ups, act, other), reference(x, ups, act, other))
