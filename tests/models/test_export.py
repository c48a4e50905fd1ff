"""Export to plain models: the same logits, and no krony needed."""

import itertools
import subprocess
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM, Qwen2MoeConfig, Qwen2MoeForCausalLM

from krony import KronyConfig, KronyError, compress, export_model
from krony.models.export import slim
from krony.models.surgery import count_parameters
from small_models import BUILDERS, gpt2, llama

GLOBAL = {"allocation": "global"}


@pytest.fixture
def ids() -> torch.Tensor:
    return torch.randint(0, 256, (12, 32), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("options", [{}, GLOBAL, GLOBAL | {"max_width": 120}, GLOBAL | {"multiple_of": 24}])
def test_slim_gives_the_same_logits(model, ids, options):
    compress(model, KronyConfig("keep=0.5", **options), calibration=ids)
    expected, before = model(ids).logits, model.config.to_dict()
    exported = slim(model)
    torch.testing.assert_close(exported.model(ids).logits, expected, rtol=1e-6, atol=1e-6)
    width = exported.model.config.to_dict()[{"gpt2": "n_inner", "llama": "intermediate_size"}[before["model_type"]]]
    assert width == exported.width <= options.get("max_width", width) and width % options.get("multiple_of", 1) == 0
    assert exported.padding == 0 or options
    hidden = {"gpt2": 192, "llama": 144}[before["model_type"]]
    gone = hidden - width
    matrices = {"gpt2": 2, "llama": 3}[before["model_type"]]
    biases = gone if before["model_type"] == "gpt2" else 0
    assert count_parameters(exported.model) == count_parameters(BUILDERS[before["model_type"]]()) - 3 * (
        gone * 48 * matrices + biases
    )


def test_padding_is_what_the_one_width_gives_back_and_is_foretold(ids):
    model = llama()
    report = compress(model, KronyConfig("keep=0.5", allocation="global"), calibration=ids)
    widths = [int(m.down_proj.dense_weight().any(0).sum()) for m in (layer.mlp for layer in model.model.layers)]
    exported = slim(model)
    assert exported.width == max(widths)
    assert exported.padding == sum(exported.width - width for width in widths) * 3 * 48
    assert report.slim_padding == exported.padding and report.kept_neurons[::3] == widths == list(exported.kept)
    assert f"every layer has {max(widths)} hidden neurons, and {exported.padding:,} zero" in str(exported)


def test_widths_are_rounded_up(ids):
    model = gpt2()
    compress(model, KronyConfig("keep=0.5"), calibration=ids)
    expected = model(ids).logits
    exported = slim(model, multiple_of=64)
    assert exported.width == 128 and exported.padding == 3 * 32 * 2 * 48
    torch.testing.assert_close(exported.model(ids).logits, expected, rtol=1e-6, atol=1e-6)


LOGITS = """
import sys, torch
from transformers import AutoModelForCausalLM
ids, *folders = sys.argv[1:]
for folder in folders:
    model = AutoModelForCausalLM.from_pretrained(folder)
    torch.save(model(torch.load(ids)).logits, folder + "/logits.pt")
assert "krony" not in sys.modules
"""


def test_what_is_exported_loads_where_krony_is_not(ids, tmp_path):
    """One process for all, because it takes seconds until it has imported transformers."""
    torch.save(ids, tmp_path / "ids.pt")
    expected = {}
    for (family, build), form in itertools.product(BUILDERS.items(), ("slim", "dense")):
        compress(model := build(), KronyConfig("keep=0.5"), calibration=ids)
        folder = tmp_path / f"{family}-{form}"
        expected[folder] = model(ids).logits
        export_model(model, form).save_pretrained(folder)
    subprocess.run([sys.executable, "-c", LOGITS, tmp_path / "ids.pt", *expected], check=True, capture_output=True)
    for folder, logits in expected.items():
        torch.testing.assert_close(torch.load(folder / "logits.pt"), logits, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (KronyConfig("keep=0.5", init="van-loan"), r"all of them are used in transformer\.h\.0\.mlp\.c_proj"),
        (KronyConfig("keep=0.5", epsilon=0.1), r"all of them are used in transformer\.h\.0\.mlp\.c_proj"),
        (KronyConfig("keep=0.5", layers="odd"), r"nothing is compressed in transformer\.h\.0\.mlp\.c_proj"),
    ],
)
def test_where_slim_is_not_exact_a_sentence_says_why_and_nothing_changes(ids, config, words):
    model = gpt2()
    compress(model, config, calibration=ids)
    expected = model(ids).logits
    with pytest.raises(KronyError, match=words):
        export_model(model, "slim")
    assert torch.equal(model(ids).logits, expected) and model.config.quantization_config


def test_a_width_that_the_config_says_elsewhere(ids):
    """The shared expert of this one has a width of its own in the config."""
    config = Qwen2MoeConfig(
        vocab_size=256, hidden_size=16, intermediate_size=48, shared_expert_intermediate_size=32,
        moe_intermediate_size=8, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, num_experts=4,
        num_experts_per_tok=2, max_position_embeddings=64,
    )  # fmt: skip
    model = Qwen2MoeForCausalLM(config).eval()
    compress(model, KronyConfig("keep=0.5", init="magnitude"))
    expected = model(ids).logits
    with pytest.raises(KronyError, match=r"can't set the width of .*shared_expert.down_proj in the config: with inter"):
        export_model(model, "slim")
    assert torch.equal(model(ids).logits, expected)
    torch.testing.assert_close(export_model(model).float()(ids).logits, expected, rtol=1e-4, atol=1e-5)


def test_it_keeps_the_dtype_that_the_model_has_now(ids, tmp_path):
    """Not the one it was saved in, which its config remembers."""
    compress(made := gpt2(), KronyConfig("keep=0.5", init="van-loan"))
    made.to(torch.bfloat16).save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path).float()
    assert export_model(model).dtype == torch.float32
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert model.dequantize(dtype="float16").dtype == torch.float16


def test_mistakes(ids):
    model = gpt2()
    with pytest.raises(KronyError, match="plain already"):
        export_model(model, "slim")
    compress(model, KronyConfig("keep=0.5"), calibration=ids)
    with pytest.raises(KronyError, match="'tiny' is unknown: it is one of dense, slim"):
        export_model(model, "tiny")
    with pytest.raises(KronyError, match="multiple_of is 0"):
        slim(model, multiple_of=0)
    with pytest.raises(KronyError, match=r"keeps the 96 neurons that are used in .*, and rounded up they are all 192"):
        slim(model, multiple_of=192)


@pytest.mark.parametrize("to", ["dense", "slim"])
def test_a_model_with_adapters_says_to_take_them_off(to):
    from peft import LoraConfig, inject_adapter_in_model

    model = gpt2()
    compress(model, KronyConfig("keep=0.5", init="van-loan"))
    inject_adapter_in_model(LoraConfig(target_modules=["c_fc"]), model)
    with pytest.raises(KronyError, match="has adapters of PEFT on its layers"):
        export_model(model, to)


def test_another_quantisation_goes_on_top_of_an_export_only(ids, tmp_path):
    from transformers import QuantoConfig

    model = gpt2()
    compress(model, KronyConfig("keep=0.5"), calibration=ids)
    model.save_pretrained(tmp_path)
    with pytest.raises(
        ValueError, match="is quantized with KronyQuantizationConfig but you are passing a QuantoConfig"
    ):
        AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=QuantoConfig(weights="int8"))
