"""Training each MLP by itself: it lowers the error it promises to lower, and touches nothing else."""

import copy

import pytest
import torch
import transformers

from krony import KronyConfig, KronyError, compress
from krony.compression import reconstruction
from krony.compression.moments import Calibration
from krony.compression.reconstruction import examples, module_name, reconstruct
from krony.models.export import slim
from krony.models.surgery import find_groups, kronecker_layers
from small_models import gpt2, llama


@pytest.fixture
def ids() -> torch.Tensor:
    return torch.randint(0, 256, (24, 32), generator=torch.Generator().manual_seed(1))


@pytest.fixture(autouse=True)
def in_float32(monkeypatch):
    """The errors of these tiny models are below what bfloat16 sees."""
    monkeypatch.setattr(reconstruction, "fast_dtype", lambda _: torch.float32)


@pytest.mark.parametrize("family", ["OPT", "Bloom"])
def test_an_mlp_that_can_not_be_run_by_itself(family, ids):
    sizes = {"OPT": {"ffn_dim": 96, "word_embed_proj_dim": 24}, "Bloom": {}}[family]
    config = getattr(transformers, f"{family}Config")(
        vocab_size=257, hidden_size=24, num_hidden_layers=1, num_attention_heads=2, **sizes
    )
    model = transformers.AutoModelForCausalLM.from_config(config)
    with pytest.raises(KronyError, match="is more than an MLP: leave reconstruct out"):
        compress(model, KronyConfig("keep=0.5", reconstruct=2), calibration=ids)


def outputs(model, group, text):
    with torch.no_grad():
        return model.get_submodule(module_name(group))(text.inputs)


CONFIGS = (
    {"scheme": "keep=0.5"},
    {"scheme": "24x48:3", "scalars": True, "scalar_init": 2.0},
    {"scheme": "keep=0.5", "epsilon": 0.1},
    {"scheme": "keep=0.5", "init": "van-loan"},
    {"scheme": "keep=0.5", "init": "als"},
    {"scheme": "48x24", "init": "prune", "epsilon": 0.0},
)


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_every_mlp_comes_nearer_to_the_original(model, ids, config, monkeypatch):
    original, plain = copy.deepcopy(model), copy.deepcopy(model)
    compress(model, KronyConfig(reconstruct=60, **config), calibration=ids)
    monkeypatch.setattr(reconstruction, "reconstruct", lambda *_, **__: None)  # the same start, and no more
    compress(plain, KronyConfig(reconstruct=60, **config), calibration=ids)
    groups = find_groups(original)
    texts = examples(original, groups, ids, token_weighting=True, progress=lambda *_: None)
    known = Calibration(original, groups, ids, sensitivity=True)
    for group, text, moments in zip(groups, texts, known, strict=True):
        expected = outputs(original, group, text)

        g = moments.sensitivity
        g = g + 0.01 * g.trace() / len(g) * torch.eye(len(g))  # what is never sensitivity_root counts a little

        def size(e, text=text, g=g):
            return (text.weights * ((e.double() @ g) * e).sum(-1)).mean()  # Σ w_t e_tᵀ G e_t

        def lost(m, group=group, text=text, expected=expected, size=size):
            return size(outputs(m, group, text) - expected)

        whole = size(expected)
        assert lost(model) <= lost(plain)
        assert lost(model) < 0.95 * lost(plain) or lost(plain) < 1e-5 * whole  # the least squares have found it already


def test_examples_are_what_the_mlps_read(model, ids):
    seen = []
    groups = find_groups(model)
    name = module_name(groups[1])
    model.get_submodule(name).register_forward_pre_hook(lambda _, args: seen.append(args[0].flatten(0, 1)))
    (made,) = list(examples(model, groups[1:2], ids, token_weighting=False, progress=lambda *_: None))
    with torch.no_grad():
        model(ids)
    torch.testing.assert_close(made.inputs, torch.cat(seen[: len(seen) // 2]))
    assert made.weights.tolist() == [1.0] * ids.numel()


def test_a_few_groups_at_a_time_give_the_same(model, ids, monkeypatch):
    groups = find_groups(model)
    whole = list(examples(model, groups, ids, token_weighting=True, progress=lambda *_: None))
    monkeypatch.setattr(reconstruction, "MEMORY", 1)
    for a, b in zip(whole, examples(model, groups, ids, token_weighting=True, progress=lambda *_: None), strict=True):
        assert torch.equal(a.inputs, b.inputs) and torch.equal(a.weights, b.weights)


def test_dropped_neurons_stay_dropped(model, ids):
    compress(model, KronyConfig("keep=0.5", reconstruct=20), calibration=ids)
    expected = model(ids).logits
    exported = slim(model)
    torch.testing.assert_close(exported.model(ids).logits, expected, rtol=1e-5, atol=1e-6)


def test_training_that_makes_it_worse_is_undone(ids, monkeypatch):
    model = llama()
    compress(model, KronyConfig("keep=0.5"), calibration=ids)
    student = model.get_submodule("model.layers.0.mlp")
    layers = kronecker_layers(student)
    before = copy.deepcopy(student.state_dict())
    group = find_groups(llama())[0]
    (text,) = examples(llama(), [group], ids, token_weighting=True, progress=lambda *_: None)
    monkeypatch.setattr(reconstruction, "RATE", 100.0)
    first, last = reconstruct(llama().get_submodule("model.layers.0.mlp"), layers, text, steps=3, seed=0)
    assert first == last
    assert all(torch.equal(a, b) for a, b in zip(before.values(), student.state_dict().values(), strict=True))


def test_the_same_twice_and_dtype_is_kept(ids):
    models = [gpt2().bfloat16(), gpt2().bfloat16()]
    for model in models:
        compress(model, KronyConfig("keep=0.5", reconstruct=5), calibration=ids)
    first, second = (dict(m.named_parameters()) for m in models)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert {p.dtype for p in first.values()} == {torch.bfloat16}


@pytest.mark.parametrize("steps", [1, 2, 10])
def test_any_number_of_steps(steps, ids):
    """Ten once made the schedule divide by zero."""
    compress(gpt2(), KronyConfig("keep=0.5", init="van-loan", reconstruct=steps), calibration=ids)


def test_single_layers(ids):
    model, plain = gpt2(), gpt2()
    options = {"scheme": "keep=0.5", "init": "van-loan", "modules": "c_attn"}
    expected = model(ids).logits
    compress(plain, KronyConfig(**options))
    compress(model, KronyConfig(**options, reconstruct=40), calibration=ids)
    assert (model(ids).logits - expected).norm() < (plain(ids).logits - expected).norm()
    assert set(kronecker_layers(model)) == set(kronecker_layers(plain))


def test_mistakes():
    with pytest.raises(KronyError, match="reconstruct needs calibration text"):
        compress(gpt2(), KronyConfig("keep=0.5", init="van-loan", reconstruct=5))
    with pytest.raises(KronyError, match="reconstruct is -1: it takes a number of steps"):
        KronyConfig("keep=0.5", reconstruct=-1)
