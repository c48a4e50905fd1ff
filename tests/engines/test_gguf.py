"""GGUF files in llama.cpp: the same tokens of a text, the same probabilities, and the same 64 greedy tokens."""

import gguf
import pytest
import torch
from transformers import GPT2Config, LlamaConfig, MistralConfig, Qwen2Config

import krony
from krony import KronyConfig, KronyError
from krony.engines.gguf import KINDS, hidden_widths, write_gguf
from krony.engines.plain import plain
from krony.models.surgery import count_parameters
from small_models import at_random

from .conftest import SIZES, TYPES, WORDS

GELU = ("gpt2", "gemma3")  # their activation is a table in float16 in llama.cpp, so their tolerance is larger
TEXT = "The function returns a list of 12345 items.\n\n  Don't  "


def probabilities(model, ids):
    """The logarithms of the next token's, ``(vocabulary,)``."""
    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0, -1].double().log_softmax(-1)


def likeliest(engine, ids, count=20):
    """The ids of the engine's likeliest next tokens, and the logarithms of their probabilities."""
    answer = engine.ask("completion", prompt=ids, n_predict=1, temperature=0, n_probs=count, ignore_eos=True)
    found = answer["completion_probabilities"][0]["top_logprobs"]
    return [one["id"] for one in found], torch.tensor([one["logprob"] for one in found])


def check(model, tokenizer, engine, tolerance, tokens=64):
    """The engine has the model's tokens, probabilities and continuation."""
    ids = tokenizer(TEXT)["input_ids"]
    assert engine.tokens(TEXT) == ids
    expected = model.generate(torch.tensor([ids]), max_new_tokens=64, min_new_tokens=64, do_sample=False)
    found = engine.greedy(ids, 64)["tokens"]
    assert len(found) == 64 and found[:tokens] == expected[0, len(ids) :].tolist()[:tokens]
    for new in (0, 40):  # the longer text goes beyond Gemma's window
        seen = [*ids, *found[:new]]
        likely, logarithms = likeliest(engine, seen)
        torch.testing.assert_close(logarithms.double(), probabilities(model, seen)[likely], rtol=0, atol=tolerance)


@pytest.mark.parametrize("name", TYPES)
def test_every_type_gives_the_same_tokens(name, of_type, words, llama_cpp, tmp_path):
    model = of_type(name)
    write_gguf(model, words, tmp_path / "m.gguf", "f32")
    check(model, words, llama_cpp(tmp_path / "m.gguf"), tolerance=1e-2 if name in GELU else 2e-4)


def test_a_file_that_llama_cpp_does_not_load_is_an_error(llama_cpp, tmp_path):
    (tmp_path / "m.gguf").write_bytes(b"GGUF")
    with pytest.raises(RuntimeError, match="doesn't load"):
        llama_cpp(tmp_path / "m.gguf")


def test_a_llama_keeps_a_width_per_layer(of_type, words, llama_cpp, tmp_path):
    model, ids = of_type("llama"), torch.randint(0, 4096, (24, 64), generator=torch.Generator().manual_seed(1))
    krony.compress(model, KronyConfig("keep=0.5", allocation="global"), calibration=ids)
    expected = model(ids[:1]).logits
    made, how = plain(model, padded=False)
    widths = hidden_widths(made)
    assert len(set(widths)) > 1 and max(widths) == 160 and f"{min(widths)} to {max(widths)}" in how
    torch.testing.assert_close(made(ids[:1]).logits, expected, rtol=1e-4, atol=1e-4)
    write_gguf(made, words, tmp_path / "m.gguf", "f32")
    check(made, words, llama_cpp(tmp_path / "m.gguf"), tolerance=2e-4)
    write_gguf(of_type("llama"), words, tmp_path / "dense.gguf", "f32")
    saved = (tmp_path / "dense.gguf").stat().st_size - (tmp_path / "m.gguf").stat().st_size
    assert abs(saved - sum(160 - width for width in widths) * 3 * 64 * 4) < 8192  # metadata


