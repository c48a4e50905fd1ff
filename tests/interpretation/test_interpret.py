"""What is said of factors agrees with dense float64 formulas, and with models changed by hand."""

import math
from pathlib import Path

import numpy as np
import pytest
import scipy.linalg
import torch

from krony import KronyConfig, KronyError, compress, interpret
from krony.interpretation.ablation import without
from krony.interpretation.subspaces import cosines, effective_rank, span
from krony.kronecker.algebra import KronShape
from krony.kronecker.linear import KroneckerLinear
from krony.models.dense import to_dense
from krony.models.surgery import kronecker_layers, put_in
from small_models import BUILDERS, gpt2, llama

LENGTH = 64  # the context of the small models


@pytest.fixture
def text(tmp_path):
    file = tmp_path / "text.txt"
    file.write_text("The quick brown fox jumps over the lazy dog, again & again <b>. " * 8)  # 512 characters
    return str(file)


def van_loan(model, scheme="48x24:3", **options):
    compress(model, KronyConfig(scheme, init="van-loan", **options))
    return model


def rows(text, tokenizer, count):
    ids = tokenizer(Path(text).read_text())["input_ids"]
    return torch.tensor(ids[: count * LENGTH]).view(count, LENGTH)


def test_effective_rank_and_angles_against_numpy_and_scipy():
    generator = np.random.default_rng(0)
    matrix = generator.normal(size=(20, 9)) * np.geomspace(1, 1e-3, 9)
    values = np.linalg.svd(matrix, compute_uv=False)
    p = values / values.sum()
    assert effective_rank(torch.from_numpy(values)) == pytest.approx(np.exp(-(p * np.log(p)).sum()), rel=1e-9)
    one, other = (np.linalg.qr(generator.normal(size=(20, n)))[0] for n in (4, 3))
    angles = np.sort(scipy.linalg.subspace_angles(one, other))
    ours = cosines(torch.from_numpy(one), torch.from_numpy(other)).acos().numpy()
    np.testing.assert_allclose(ours, angles, atol=1e-7)
    assert effective_rank(torch.zeros(3)) == 0.0


def test_the_span_of_right_factors_is_that_of_any_equivalent_ones():
    torch.manual_seed(0)
    right, mixing = torch.randn(2, 3, 4), torch.randn(2, 2)
    mixed = torch.einsum("fg,gpq->fpq", mixing, right)
    torch.testing.assert_close(cosines(span(right), span(mixed)), torch.ones(2, dtype=torch.float64))
    assert span(torch.stack([right[0], 2 * right[0]])).shape == (12, 1)


@pytest.mark.parametrize("family", list(BUILDERS))
def test_shares_against_the_dense_matrices_on_the_same_text(family, text, tokenizer):
    """Inputs come from a dense copy of the model; each term is multiplied by ``numpy.kron``'s matrix."""
    model = van_loan(BUILDERS[family](), "48x24:3" if family == "gpt2" else "36x24:3")
    seen = interpret(model, tokenizer, text, tokens=4 * LENGTH, ablation_tokens=0)
    layers = {name: [p.detach().double().numpy() for p in (m.weight, m.right, m.coefficients())]
              for name, m in kronecker_layers(model).items()}  # fmt: skip
    dense, inputs = to_dense(model), {}
    for name in layers:
        dense.get_submodule(name).register_forward_pre_hook(
            lambda _, args, name=name: inputs.setdefault(name, []).append(args[0][0, 1:].double().numpy())
        )
    ids = rows(text, tokenizer, 4)
    with torch.no_grad():
        for row in ids:
            dense(row[None])
    for view in seen.layers:
        left, _, right = layers[view.name]
        x = np.concatenate(inputs[view.name])  # (t, in)
        terms = [x @ np.kron(a, b).T for a, b in zip(left, right, strict=True)]
        whole = sum(terms)
        for factor, term, a in zip(view.factors, terms, left, strict=True):
            assert factor.share == pytest.approx((term * whole).sum() / (whole**2).sum(), abs=1e-5)
            assert factor.alone == pytest.approx((term**2).sum() / (whole**2).sum(), abs=1e-5)
            np.testing.assert_allclose(factor.singular_values, np.linalg.svd(a, compute_uv=False), atol=1e-6)
        assert sum(factor.share for factor in view.factors) == pytest.approx(1, abs=1e-5)


def test_ablation_against_a_model_without_the_factor(text, tokenizer):
    """Made by hand: a dense GPT-2 of transformers, one of whose matrices lacks one term."""
    model = van_loan(gpt2())
    seen = interpret(model, tokenizer, text, tokens=4 * LENGTH, ablation_tokens=2 * LENGTH)
    ids, layer = rows(text, tokenizer, 2), kronecker_layers(model)["transformer.h.1.mlp.c_proj"]
    terms = [np.kron(*(p.detach().double().numpy() for p in pair)) for pair in zip(layer.weight, layer.coefficients(),
             strict=True)]  # fmt: skip
    dense = to_dense(model)

    def perplexity() -> float:
        with torch.no_grad():
            return torch.stack([dense(row[None], labels=row[None]).loss for row in ids]).mean().exp().item()

    whole = perplexity()
    assert seen.perplexity == pytest.approx(whole, rel=1e-5) and seen.ablation_tokens == 2 * LENGTH
    for index, factor in enumerate(next(v for v in seen.layers if v.name.endswith("h.1.mlp.c_proj")).factors):
        rest = sum(term for f, term in enumerate(terms) if f != index)
        with torch.no_grad():
            dense.transformer.h[1].mlp.c_proj.weight.copy_(torch.from_numpy(rest.T))
        assert factor.ratio == pytest.approx(perplexity() / whole, rel=1e-5)
        assert factor.low <= factor.ratio <= factor.high


