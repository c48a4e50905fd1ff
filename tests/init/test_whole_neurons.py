"""The initialisations that choose complete neurons and leave them as they are, against the papers' formulas."""

import pytest
import torch

import krony
from krony import KronyConfig, KronyError, compress
from krony.compression.allocation import allocate_widths
from krony.init import flap, magnitude, random_neurons, wanda
from krony.init.base import Moments, SecondMoment, Target
from krony.init.registry import find_initialisation
from krony.init.whole_neurons import highest
from krony.kronecker.algebra import KronShape
from krony.models.surgery import find_groups, kronecker_layers, original, take_out
from small_models import BUILDERS, gpt2

NAMES = ["flap", "wanda", "magnitude", "random-neurons"]
CALIBRATED = ["flap", "wanda"]
WORDS = {name: f"init {name} " for name in NAMES}


@pytest.fixture
def ids() -> torch.Tensor:
    return torch.randint(0, 256, (12, 32), generator=torch.Generator().manual_seed(1))


def hidden_activations(model, ids) -> dict[str, torch.Tensor]:
    """What enters every down matrix, ``(tokens, hidden)``, float64, by the name of the layer."""
    seen = {}
    hooks = [
        model.get_submodule(group.sites[-1].name).register_forward_pre_hook(
            lambda _, args, name=group.sites[-1].name: seen.__setitem__(name, args[0].flatten(0, -2).double())
        )
        for group in find_groups(model)
    ]
    with torch.no_grad():
        model(ids)
    for hook in hooks:
        hook.remove()
    return seen


def reference_scores(init: str, model, group, x: torch.Tensor) -> torch.Tensor:
    """Each paper's formula, neuron after neuron, from the activations ``x: (tokens, hidden)`` themselves."""
    matrices = {site.name: take_out(model, site.name)[0].double() for site in group.sites}
    *ups, down = matrices.values()
    scores = []
    for j in range(down.shape[1]):
        if init == "flap":
            scores.append(((x[:, j] - x[:, j].mean()) ** 2).mean() * (down[:, j] ** 2).sum())
        elif init == "wanda":
            scores.append(sum(abs(w) * x[:, j].norm() for w in down[:, j]))
        else:
            scores.append((down[:, j] ** 2).sum() + sum((up[j] ** 2).sum() for up in ups))
    return torch.stack(scores)


@pytest.mark.parametrize("scheme, share", [("keep=0.5", 1 / 2), ("keep=0.25", 1 / 4), ("keep=0.75", 3 / 4)])
@pytest.mark.parametrize("init", ["flap", "wanda", "magnitude"])
def test_what_stays_has_the_papers_highest_scores(model, ids, init, scheme, share):
    """The compressed model is the original with the other neurons' columns set to zero, and FLAP's bias."""
    seen = hidden_activations(model, ids)
    expected = BUILDERS["gpt2" if hasattr(model, "transformer") else "llama"]()
    expected.load_state_dict(model.state_dict())
    with torch.no_grad():
        for group in find_groups(expected):
            name = group.sites[-1].name
            weight, bias = take_out(expected, name)
            scores = reference_scores(init, model, group, seen[name])
            dropped = scores.argsort()[: round((1 - share) * len(scores))]
            if init == "flap" and bias is not None:
                bias += sum(weight[:, j] * seen[name][:, j].mean().float() for j in dropped.tolist())
            weight[:, dropped] = 0
    config = KronyConfig(scheme, init=init, token_weighting=False)
    compress(model, config, calibration=ids if init in CALIBRATED else None)
    for name, layer in kronecker_layers(model).items():
        assert set(layer.right.flatten().tolist()) == {0.0, 1.0}, name
    torch.testing.assert_close(model(ids).logits, expected(ids).logits, rtol=1e-4, atol=1e-5)