@pytest.mark.parametrize(("kind", "tolerance", "bits"), [("f16", 0.02, 16), ("bf16", 0.2, 16), ("q8_0", 0.5, 8.5)])
def test_fewer_bits_are_close(kind, tolerance, bits, words, llama_cpp, tmp_path):
    model = krony.demo_model()
    write_gguf(model, words, tmp_path / "m.gguf", kind)
    check(model, words, llama_cpp(tmp_path / "m.gguf"), tolerance, tokens=4)
    matrices = sum(p.numel() for p in model.parameters() if p.ndim == 2) - 512 * 256  # positions stay in float32
    rest = 4 * (count_parameters(model) - matrices)
    assert abs((tmp_path / "m.gguf").stat().st_size - matrices * bits / 8 - rest) < 150_000  # metadata


@pytest.mark.parametrize(
    ("config", "words_of_it"),
    [
        (MistralConfig(**SIZES, **WORDS), "export to gguf writes models of the types gpt2, llama, qwen2, gemma3_text"),
        (LlamaConfig(**SIZES, **WORDS, hidden_act="gelu"), "has hidden_act silu, and this one gelu"),
        (
            GPT2Config(n_layer=1, n_embd=64, n_head=4, activation_function="relu", **WORDS),
            "activation_function gelu_new",
        ),
        (
            GPT2Config(n_layer=1, n_embd=64, n_head=4, scale_attn_by_inverse_layer_idx=True, **WORDS),
            "has scale_attn_by_inverse_layer_idx False, and this one True",
        ),
        (
            Qwen2Config(**SIZES, **WORDS, rope_parameters={"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}),
            "writes qwen2 models with rope_type default, and this one has linear",
        ),
    ],
)
def test_what_llama_cpp_would_compute_otherwise_is_refused(config, words_of_it, words, tmp_path):
    with pytest.raises(KronyError, match=words_of_it):
        write_gguf(at_random(config), words, tmp_path / "m.gguf")


def test_weights_that_float16_can_not_hold(of_type, words, tmp_path):
    model = of_type("gpt2")
    model.transformer.h[0].mlp.c_fc.weight.data[0, 0] = 1e5
    with pytest.raises(KronyError, match=r"blk\.0\.ffn_up\.weight has weights up to 1e\+05, .* use bf16"):
        write_gguf(model, words, tmp_path / "m.gguf", "f16")


def test_layers_of_several_widths_where_there_is_one(words, tmp_path):
    model, ids = krony.demo_model(), torch.randint(0, 4096, (24, 64), generator=torch.Generator().manual_seed(1))
    krony.compress(model, KronyConfig("keep=0.5", allocation="global"), calibration=ids)
    with pytest.raises(KronyError, match=r"llama.cpp's gpt2 has one hidden width, and these layers have \["):
        write_gguf(plain(model, padded=False)[0], words, tmp_path / "m.gguf")


def test_gemmas_norms_are_exact(of_type, words, tmp_path):
    """It adds one to them in float32, whatever they are stored in; so do files in every type."""
    model = of_type("gemma3").bfloat16()
    write_gguf(model, words, tmp_path / "m.gguf", "f32")
    stored = {one.name: one.data for one in gguf.GGUFReader(tmp_path / "m.gguf").tensors}
    expected = model.model.layers[1].input_layernorm.weight.detach().float() + 1
    assert torch.equal(torch.tensor(stored["blk.1.attn_norm.weight"]), expected)
    assert not torch.equal(expected, expected.bfloat16().float())


def test_kinds():
    assert list(KINDS) == ["f32", "f16", "bf16", "q8_0"]
    with pytest.raises(KronyError, match="GGUF type 'q4' is unknown: it is one of f32, f16"):
        write_gguf(None, None, None, "q4")
