"""Finding layers, GPT-2's orientation, tied weights, and choosing layers."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, GPTNeoXConfig, OPTConfig, PhiConfig

from krony import KronyConfig, KronyError, compress
from krony.models import surgery
from small_models import gpt2, llama


def test_groups_of_a_plain_mlp():
    groups = surgery.find_groups(gpt2())
    assert [s.name for s in groups[1].sites] == ["transformer.h.1.mlp.c_fc", "transformer.h.1.mlp.c_proj"]
    assert [(s.role, s.out_features, s.in_features) for s in groups[1].sites] == [("up", 192, 48), ("down", 48, 192)]
    assert groups[1].is_mlp and groups[1].layer == 1


def test_groups_of_a_gated_mlp():
    groups = surgery.find_groups(llama())
    assert [s.name.split(".")[-1] for s in groups[0].sites] == ["gate_proj", "up_proj", "down_proj"]
    assert {s.tall for s in groups[0].sites} == {(144, 48)}


@pytest.mark.parametrize(
    "config",
    [
        GPTNeoXConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, vocab_size=50),
        OPTConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, ffn_dim=64, vocab_size=50),
        PhiConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, vocab_size=50),
    ],
    ids=lambda c: c.model_type,
)
def test_other_families_name_their_mlps_otherwise(config):
    groups = surgery.find_groups(AutoModelForCausalLM.from_config(config))
    assert [g.layer for g in groups] == [0, 1]
    assert [s.tall for g in groups for s in g.sites] == [(64, 32)] * 4


def test_gpt2_orientation():
    """What is taken out acts like the layer itself; fails if c_fc and c_proj are swapped or transposed."""
    model = gpt2(n_inner=48)  # square: nothing but the values can tell
    mlp = model.transformer.h[0].mlp
    x = torch.randn(5, 48)
    hidden = F.linear(x, *surgery.take_out(model, "transformer.h.0.mlp.c_fc"))
    torch.testing.assert_close(hidden, mlp.c_fc(x))
    out = F.linear(mlp.act(hidden), *surgery.take_out(model, "transformer.h.0.mlp.c_proj"))
    torch.testing.assert_close(out, mlp(x))


def test_a_square_mlp_keeps_its_orientation_when_compressed():
    """At full k nothing is lost, so the logits of a square-MLP GPT-2 only survive if every matrix is the right way."""
    model, reference = gpt2(n_inner=48), gpt2(n_inner=48)
    ids = torch.arange(20)[None]
    compress(model, KronyConfig("12x48:4", init="van-loan"))
    assert model.transformer.h[0].mlp.c_fc.shape.right == (4, 1)
    assert model.transformer.h[0].mlp.c_proj.shape.right == (1, 4)
    torch.testing.assert_close(model(ids).logits, reference(ids).logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("layers", "chosen"),
    [("all", [0, 1, 2]), ("odd", [1]), ("even", [0, 2]), ("1-2", [1, 2]), ("0-0", [0]), ("2", [2])],
)
def test_layers(layers, chosen):
    assert [g.layer for g in surgery.find_groups(gpt2(), layers=layers)] == chosen


@pytest.mark.parametrize("layers", ["", "none", "2-1", "1-", "-1", "1-2-3"])
def test_layers_that_are_no_range(layers):
    with pytest.raises(KronyError, match="is not understood"):
        surgery.find_groups(gpt2(), layers=layers)


def test_layers_beyond_the_model():
    with pytest.raises(KronyError, match="chooses none of the layers 0-2"):
        surgery.find_groups(gpt2(), layers="5-9")
    with pytest.raises(KronyError, match="chooses none of lm_head"):
        surgery.find_groups(llama(tie_word_embeddings=False), modules="lm_head", layers="odd")


def test_modules_by_expression():
    groups = surgery.find_groups(llama(), modules=r"self_attn\.[qo]_proj")
    assert [s.name for s in groups[0].sites] == ["model.layers.0.self_attn.q_proj"]
    assert len(groups) == 6 and not groups[0].is_mlp


def test_an_mlp_that_matches_whole_stays_together_and_a_part_keeps_its_role():
    whole, part = surgery.find_groups(gpt2(), "mlp"), surgery.find_groups(gpt2(), r"mlp\.c_proj")
    assert surgery.find_groups(gpt2(), r"\.mlp\.") == whole
    assert [g.sites[0].role for g in part] == ["down"] * 3


def test_modules_that_match_nothing():
    with pytest.raises(KronyError, match=r"'nothing' matches no linear layer; there are, for example, transformer\.h"):
        surgery.find_groups(gpt2(), modules="nothing")
    with pytest.raises(KronyError, match="not a regular expression"):
        surgery.find_groups(gpt2(), modules="(")


def test_a_tied_head_is_refused():
    with pytest.raises(KronyError, match=r"lm_head shares its weight \(model.embed_tokens.weight = lm_head.weight\)"):
        surgery.find_groups(llama(), modules="lm_head")


def test_a_model_without_mlps():
    model = nn.Sequential(nn.Linear(4, 4))
    with pytest.raises(KronyError, match="no MLP is known in Sequential"):
        surgery.find_groups(model)


def test_tied_parameters_are_counted_once():
    tied, untied = llama(), llama(tie_word_embeddings=False)
    assert surgery.count_parameters(untied) - surgery.count_parameters(tied) == 257 * 48
