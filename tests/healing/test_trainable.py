"""What trains, what stays, and at which rate."""

from dataclasses import replace

import pytest
import torch
from transformers import OPTConfig, OPTForCausalLM, PersimmonConfig, PersimmonForCausalLM

from healing_runs import heal, text
from krony import KronyConfig, KronyError, compress
from krony.healing.options import parse_freeze
from krony.healing.recipes import RECIPES
from krony.healing.trainable import adamw, trainable
from krony.models.surgery import kronecker_embeddings, kronecker_layers
from small_models import gpt2, llama


@pytest.fixture
def scaled():
    """Two factors with scalars that start at 4, as section 6 of the paper suggests."""
    model = gpt2(attn_pdrop=0.1)
    compress(model, KronyConfig("48x48:2", init="van-loan", scalar_init=4.0))
    return model


def kinds(model) -> dict[str, set[str]]:
    """The names of the parameters of each kind."""
    found = {"left": set(), "right": set(), "scalars": set(), "embeddings": set()}
    for name in kronecker_layers(model):
        found["left"].add(f"{name}.weight")
        found["right"].add(f"{name}.right")
        found["scalars"].add(f"{name}.scalars")
    found["embeddings"].add("transformer.wte.weight")
    found["other"] = {name for name, _ in model.named_parameters()} - set().union(*found.values())
    return found


@pytest.mark.parametrize(
    ("freeze", "kept"),
    [
        ("none", set()),
        ("right", {"right"}),
        ("scalars", {"scalars"}),
        ("inherited", {"embeddings", "other"}),
        ("embeddings", {"embeddings"}),
        ("right,scalars", {"right", "scalars"}),
        ("right, inherited, scalars", {"right", "scalars", "embeddings", "other"}),
    ],
)
def test_what_is_frozen_stays(scaled, tmp_path, freeze, kept):
    before = {name: p.detach().clone() for name, p in scaled.named_parameters()}
    heal(scaled, *text(20).split(4), work=tmp_path, freeze=freeze, device="cpu")
    changed = {name for name, p in scaled.named_parameters() if not torch.equal(p, before[name])}
    for kind, names in kinds(scaled).items():
        assert (changed & names == set()) == (kind in kept), kind
    if "scalars" in kept:
        assert all(bool((layer.scalars == 4).all()) for layer in kronecker_layers(scaled).values())


def test_the_factors_of_embeddings_are_factors():
    model = gpt2()
    compress(model, KronyConfig("keep=0.5", init="van-loan", embedding=2))
    (layer,) = kronecker_embeddings(model).values()
    left, right = id(layer.weight), id(layer.right)
    for words, frozen in (({"right"}, {right}), ({"inherited"}, set()), ({"embeddings"}, {left, right})):
        with trainable(model, words):
            assert {id(p) for p in (layer.weight, layer.right) if not p.requires_grad} == frozen, words
    recipe = replace(RECIPES["quick"], factor_rate=2e-4)
    (group,) = [g for g in adamw(model, recipe).param_groups if left in {id(p) for p in g["params"]}]
    assert (group["lr"], group["weight_decay"]) == (2e-4, recipe.weight_decay)
    assert right in {id(p) for p in group["params"]}


def test_all_is_undone(scaled):
    scaled.train()
    with pytest.raises(ZeroDivisionError), trainable(scaled, {"right"}, checkpointing=True):
        assert scaled.transformer.gradient_checkpointing
        assert not any(m.p for m in scaled.modules() if isinstance(m, torch.nn.Dropout))
        _ = 1 / 0
    assert not scaled.transformer.gradient_checkpointing and all(p.requires_grad for p in scaled.parameters())
    assert scaled.transformer.h[0].attn.attn_dropout.p == 0.1


def check_dropout_is_off(model):
    """In training mode the model computes what it computes in eval mode; it is left in training mode."""
    ids = torch.arange(20)[None]
    with trainable(model, ()):
        assert torch.equal(model.train()(ids).logits, model.eval()(ids).logits)
        model.train()
    assert not torch.equal(model(ids).logits, model.eval()(ids).logits)


def test_dropout_that_is_read_from_the_config_in_every_call_is_off_too():
    config = PersimmonConfig(
        vocab_size=96, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=64, attention_dropout=0.5, hidden_dropout=0.5,
    )  # fmt: skip
    torch.manual_seed(0)
    model = PersimmonForCausalLM(config)
    check_dropout_is_off(model)
    assert model.config.attention_dropout == 0.5


def test_dropout_that_layers_keep_as_numbers_is_off_too():
    """OPT's layers hand their rate to the function; its decoder skips whole layers at another."""
    config = OPTConfig(
        vocab_size=96, hidden_size=32, ffn_dim=64, num_hidden_layers=2, num_attention_heads=2, word_embed_proj_dim=32,
        max_position_embeddings=64, dropout=0.5, attention_dropout=0.5, layerdrop=0.5,
    )  # fmt: skip
    torch.manual_seed(0)
    model = OPTForCausalLM(config)
    check_dropout_is_off(model)
    layer = model.model.decoder.layers[0]
    assert layer.dropout == layer.self_attn.dropout == model.model.decoder.layerdrop == 0.5


def test_only_factors_decay_and_each_kind_has_its_rate(scaled):
    """Decay and betas are the published code's; the rates of each kind are krony's own."""
    optimizer = adamw(scaled, replace(RECIPES["paper"], factor_rate=1e-4, inherited_rate=1e-5))
    factors, scalars, inherited = optimizer.param_groups
    assert (factors["weight_decay"], factors["lr"]) == (0.1, 1e-4)
    assert (scalars["weight_decay"], scalars["lr"]) == (0.0, 1e-4)
    assert (inherited["weight_decay"], inherited["lr"]) == (0.0, 1e-5)
    assert (len(factors["params"]), len(scalars["params"])) == (12, 6)
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(list(scaled.parameters()))
    assert factors["betas"] == (0.9, 0.95)
    assert {group["lr"] for group in adamw(scaled, RECIPES["paper"]).param_groups} == {6e-5}


def test_mistakes(scaled):
    with pytest.raises(KronyError, match="'left' is unknown: it is one of none, right, inherited, scalars, embeddings"):
        parse_freeze("right,left")
    with pytest.raises(KronyError, match="none stands alone"):
        parse_freeze("none,right")
    with pytest.raises(KronyError, match="this model has no scalars"), trainable(llama(), {"scalars"}):
        pass
    with pytest.raises(KronyError, match="leaves a dense model nothing to train"), trainable(llama(), {"inherited"}):
        pass