def test_a_factor_comes_back_and_a_shared_one_is_left_out_of_one_layer_only():
    one, other = (KroneckerLinear(KronShape(4, 3, 2, 2, 2)) for _ in range(2))
    other.right = one.right
    with torch.no_grad():
        for parameter in (one.weight, other.weight, one.right, one.bias, other.bias):
            parameter.normal_()
    before, x = one.right, torch.randn(5, 6)
    kept, same = one(x), other(x)
    with pytest.raises(RuntimeError), without(one, 1):
        assert torch.equal(other(x), same) and not torch.allclose(one(x), kept)
        raise RuntimeError
    assert one.right is before and torch.equal(one(x), kept)


def test_a_planted_group_is_found_with_the_token_that_drives_it(text, tokenizer):
    """One row of A answers to the vector of "q" alone, which occurs once in a sequence."""
    model = gpt2(n_layer=1)
    block = model.transformer.h[0]
    with torch.no_grad():
        for parameter in block.attn.parameters():
            parameter.zero_()  # each token's state is its own vector
        model.transformer.wpe.weight.zero_()
        block.ln_2.bias.zero_()
        direction = block.ln_2(model.transformer.wte.weight[tokenizer.convert_tokens_to_ids("q")])  # (48,)
        layer = KroneckerLinear(KronShape(48, 48, 4, 1))
        layer.weight.zero_()
        layer.weight[0, 17] = direction
        layer.right.copy_(torch.tensor([[[0.0], [2.0], [1.0], [0.0]]]))
        layer.bias.zero_()
    put_in(model, "transformer.h.0.mlp.c_fc", layer)
    (view,) = interpret(model, tokenizer, text, tokens=4 * LENGTH, ablation_tokens=0).layers
    group = view.factors[0].groups[0]
    assert group.index == 17 and group.members == [68, 69, 70, 71] and group.share == pytest.approx(1)
    assert group.weights == pytest.approx([0, 0.8, 0.2, 0]) and view.side == "outputs"
    assert {context.token for context in group.contexts} == {"q"} and len(group.contexts) == 3
    first = group.contexts[0]
    assert first.before.endswith("The ") and first.after.startswith("uick b")
    assert len({context.sequence for context in group.contexts}) == 3
    assert view.factors[0].effective_rank == 1


def test_neurons_that_were_selected_share_groups_in_the_order_of_the_factors(text, tokenizer):
    model = llama()
    calibration = torch.randint(0, 256, (8, 32), generator=torch.Generator().manual_seed(1))
    compress(model, KronyConfig("36x48:2", init="neurons"), calibration=calibration)
    seen = interpret(model, tokenizer, text, tokens=2 * LENGTH, ablation_tokens=LENGTH)
    assert len(seen.layers) == 9 and {view.side for view in seen.layers} == {"outputs", "inputs"}
    for view in seen.layers:
        for factor in view.factors:
            assert factor.groups[0].weights == pytest.approx([float(n == factor.index) for n in range(4)])
    spans = [found for found in seen.similarities if found.of == "right"]
    assert len(spans) == 3 and all(found.across == pytest.approx(1) for found in spans)
    assert math.isinf(seen.layers[0].factors[0].high)  # one sequence


def test_a_factorised_embedding_has_one_factor(text, tokenizer):
    model = gpt2(n_layer=1)
    van_loan(model, embedding=2)
    seen = interpret(model, tokenizer, text, tokens=2 * LENGTH, ablation_tokens=2 * LENGTH)
    view = seen.layers[0]
    assert view.name == "transformer.wte" and view.side == "tokens" and view.right == (1, 2)
    assert view.factors[0].share == 1 and view.factors[0].groups == [] and view.factors[0].ratio > 0


def test_layers_that_stay_dense_are_named(text, tokenizer):
    seen = interpret(van_loan(gpt2(), layers="1"), tokenizer, text, tokens=LENGTH, ablation_tokens=0)
    assert len(seen.layers) == 2 and len(seen.dense) == 4 and seen.similarities == [] and seen.perplexity is None


def test_refusals(tmp_path, text, tokenizer):
    with pytest.raises(KronyError, match="nothing in this model is compressed"):
        interpret(gpt2(), tokenizer, text)
    model = van_loan(gpt2())
    (tmp_path / "empty.txt").write_text(" \n")
    (tmp_path / "short.txt").write_text("too short")
    for name, sentence in {
        "empty.txt": "is empty",
        "short.txt": r"has 10 tokens: at least 64",
        "no.txt": "No such",
    }.items():
        with pytest.raises(KronyError, match=sentence):
            interpret(model, tokenizer, str(tmp_path / name))
    with pytest.raises(KronyError, match="10 tokens of text: at least 64"):
        interpret(model, tokenizer, text, tokens=10)
