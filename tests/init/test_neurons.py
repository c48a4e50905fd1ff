"""Neuron selection against least squares from scratch, and on models whose best answer is known."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from krony import KronyConfig, KronyError, compress
from krony.errors import KronyWarning
from krony.init import neurons
from krony.init.base import Moments, SecondMoment, Target, regularised
from krony.init.registry import find_initialisation
from krony.init.whole_neurons import Selection, hidden_order
from krony.kronecker.algebra import KronShape
from krony.models.surgery import find_groups, kronecker_layers, take_out
from small_models import BUILDERS, gpt2, llama


def activations(tokens: int, width: int, seed: int = 0) -> torch.Tensor:
    """Correlated ones of very different sizes, as real neurons have: ``(tokens, width)``, float64."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, width, generator=generator, dtype=torch.float64)
    mix = torch.randn(width, width, generator=generator, dtype=torch.float64) / width**0.5
    return (x + x @ mix) * torch.logspace(-2, 1, width, dtype=torch.float64)


def problem(seed: int, out: int, width: int, tokens: int = 400):
    x = activations(tokens, width, seed)
    weight = torch.randn(out, width, generator=torch.Generator().manual_seed(seed + 1), dtype=torch.float64)
    return x, weight, x.T @ x


def select(weight: torch.Tensor, bias: torch.Tensor | None, moments: Moments, keep: int) -> Selection:
    """What the initialisation makes of a down matrix."""
    kept = neurons.rank(weight, bias, moments, weight.shape[1] - keep).kept(weight.shape[1], keep)
    return neurons.refitted(weight, bias, moments, kept)


