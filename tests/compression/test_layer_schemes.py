"""A scheme per layer: every layer gets the shape that the last pattern which matches it says, and no other changes."""

import json

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from krony import KronyConfig, KronyError, compress, export_model
from krony.compression.model_card import model_card
from krony.compression.plan import plan
from krony.kronecker.algebra import nearest
from krony.models.export import slim
from krony.models.source import empty_model
from krony.models.surgery import kronecker_layers, take_out
from small_models import gpt2, llama

MIXED = {
    "transformer.h.*.mlp": "keep=0.5",
    "transformer.h.1.mlp.c_fc": "48x24:2",
    "transformer.h.2": "dense",
    "transformer.h.2.attn.c_attn": "72x24",
}


@pytest.fixture
def ids():
    return torch.randint(0, 256, (12, 32), generator=torch.Generator().manual_seed(1))


def shapes(model):
    return {name.removeprefix("transformer.h."): str(layer.shape) for name, layer in kronecker_layers(model).items()}


def test_each_layer_gets_the_shape_that_its_last_pattern_says():
    model, before = gpt2(), gpt2()
    foretold = plan(empty_model(model.config), KronyConfig(MIXED, init="van-loan")).params_after
    report = compress(model, KronyConfig(MIXED, init="van-loan", rescale=False))
    assert shapes(model) == {
        "0.mlp.c_fc": "96x48",
        "0.mlp.c_proj": "48x96",
        "1.mlp.c_fc": "48x24:2",
        "1.mlp.c_proj": "48x96",
        "2.attn.c_attn": "72x24",
    }
    # 192·48 per MLP matrix; a left factor, a right factor, and a scalar per factor where there are two
    saved = 3 * (192 * 48) - 3 * (96 * 48 + 2)
    saved += 192 * 48 - (2 * (48 * 24 + 4 * 2) + 2) + 144 * 48 - (72 * 24 + 2 * 2)
    assert report.params_before - report.params_after == saved and report.params_after == foretold
    for name, layer in kronecker_layers(model).items():
        left, right = nearest(take_out(before, name)[0].double(), layer.shape)
        wanted = torch.from_numpy(sum(np.kron(a, b) for a, b in zip(left.numpy(), right.numpy(), strict=True)))
        torch.testing.assert_close(layer.dense_weight(torch.float64), wanted, rtol=0, atol=1e-5)
    changed = set(kronecker_layers(model))
    state = model.state_dict()
    for name, value in before.state_dict().items():
        if name.rpartition(".")[0] not in changed:
            assert torch.equal(state[name], value), name


def test_a_default_for_which_no_layer_is_left_is_no_mistake():
    schemes = {"*.mlp": "keep=0.5"} | {f"transformer.h.{layer}": f"keep={layer + 1}/4" for layer in range(3)}
    settled = plan(gpt2(), KronyConfig(schemes, init="van-loan"))
    assert [shape.factors for name, shape in settled.shapes.items() if name.endswith("c_fc")] == [1, 1, 3]


def test_it_loads_again_and_is_recorded_in_order(tmp_path):
    model = gpt2()
    report = compress(model, KronyConfig(MIXED, init="van-loan"))
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    ids = torch.arange(20)[None]
    assert torch.equal(again(ids).logits, model(ids).logits)
    recorded = json.loads((tmp_path / "config.json").read_text())["quantization_config"]["made_with"]["scheme"]
    assert recorded == [list(pair) for pair in MIXED.items()]
    assert KronyConfig(recorded) == KronyConfig(MIXED)
    said = "schemes `transformer.h.*.mlp: keep=0.5`, `transformer.h.1.mlp.c_fc: 48x24:2`, `transformer.h.2: dense`, "
    assert said in model_card("gpt2", report) and "initialisation `van-loan`" in model_card("gpt2", report)


def test_whole_neurons_by_layer_export_to_slim(ids):
    """Every MLP keeps its own share of neurons; slim pads to the widest, with the same logits."""
    model = llama()
    compress(model, KronyConfig({"*.mlp": "keep=0.5", "model.layers.1.mlp": "keep=0.25"}), calibration=ids)
    assert {str(layer.shape) for name, layer in kronecker_layers(model).items() if ".1." in name} == {
        "36x48", "48x36",
    }  # fmt: skip
    with torch.no_grad():
        logits = model(ids).logits
        made = slim(model)
        assert (made.width, made.kept) == (72, (72, 36, 72))
        torch.testing.assert_close(made.model(ids).logits, logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("init", ["van-loan", "als", "permuted", "prune", "svd", "random"])
def test_matrices_of_one_mlp_may_differ_where_neurons_are_not_whole(init, ids):
    schemes = {"transformer.h.0.mlp.c_fc": "96x48", "transformer.h.0.mlp.c_proj": "48x48:2"}
    model = gpt2()
    report = compress(model, KronyConfig(schemes, init=init), calibration=ids)
    assert [layer.name for layer in report.layers] == list(schemes)
    with torch.no_grad():
        wanted = model(ids).logits
        torch.testing.assert_close(export_model(model, "dense")(ids).logits, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("schemes", "options", "words"),
    [
        (
            {"*.nothing": "keep=0.5"},
            {},
            r"scheme of '\*.nothing' matches no linear layer; there are, for example, tran",
        ),
        (
            {"transformer.h.0.mlp": "dense", "*.mlp": "keep=0.5"},
            {},
            r"'transformer.h.0.mlp' decides nothing, because .* comes later .*: move .* below \*.mlp",
        ),
        ({"*.mlp": "dense"}, {}, "every pattern says dense, so there is nothing to replace"),
        ({"*": "48x48"}, {}, "lm_head shares its weight .*: give it dense"),
        ({"*.c_fc": "7x7"}, {}, r"scheme of '\*.c_fc': transformer.h.0.mlp.c_fc: a left factor of 7x7 does not divide"),
        ({"*.mlp": "81M"}, {}, r"scheme of '\*.mlp': scheme 81M is the paper's name for a size of GPT-2 124M"),
        ({"*.c_fc": "keep=0.5"}, {"init": "neurons"}, "c_fc: init neurons needs complete MLPs"),
        (
            {"*.c_fc": "keep=0.5", "*.mlp.c_proj": "keep=0.25"},
            {"init": "neurons"},
            "0.mlp.c_fc: init neurons keeps the same neurons in all matrices of an MLP, and their schemes differ",
        ),
        ({"*.mlp": "keep=0.5"}, {"allocation": "global"}, "allocation global shares one budget .* use allocation unif"),
        ({"*.mlp": "keep=0.5"}, {"layers": "odd"}, "layers chooses what is replaced, .* leave layers out"),
        ({"*.mlp": "keep=0.5"}, {"modules": "c_fc"}, "modules chooses what is replaced, .* leave modules out"),
        ({"*.mlp": 0.5}, {}, r"'\*.mlp': 0.5: a pattern and its scheme are texts"),
        ({}, {}, "has at least one pattern"),
        (0.5, {}, "scheme is 0.5, not text"),
    ],
)
def test_what_can_not_be_is_refused(schemes, options, words):
    model, before = gpt2(), gpt2().state_dict()
    with pytest.raises(KronyError, match=words):
        plan(model, KronyConfig(schemes, **{"init": "van-loan"} | options))
    assert model.state_dict().keys() == before.keys()