def test_flap_restores_the_mean_of_the_outputs_where_there_is_a_bias(ids):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(300, 8, generator=generator, dtype=torch.float64) + torch.arange(8)
    weight, bias = torch.randn(3, 8, generator=generator, dtype=torch.float64), torch.ones(3, dtype=torch.float64)
    hidden = SecondMoment(x.T @ x / 300, x.mean(0))
    moments = Moments(hidden, hidden, 300)
    kept = flap.rank(weight, bias, moments, 4).kept(8, 4)
    assert kept.tolist() == flap.scores(weight, hidden).topk(4).indices.sort().values.tolist()
    chosen = flap.with_mean(weight, bias, moments, kept)
    torch.testing.assert_close(chosen.down @ x[:, chosen.kept].mean(0) + chosen.bias, weight @ x.mean(0) + bias)
    assert torch.equal(chosen.down, weight[:, chosen.kept])
    assert flap.with_mean(weight, None, moments, kept).bias is None
    torch.testing.assert_close(flap.scores(weight, hidden), x.var(0, unbiased=False) * weight.square().sum(0))


def test_a_constant_neuron_costs_flap_nothing_and_wanda_much():
    x = torch.stack([torch.full((50,), 9.0), torch.linspace(-1, 1, 50), torch.linspace(1, -2, 50)], 1).double()
    moments, weight = SecondMoment(x.T @ x / 50, x.mean(0)), torch.ones(2, 3)
    assert flap.scores(weight, moments).argmin() == 0 and flap.scores(weight, moments)[0] < 1e-9
    assert wanda.scores(weight, moments).argmax() == 0


def test_flaps_allocation_is_one_threshold_of_standard_scores():
    """The neurons that portions of one drop are those below one threshold, over all layers."""
    generator = torch.Generator().manual_seed(4)
    layers = [(torch.randn(6, 40, generator=generator) * s, torch.rand(40, generator=generator)) for s in (1, 9, 0.1)]
    moments = [
        Moments(SecondMoment(torch.eye(1), torch.zeros(1)), SecondMoment(torch.diag(v), torch.zeros(40)), 9)
        for _, v in layers
    ]
    curves = [flap.rank(w, None, m, 39).costs for (w, _), m in zip(layers, moments, strict=True)]
    assert all(curve[0] == 0 and curve[1] < 0 and len(curve) == 40 for curve in curves)
    assert all((curve.diff().diff() >= -1e-12).all() for curve in curves)
    kept = allocate_widths(curves, unit=1, budget=60)
    scores = torch.stack([v.double() * w.double().square().sum(0) for w, v in layers])  # (layers, neurons)
    standard = (scores - scores.mean(1, keepdim=True)) / scores.std(1, keepdim=True)
    threshold = standard.flatten().sort().values[-60]
    assert kept == (standard >= threshold).sum(1).tolist() and sum(kept) == 60
    assert len(set(kept)) > 1


def test_flap_with_layers_in_which_all_neurons_score_the_same():
    second = SecondMoment(torch.eye(8, dtype=torch.float64), torch.zeros(8, dtype=torch.float64))
    moments = Moments(second, second, 9)
    ranking = flap.rank(torch.ones(2, 8), None, moments, 7)
    curve = ranking.costs
    assert not curve.any() and ranking.kept(8, 3).tolist() == [0, 1, 2]  # of equal ones the first stay
    assert sum(allocate_widths([curve, curve], unit=1, budget=8)) == 8


