"""krony.compress on whole models of both families."""

import copy
import re

import pytest
import torch

from krony import KronyConfig, KronyError, compress
from krony.models.surgery import count_parameters, kronecker_layers, take_out
from small_models import BUILDERS, gpt2, llama


@pytest.mark.parametrize("family", list(BUILDERS))
@pytest.mark.parametrize(("scheme", "per_layer"), [("keep=0.5", 0.5), ("keep=0.75", 0.75)])
def test_parameters_are_what_the_scheme_says(family, scheme, per_layer):
    model = BUILDERS[family]()
    dense = {n: m for n, m in model.named_modules() if "mlp." in n and hasattr(m, "weight")}
    report = compress(model, KronyConfig(scheme, init="van-loan"))
    factors = report.layers[0].shape
    expected = report.params_before - sum(m.weight.numel() for m in dense.values())
    expected += len(report.layers) * (factors.parameters + factors.factors * (factors.factors > 1))
    assert report.params_after == count_parameters(model) == expected
    assert (
        report.layers[0].shape.factors * factors.m1 * factors.n1
        == per_layer * dense[report.layers[0].name].weight.numel()
    )


@pytest.mark.parametrize("options", [{"init": "van-loan"}, {"init": "prune", "epsilon": 0.0}])
def test_at_full_rank_nothing_is_lost(model, ids, options):
    expected = model(ids).logits
    hidden = 192 if model.config.model_type == "gpt2" else 144
    report = compress(model, KronyConfig(f"{hidden // 3}x48:3", **options))
    assert max(layer.error for layer in report.layers) < 1e-6
    torch.testing.assert_close(model(ids).logits, expected, rtol=1e-4, atol=1e-5)


def test_report_errors_are_those_of_the_layers(model):
    names = [n for n, m in model.named_modules() if n.endswith(("c_fc", "c_proj", "gate_proj", "up_proj", "down_proj"))]
    before = {n: take_out(model, n)[0].clone() for n in names if "mlp" in n}
    report = compress(model, KronyConfig("keep=0.5", init="van-loan", rescale=False))
    for layer in report.layers:
        made = kronecker_layers(model)[layer.name].dense_weight()
        expected = (before[layer.name] - made).norm() / before[layer.name].norm()
        assert layer.error == pytest.approx(expected.item(), rel=1e-5)
        assert layer.calibrated_error is None


def test_what_is_no_config_and_no_list_of_texts(tokenizer):
    with pytest.raises(KronyError, match="compress takes a KronyConfig"):
        compress(gpt2(), "keep=0.5")
    with pytest.raises(KronyError, match=r"scheme is 0\.5, not text"):
        KronyConfig(0.5)
    with pytest.raises(KronyError, match="calibration is one string: give a list of texts"):
        compress(gpt2(), KronyConfig("keep=0.5"), calibration="some text " * 99, tokenizer=tokenizer)


def test_tied_heads_stay_tied():
    model = llama()
    compress(model, KronyConfig("keep=0.5", init="van-loan"))
    assert model.lm_head.weight is model.get_input_embeddings().weight


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_dtype_is_kept(model, dtype):
    model = model.to(dtype)
    compress(model, KronyConfig("keep=0.5", init="van-loan", scalars=True))
    assert {p.dtype for p in model.parameters()} == {dtype}


@pytest.mark.parametrize("options", [{}, {"scalars": True}, {"scalar_init": 4.0}, {"scalars": False}])
def test_scalars_never_change_the_matrix(options):
    plain, model = gpt2(), gpt2()
    compress(plain, KronyConfig("64x16:2", init="van-loan", scalars=False))
    compress(model, KronyConfig("64x16:2", init="van-loan", **options))
    for name, layer in kronecker_layers(model).items():
        torch.testing.assert_close(layer.dense_weight(), kronecker_layers(plain)[name].dense_weight())
    first = next(iter(kronecker_layers(model).values()))
    if options == {"scalar_init": 4.0}:
        assert first.scalars.tolist() == [4.0, 4.0]
    elif options == {"scalars": False}:
        assert first.scalars is None
    else:
        assert first.scalars[0] == first.scalars[1] > 1  # α of adaptive normalisation


def test_layers_and_modules_choose():
    model = gpt2()
    report = compress(model, KronyConfig("24x48", init="van-loan", layers="odd", modules=r"mlp\.c_fc|attn\.c_attn"))
    names = [layer.name for layer in report.layers]
    assert names == ["transformer.h.1.attn.c_attn", "transformer.h.1.mlp.c_fc"]


def test_any_linear_layer_is_split_by_its_larger_side():
    model = llama()
    report = compress(model, KronyConfig("keep=0.5", init="van-loan", modules=r"k_proj|o_proj"))
    shapes = {layer.name.split(".")[-1]: (layer.shape.left, layer.shape.right) for layer in report.layers}
    assert shapes == {"k_proj": ((24, 24), (1, 2)), "o_proj": ((24, 48), (2, 1))}


