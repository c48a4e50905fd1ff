"""The embedding of KnGPT2: the nearest product, a head of its own, and a model that loads again."""

import pytest
import torch
from transformers import AutoModelForCausalLM

import krony
from krony.kronecker.embedding import KroneckerEmbedding, factorised
from krony.models.surgery import count_parameters, count_untied, embedding_shape, kronecker_embeddings, kronecker_layers
from small_models import BUILDERS, gpt2

CONFIG = krony.KronyConfig("keep=0.5", init="van-loan", embedding=2)


def test_the_factors_are_the_nearest_product(ids):
    """Against numpy's SVD of the pairs of neighbours."""
    weight = BUILDERS["gpt2"]().get_input_embeddings().weight.detach().double()
    new = factorised(torch.nn.Embedding.from_pretrained(weight), embedding_shape(BUILDERS["gpt2"](), 2)[1])
    pairs = weight.reshape(-1, 2)  # (vocabulary * width/2, 2)
    u, s, v = torch.linalg.svd(pairs, full_matrices=False)
    best = (u[:, :1] * s[:1] @ v[:1]).reshape(weight.shape)
    torch.testing.assert_close(new.dense_weight(), best, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(new(ids), best[ids], rtol=1e-9, atol=1e-9)


def test_a_tied_head_keeps_the_dense_matrix_and_the_model_loads_again(model, ids, tmp_path):
    dense = model.get_input_embeddings().weight.detach().clone()
    before, counted = count_parameters(model), count_untied(model)
    assert counted == before + dense.numel()
    report = krony.compress(model, CONFIG)
    assert torch.equal(model.get_output_embeddings().weight, dense)
    (name,) = kronecker_embeddings(model)
    assert report.layers[-1].name == name and 0 < report.layers[-1].error < 1
    assert report.params_after == count_parameters(model) == count_untied(model)
    model.save_pretrained(tmp_path / "out")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert isinstance(again.get_input_embeddings(), KroneckerEmbedding)
    assert torch.equal(again.get_output_embeddings().weight, dense)
    assert torch.equal(again(ids).logits, model(ids).logits)


def test_after_an_interruption_the_model_is_unchanged(monkeypatch):
    model, original = gpt2(), gpt2()
    before = model.config.to_dict()

    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("krony.compression.compress.factorised", stop)
    with pytest.raises(KeyboardInterrupt):
        krony.compress(model, krony.KronyConfig("keep=0.5", init="van-loan", embedding=2))
    assert not kronecker_layers(model) and model.config.to_dict() == before
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), original.parameters(), strict=True))


def test_reinit_leaves_the_factors_those_of_the_original():
    """``reinit`` draws every weight at random that is not compressed; the head of a tied embedding is such a weight."""
    model, original = gpt2(), gpt2()
    krony.compress(model, krony.KronyConfig("keep=0.5", init="van-loan", embedding=2, reinit="all", seed=3))
    expected = factorised(original.transformer.wte, model.transformer.wte.shape)
    assert torch.equal(model.transformer.wte.weight, expected.weight)
    assert not torch.equal(model.lm_head.weight, original.lm_head.weight)


def test_export_makes_it_dense(ids):
    model = BUILDERS["gpt2"]()
    krony.compress(model, CONFIG)
    expected = model(ids).logits
    plain = krony.export_model(model)
    assert type(plain.get_input_embeddings()) is torch.nn.Embedding
    torch.testing.assert_close(plain(ids).logits, expected, rtol=1e-5, atol=1e-5)


def test_both_factors_get_gradients():
    model = BUILDERS["gpt2"]()
    krony.compress(model, CONFIG)
    model(torch.arange(9)[None], labels=torch.arange(9)[None]).loss.backward()
    embedding = model.get_input_embeddings()
    assert embedding.weight.grad.abs().sum() > 0 and embedding.right.grad.abs().sum() > 0


@pytest.mark.parametrize("size", [0, 1, 5])
def test_a_right_factor_that_does_not_divide_the_width_is_refused(size):
    with pytest.raises(krony.KronyError, match=rf"embedding {size}: .* a divisor of the width 48"):
        krony.compress(BUILDERS["gpt2"](), krony.KronyConfig("keep=0.5", init="van-loan", embedding=size))


def test_a_second_factorisation_and_a_wrong_shape_are_refused(tmp_path):
    import json

    model = BUILDERS["gpt2"]()
    krony.compress(model, CONFIG)
    with pytest.raises(krony.KronyError, match="is a KroneckerEmbedding: it can't be factorised"):
        embedding_shape(model, 2)
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"]["modules"]["transformer.wte"]["right"] = [1, 3]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(krony.KronyError, match=r"transformer.wte is 257x48, its factors make 257x72"):
        krony.load_model(str(tmp_path))