def test_flap_shares_a_budget_among_layers(model, ids):
    hidden = find_groups(model)[0].sites[0].out_features
    with torch.no_grad():  # the last layer has a few neurons of very high scores: below the mean are all the others
        down, _ = take_out(model, find_groups(model)[-1].sites[-1].name)
        down[:, : hidden // 8] *= 30
    config = KronyConfig("keep=0.5", init="flap", allocation="global", token_weighting=False)
    report = compress(model, config, calibration=ids)
    groups = [g for g in find_groups(original(model)) if g.sites[-1].name in kronecker_layers(model)]
    alive = [int(kronecker_layers(model)[g.sites[-1].name].dense_weight().any(0).sum()) for g in groups]
    assert report.params_after < report.params_before
    assert sum(alive) <= hidden // 2 * 3 and alive[-1] == min(alive) < max(alive)


def test_random_neurons_depend_on_the_seed_and_the_layer_alone():
    first = random_neurons.draw(100, 50, seed=1, name="a")
    torch.randn(3)  # the global generator plays no part
    assert torch.equal(first, random_neurons.draw(100, 50, seed=1, name="a"))
    assert not torch.equal(first, random_neurons.draw(100, 50, seed=2, name="a"))
    assert not torch.equal(first, random_neurons.draw(100, 50, seed=1, name="b"))
    assert len(set(first.tolist())) == 50 and first.tolist() == sorted(first.tolist())
    often = torch.zeros(10)
    for seed in range(400):
        often[random_neurons.draw(10, 5, seed, "a")] += 1
    assert (often / 400 - 0.5).abs().max() < 0.1  # each as likely as any other


def test_equal_scores_leave_the_first():
    assert highest(torch.ones(6), 3).tolist() == [0, 1, 2]


def test_magnitude_counts_every_matrix_of_the_mlp():
    ups, down = [torch.tensor([[1.0], [0.0], [0.0]]), torch.tensor([[0.0], [2.0], [0.0]])], torch.tensor([[0, 0, 3.0]])
    assert magnitude.scores(ups, down).tolist() == [1.0, 4.0, 9.0]


@pytest.mark.parametrize("init", NAMES)
def test_kept_neurons_stay_exact_slim_is_exact_and_folders_load(model, ids, init, tmp_path):
    name = find_groups(model)[1].sites[0].name
    weight, bias = (None if t is None else t.clone() for t in take_out(model, name))
    compress(model, KronyConfig("keep=0.5", init=init, seed=3), calibration=ids if init in CALIBRATED else None)
    layer = kronecker_layers(model)[name]
    made = layer.dense_weight()
    rows = {tuple(row): i for i, row in enumerate(weight.tolist())}
    alive = made.any(dim=1).nonzero().flatten().tolist()
    assert len(alive) == weight.shape[0] // 2
    for j in alive:
        old = rows[tuple(made[j].tolist())]  # KeyError unless the row is bit for bit there
        assert bias is None or layer.bias[j] == bias[old]
    logits = model(ids).logits
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    torch.testing.assert_close(loaded(ids).logits, logits, rtol=0, atol=0)
    slim = krony.export_model(loaded, to="slim")
    torch.testing.assert_close(slim(ids).logits, logits, rtol=1e-5, atol=1e-5)
    assert take_out(slim, name)[0].shape[0] == weight.shape[0] // 2


@pytest.mark.parametrize("init", NAMES)
def test_epsilon_stands_in_for_the_dropped_neurons(ids, init):
    model = gpt2()
    compress(model, KronyConfig("keep=0.25", init=init, epsilon=0.125), calibration=ids if init in CALIBRATED else None)
    for layer in kronecker_layers(model).values():
        assert layer.right.flatten().tolist() == [1.0, 0.125, 0.125, 0.125]


@pytest.mark.parametrize("init", NAMES)
@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"scheme": "96x24"}, "keeps complete neurons, and a left factor of 96x24 splits them"),
        ({"scheme": "keep=0.5", "modules": "c_fc"}, "needs complete MLPs"),
    ],
)
def test_layers_that_do_not_fit(ids, init, options, words):
    model = gpt2()
    with pytest.raises(KronyError, match=WORDS[init] + words):
        compress(model, KronyConfig(init=init, **options), calibration=ids)
    assert not kronecker_layers(model)


@pytest.mark.parametrize("init", ["wanda", "magnitude", "random-neurons"])
def test_only_methods_with_costs_share_a_budget(ids, init):
    with pytest.raises(KronyError, match=f"allocation global works with init neurons, flap, and the init is {init}"):
        compress(gpt2(), KronyConfig("keep=0.5", init=init, allocation="global"), calibration=ids)


@pytest.mark.parametrize("init", CALIBRATED)
def test_text_is_needed(init):
    with pytest.raises(KronyError, match="needs calibration text"):
        compress(gpt2(), KronyConfig("keep=0.5", init=init))
    shape = KronShape(4, 3, 2, 1, 1)
    targets = [
        Target("fc", "up", torch.ones(8, 3), None, shape),
        Target("proj", "down", torch.ones(3, 8), None, shape.transposed),
    ]
    second = SecondMoment(torch.eye(3, dtype=torch.float64), torch.zeros(3, dtype=torch.float64))
    for moments in (None, Moments(second, None, 9)):
        with pytest.raises(KronyError, match=f"init {init} needs calibration text"):
            find_initialisation(init).initialise(targets, KronyConfig("4x3", init=init), moments)