def refit_from_scratch(x: torch.Tensor, weight: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
    return torch.linalg.lstsq(x[:, kept], x @ weight.T).solution.T


@given(st.integers(0, 999), st.integers(1, 9), st.integers(6, 40), st.integers(1, 8), st.data())
@settings(max_examples=60, deadline=None)
def test_block_updates_are_least_squares_from_scratch(seed, out, width, block, data):
    x, weight, c = problem(seed, out, width)
    count = data.draw(st.integers(1, width - 1))
    dropped, costs = neurons.drop(weight, c, count, block)
    kept = torch.tensor([j for j in range(width) if j not in set(dropped.tolist())])
    expected = refit_from_scratch(x, weight, kept)
    torch.testing.assert_close(neurons.refit(weight, c, kept), expected, rtol=1e-6, atol=1e-6)
    lost = (x @ weight.T - x[:, kept] @ expected.T).square().sum()
    torch.testing.assert_close(costs[-1], lost, rtol=1e-6, atol=1e-6 * float(x.square().sum()))
    assert (costs.diff() >= -1e-9 * costs[-1]).all() and len(set(dropped.tolist())) == count


def test_one_at_a_time_each_drop_is_the_cheapest_there_is():
    x, weight, c = problem(3, 5, 12)
    dropped, _ = neurons.drop(weight, c, 6, block=1)
    left = list(range(12))
    for chosen in dropped.tolist():
        costs = {}
        for j in left:
            kept = torch.tensor([i for i in left if i != j])
            costs[j] = (x @ weight.T - x[:, kept] @ refit_from_scratch(x, weight, kept).T).square().sum()
        assert chosen == min(costs, key=costs.get)
        left.remove(chosen)


def test_a_neuron_that_repeats_others_goes_first_and_costs_nothing():
    x, weight, _ = problem(0, 4, 10)
    x[:, 7] = x[:, 2] - 3 * x[:, 5]
    c = regularised(x.T @ x, 1e-12)
    dropped, costs = neurons.drop(weight, c, 1)
    assert dropped.tolist()[0] in (2, 5, 7)
    assert costs[0] < 1e-6 * (x @ weight.T).square().sum()


def test_selection_of_a_whole_layer_uses_the_bias_for_the_mean():
    x = activations(500, 8) + 5.0
    weight = torch.randn(3, 8, dtype=torch.float64)
    second = SecondMoment(x.T @ x / 500, x.mean(0))
    moments = Moments(second, second, 500)
    with_bias = select(weight, torch.zeros(3), moments, 4)
    without = select(weight, None, moments, 4)
    assert without.bias is None and with_bias.bias is not None
    target = x @ weight.T
    made = x[:, with_bias.kept] @ with_bias.down.T + with_bias.bias
    torch.testing.assert_close(made.mean(0), target.mean(0), rtol=1e-4, atol=1e-4)
    plain = x[:, without.kept] @ without.down.T
    assert (target - made).square().sum() < (target - plain).square().sum()


def test_sensitivity_decides_what_goes_and_prices_it():
    """Rows that the loss does not feel don't count, and the cost is tr(G (W − Ŵ) C (W − Ŵ)ᵀ)."""
    x, weight, c = problem(5, 6, 16)
    root = torch.randn(6, 2, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    sensitivity = root @ root.T
    second = SecondMoment(c, x.mean(0))
    moments = Moments(second, second, 400, sensitivity)
    curve = neurons.rank(weight, None, moments, 8).costs
    chosen = select(weight, None, moments, 8)
    lost = weight.clone()
    lost[:, chosen.kept] -= chosen.down
    expected = torch.trace(sensitivity @ lost @ c @ lost.T)
    torch.testing.assert_close(curve[8], expected, rtol=2e-2, atol=0)
    blind = select(weight, None, Moments(second, second, 400), 8)
    assert blind.kept.tolist() != chosen.kept.tolist()


@pytest.fixture
def ids() -> torch.Tensor:
    return torch.randint(0, 256, (12, 32), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("scheme", ["keep=0.5", "keep=0.25", "keep=0.75", "keep=0.3333"])
def test_neurons_that_do_nothing_are_the_ones_that_go(model, ids, scheme):
    keep = {"keep=0.5": 2, "keep=0.25": 4, "keep=0.75": 4 / 3, "keep=0.3333": 3}[scheme]
    hidden = find_groups(model)[0].sites[0].out_features
    with torch.no_grad():
        for group in find_groups(model):
            down, _ = take_out(model, group.sites[-1].name)
            down[:, torch.randperm(hidden, generator=torch.Generator().manual_seed(0))[round(hidden / keep) :]] = 0
    expected = model(ids).logits
    compress(model, KronyConfig(scheme), calibration=ids)
    torch.testing.assert_close(model(ids).logits, expected, rtol=1e-5, atol=1e-5)


def test_permuting_the_hidden_neurons_alone_changes_no_logits(model, ids):
    expected = model(ids).logits
    shape = KronShape(*{192: (64, 48), 144: (48, 48)}[find_groups(model)[0].sites[0].out_features], 3, 1, 2)
    for group in find_groups(model):
        kept = torch.randperm(shape.rows, generator=torch.Generator().manual_seed(2))[: 2 * shape.m1].sort().values
        order = hidden_order(kept, shape)
        assert order.sort().values.tolist() == list(range(shape.rows))
        with torch.no_grad():
            for site in group.sites:
                weight, bias = take_out(model, site.name)
                weight.copy_(weight[:, order].clone() if site.role == "down" else weight[order].clone())
                if bias is not None and site.role != "down":
                    bias.copy_(bias[order].clone())
    torch.testing.assert_close(model(ids).logits, expected, rtol=1e-5, atol=1e-5)


def test_kept_neurons_stay_exact(model, ids):
    name = find_groups(model)[1].sites[0].name
    weight, bias = (None if t is None else t.clone() for t in take_out(model, name))
    compress(model, KronyConfig("keep=0.5"), calibration=ids)
    layer = kronecker_layers(model)[name]
    made = layer.dense_weight()
    alive = made.any(dim=1)
    assert alive.sum() == weight.shape[0] // 2
    rows = {tuple(row): i for i, row in enumerate(weight.tolist())}
    for j in alive.nonzero().flatten().tolist():
        original = rows[tuple(made[j].tolist())]  # KeyError unless the row is bit for bit there
        assert bias is None or layer.bias[j] == bias[original]


def test_epsilon_stands_in_for_the_dropped_neurons(model, ids):
    compress(model, KronyConfig("keep=0.25", epsilon=0.125), calibration=ids)
    for layer in kronecker_layers(model).values():
        assert layer.right.flatten().tolist() == [1.0, 0.125, 0.125, 0.125]


def test_the_same_twice(ids):
    first, second = llama(), llama()
    for model in (first, second):
        compress(model, KronyConfig("keep=0.5"), calibration=ids)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


@pytest.mark.parametrize("family", BUILDERS)
def test_text_that_says_little_never_crashes(family, recwarn):
    for ids in (torch.zeros(1, 8, dtype=torch.long), torch.full((40, 16), 7), torch.arange(2)[None]):
        model = BUILDERS[family]()
        compress(model, KronyConfig("keep=0.5"), calibration=ids)
        assert torch.isfinite(model(ids).logits).all()


def test_few_tokens_are_warned_of(ids):
    with pytest.warns(KronyWarning, match="24 tokens for 192 neurons: the selection will be rough"):
        compress(gpt2(), KronyConfig("keep=0.5"), calibration=ids[:1, :24])


def test_a_layer_that_is_always_silent(ids):
    model = gpt2()
    with torch.no_grad():
        model.transformer.h[1].mlp.c_fc.weight.zero_()
        model.transformer.h[1].mlp.c_fc.bias.zero_()
    expected = model(ids).logits[0, 0]
    compress(model, KronyConfig("keep=0.5", layers="1"), calibration=ids)
    torch.testing.assert_close(model(ids).logits[0, 0], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"scheme": "96x24"}, "keeps complete neurons, and a left factor of 96x24 splits them"),
        ({"scheme": "96x24", "allocation": "global"}, "keeps complete neurons, and a left factor of 96x24 splits them"),
        ({"scheme": "keep=0.5", "modules": "c_fc"}, "needs complete MLPs"),
        ({"scheme": "keep=0.5", "calibration": None}, "needs calibration text"),
        ({"scheme": "keep=0.5", "calibration": ["some text"]}, "tokenizer= is needed"),
        ({"scheme": "keep=0.5", "calibration": torch.zeros(3)}, r"takes token ids of shape \(sequences, length\)"),
        ({"scheme": "keep=0.5", "calibration": torch.full((2, 8), 300)}, "token 300, the model knows 257"),
    ],
)
def test_mistakes(ids, options, words):
    options = {"calibration": ids} | options
    calibration = options.pop("calibration")
    model = gpt2()
    with pytest.raises(KronyError, match=words):
        compress(model, KronyConfig(**options), calibration=calibration)
    assert not kronecker_layers(model)


def test_activations_that_are_not_finite(ids):
    model = gpt2()
    with torch.no_grad():
        model.transformer.wte.weight[int(ids[0, 0])] = float("inf")
    with pytest.raises(KronyError, match="activations are not finite"):
        compress(model, KronyConfig("keep=0.5"), calibration=ids)


def test_the_init_alone_needs_moments():
    shape = KronShape(4, 3, 2, 1, 1)
    target = Target("fc", "up", torch.ones(8, 3), None, shape)
    down = Target("proj", "down", torch.ones(3, 8), None, shape.transposed)
    for init in ("neurons", "als", "svd"):
        with pytest.raises(KronyError, match="needs calibration text"):
            find_initialisation(init).initialise([target, down], KronyConfig("4x3", init=init))
    second = SecondMoment(torch.eye(3, dtype=torch.float64), torch.zeros(3, dtype=torch.float64))
    with pytest.raises(KronyError, match="needs calibration text"):
        find_initialisation("neurons").initialise([target, down], KronyConfig("4x3"), Moments(second, None, 9))