def test_reinit_all_draws_every_other_weight_anew():
    model, original = gpt2(), gpt2()
    compress(model, KronyConfig("keep=0.5", init="random", reinit="all", seed=3))
    assert not torch.equal(model.transformer.wte.weight, original.transformer.wte.weight)
    assert model.lm_head.weight is model.transformer.wte.weight
    again = gpt2()
    compress(again, KronyConfig("keep=0.5", init="random", reinit="all", seed=3))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    inherited = gpt2()
    compress(inherited, KronyConfig("keep=0.5", init="random", seed=3))
    assert torch.equal(inherited.transformer.wte.weight, original.transformer.wte.weight)


@pytest.mark.parametrize("build", [gpt2, lambda: llama(mlp_bias=True, attention_bias=True)])
def test_reinit_all_leaves_nothing_of_the_original(build):
    """Appendix C redraws all parameters: of the model before, biases of compressed layers included, nothing is left."""
    model, other, fresh = build(), build(), build()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.normal_()
        torch.manual_seed(3)
        fresh = type(fresh)(fresh.config)
    for one in (model, other):
        compress(one, KronyConfig("keep=0.5", init="random", reinit="all", seed=3))
    expected = fresh.state_dict()
    for (name, value), second in zip(model.state_dict().items(), other.state_dict().values(), strict=True):
        assert torch.equal(value, second), name
        assert not name.endswith("bias") or torch.equal(value, expected[name]), name


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"scheme": "81M"}, "81M is the paper's name"),
        ({"scheme": "100x7"}, r"transformer\.h\.0\.mlp\.c_fc: a left factor of 100x7 does not divide"),
        ({"scheme": "keep=0.5", "modules": "nothing"}, "matches no linear layer"),
        ({"scheme": "96x48:9"}, r"takes from 1 to 2"),
    ],
)
def test_what_does_not_fit_changes_nothing(options, words):
    model, original = gpt2(), gpt2()
    with pytest.raises(KronyError, match=words):
        compress(model, KronyConfig(init="van-loan", **options))
    assert not kronecker_layers(model) and not hasattr(model.config, "quantization_config")
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), original.parameters(), strict=True))


def test_a_weight_that_is_not_finite_is_named_and_nothing_changes():
    model = gpt2()
    with torch.no_grad():
        model.transformer.h[2].mlp.c_proj.weight[3, 4] = float("nan")
    with pytest.raises(KronyError, match=r"transformer\.h\.2\.mlp\.c_proj: .* not finite"):
        compress(model, KronyConfig("keep=0.5", init="van-loan"))
    assert not kronecker_layers(model)


def test_texts_are_read_in_sequences_that_the_model_takes(tokenizer):
    model = gpt2(n_positions=64)
    texts = [f"text number {n}, of a few words" for n in range(200)]
    compress(model, KronyConfig("keep=0.5"), calibration=texts, tokenizer=tokenizer)
    assert kronecker_layers(model)


@pytest.mark.parametrize("options", [{"init": "als"}, {"init": "van-loan"}, {"init": "van-loan", "tune": 3}], ids=str)
def test_text_is_not_measured_outside_the_layers(options, ids):
    """At a head that has its own matrix."""
    model = llama(tie_word_embeddings=False, vocab_size=256)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(KronyError, match="lm_head is in no transformer layer, and calibration text is measured in"):
        compress(model, KronyConfig("keep=0.5", modules="lm_head|up_proj", **options), calibration=ids)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("part", ["transformer.h.1.mlp", "transformer.wte"])
def test_weights_that_are_offloaded_are_named(part):
    """``device_map='auto'`` leaves on meta what does not fit; a calibration's key is made of all of them."""
    model = gpt2()
    model.get_submodule(part).to("meta")
    with pytest.raises(KronyError, match=f"{re.escape(part)}.* is not in memory but offloaded"):
        compress(model, KronyConfig("keep=0.5", init="van-loan", layers="0", embedding=2))
    assert not kronecker_layers(model)


def test_a_compressed_model_is_not_compressed_again():
    model = gpt2()
    compress(model, KronyConfig("keep=0.5", init="van-loan"))
    with pytest.raises(KronyError, match="compressed already"):
        compress(model, KronyConfig("keep=0.5", init="van-loan"))


def test_attention_can_follow_the_mlps():
    model = llama()
    compress(model, KronyConfig("keep=0.5", init="van-loan"))
    compress(model, KronyConfig("keep=0.5", init="van-loan", modules="o_proj"))
    assert len(model.config.quantization_config.modules) == 3 * 3 + 3
    made_with = model.config.quantization_config.made_with
    assert made_with["modules"] == "o_proj" and "modules" not in made_with["earlier"]
