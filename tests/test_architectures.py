"""The same door for every architecture: each is built from its config at random, and is a row of the page in docs."""

from pathlib import Path

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM

from krony import KronyConfig, KronyError, compress
from krony.models.comparison import Comparison, plain_heads
from krony.models.divergence import Goal, divergence
from krony.models.export import slim
from krony.models.fast_training import fast_training
from krony.models.loading import load_model
from krony.models.source import ModelSource
from krony.models.surgery import find_groups, kronecker_layers, layer_index, plain_config, take_out
from krony.streaming.plan import prepare
from krony.streaming.stream import run

PAGE = Path(__file__).parents[1] / "docs/architectures.md"
LLAMA_LIKE = {
    "num_hidden_layers": 2,
    "hidden_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 144,
    "max_position_embeddings": 64,
    "head_dim": 12,
}
GPT_LIKE = {"num_hidden_layers": 2, "hidden_size": 48, "num_attention_heads": 4, "max_position_embeddings": 64}
# name -> config class and options, beside a vocabulary of 257
WORK = {
    "GPT-2": ("GPT2Config", {"n_layer": 2, "n_embd": 48, "n_head": 4, "n_positions": 64}),
    "GPT-Neo": (
        "GPTNeoConfig",
        {
            "num_layers": 2,
            "hidden_size": 48,
            "num_heads": 4,
            "attention_types": [[["global", "local"], 1]],
            "max_position_embeddings": 64,
            "window_size": 8,
        },
    ),
    "GPT-NeoX": ("GPTNeoXConfig", GPT_LIKE | {"intermediate_size": 192}),
    "GPT-J": ("GPTJConfig", {"n_layer": 2, "n_embd": 48, "n_head": 4, "n_positions": 64, "rotary_dim": 4}),
    "OPT": ("OPTConfig", GPT_LIKE | {"ffn_dim": 192, "word_embed_proj_dim": 48}),
    "BLOOM": ("BloomConfig", {"n_layer": 2, "hidden_size": 48, "n_head": 4}),
    "Llama": ("LlamaConfig", LLAMA_LIKE),
    "Mistral": ("MistralConfig", LLAMA_LIKE | {"sliding_window": 8}),
    "Qwen2": ("Qwen2Config", LLAMA_LIKE),
    "Qwen3": ("Qwen3Config", LLAMA_LIKE),
    "Gemma": ("GemmaConfig", LLAMA_LIKE),
    "Gemma 2": ("Gemma2Config", LLAMA_LIKE | {"sliding_window": 8}),
    "Gemma 3": ("Gemma3TextConfig", LLAMA_LIKE | {"sliding_window": 8}),
    "Phi": ("PhiConfig", GPT_LIKE | {"intermediate_size": 192}),
    "StarCoder 2": ("Starcoder2Config", LLAMA_LIKE),
    "OLMo 2": ("Olmo2Config", LLAMA_LIKE),
}
NOT_SLIM = {"BLOOM": "no: its config has no hidden width"}
REFUSED = {
    "Phi-3": (
        ("Phi3Config", LLAMA_LIKE | {"pad_token_id": 0}),
        r"model\.layers\.0\.mlp\.gate_up_proj holds the gate and the up matrix in one",
        "gate_up_proj|down_proj",
    ),
    "Mixtral": (
        ("MixtralConfig", LLAMA_LIKE | {"num_local_experts": 4}),
        r"model\.layers\.0\.mlp\.experts holds the matrices of all its experts in one tensor \(gate_up_proj\)",
        "o_proj",
    ),
    "Qwen3-MoE": (
        ("Qwen3MoeConfig", LLAMA_LIKE | {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48}),
        r"model\.layers\.0\.mlp\.experts holds the matrices of all its experts in one tensor \(gate_up_proj\)",
        "o_proj",
    ),
}


def built(kind: str, options: dict):
    config = getattr(transformers, kind)(
        vocab_size=257, bos_token_id=256, eos_token_id=256, **{"pad_token_id": 256} | options
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.1)
    return model


def rows(heading: str) -> dict[str, list[str]]:
    """The table under a heading of the page: first cell -> the others."""
    part = PAGE.read_text(encoding="utf-8").split(f"## {heading}\n")[1].split("\n## ")[0]
    lines = [line.strip("|").split(" | ") for line in part.splitlines() if line.startswith("|")][2:]
    return {cells[0].strip(): [cell.strip() for cell in cells[1:]] for cells in lines}


@pytest.mark.parametrize("name", list(WORK))
def test_the_gradient_layer_by_layer_is_that_of_the_model(name, tmp_path):
    """An allocation by the gradient of the loss streams to the same tensors, whatever follows the last layer."""
    model = built(*WORK[name])
    take_out(model, find_groups(model)[1].sites[-1].name)[0][:, 12:] *= 1e-3  # the second layer needs fewer neurons
    model.save_pretrained(tmp_path / "source")
    config = KronyConfig("keep=0.5", init="neurons", allocation="global")
    text = torch.randint(0, 256, (12, 32), generator=torch.Generator().manual_seed(3))
    compress(model, config, calibration=text)
    assert len({layer.shape.factors for layer in kronecker_layers(model).values()}) == 2
    run(prepare(ModelSource.find(str(tmp_path / "source")), config), tmp_path / "stream", calibration=text)
    streamed = load_model(str(tmp_path / "stream")).state_dict()
    assert set(streamed) == set(model.state_dict())
    assert all(torch.equal(streamed[key], value) for key, value in model.state_dict().items())


@pytest.mark.parametrize("name", list(WORK))
def test_an_architecture_works(name, ids, tmp_path):
    """Logits are those of the multiplied-out model; saved, loaded, generated from; neurons exports slim; streams."""
    model = built(*WORK[name])
    before = model(ids).logits.detach()
    model.save_pretrained(tmp_path / "source")
    sites = find_groups(model)[0].sites
    kind = f"`{type(model).__name__}`"
    cells = [kind, ", ".join(f"`{s.name.rpartition('.')[2]}`" for s in sites)]
    assert rows("Architectures")[name] == [*cells, NOT_SLIM.get(name, "yes")]

    config = KronyConfig("keep=0.5", init="neurons")
    text = torch.randint(0, 256, (12, 32), generator=torch.Generator().manual_seed(3))
    compress(model, config, calibration=text)
    logits = model(ids).logits.detach()
    assert not torch.allclose(logits, before, atol=1e-4)
    layers = kronecker_layers(model)
    assert {layer_index(n) for n in layers} == {0, 1} and len(layers) == 2 * len(sites)

    model.save_pretrained(tmp_path / "saved")
    loaded = load_model(str(tmp_path / "saved"))
    assert torch.equal(loaded(ids).logits, logits)
    start = ids[:1, :8]
    assert loaded.generate(start, max_new_tokens=4, min_new_tokens=4, do_sample=False).shape == (1, 12)

    run(prepare(ModelSource.find(str(tmp_path / "source")), config), tmp_path / "stream", calibration=text)
    assert torch.equal(load_model(str(tmp_path / "stream"))(ids).logits, logits)

    dense = load_model(str(tmp_path / "saved")).dequantize()
    assert not kronecker_layers(dense)
    torch.testing.assert_close(dense(ids).logits, logits, rtol=1e-4, atol=1e-5)

    if name in NOT_SLIM:
        with pytest.raises(KronyError, match="has no hidden width in its config"):
            slim(load_model(str(tmp_path / "saved")))
        return
    thin = slim(load_model(str(tmp_path / "saved")))
    assert thin.width == sites[-1].in_features // 2
    thin.model.save_pretrained(tmp_path / "slim")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "slim")
    torch.testing.assert_close(plain(ids).logits, logits, rtol=1e-4, atol=1e-5)


MORE_THAN_A_HEAD = {"Gemma 2"}  # caps its logits


@pytest.mark.parametrize("name", list(WORK))
def test_a_student_is_compared_from_its_states_and_with_eager_attention(name, ids, monkeypatch):
    """The loss is the divergence of the logits, and the implementation of attention changes rounding alone."""
    monkeypatch.setattr("krony.models.fast_training._in_bfloat16", lambda *_: True)
    monkeypatch.setattr("krony.models.fast_training.has_tiles", lambda: False)
    monkeypatch.setattr("krony.models.fast_training.product_weights", lambda _: [])
    teacher, student = built(*WORK[name]), built(*WORK[name])
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    logits = [model(ids).logits for model in (student, teacher)]
    comparison = Comparison(plain_heads(student, teacher))
    assert (comparison.heads is None) == (name in MORE_THAN_A_HEAD)
    before = [model.config._attn_implementation for model in (student, teacher)]
    with fast_training(student, teacher, device="cpu", length=ids.shape[1]):
        assert {model.config._attn_implementation for model in (student, teacher)} == {"eager"}
        with comparison.headless():
            loss = comparison.loss(*(model(ids).logits for model in (student, teacher)), Goal(2.0))
    torch.testing.assert_close(loss, divergence(*logits, Goal(2.0)), rtol=1e-4, atol=1e-6)
    assert loss > 1e-3 and [model.config._attn_implementation for model in (student, teacher)] == before


@pytest.mark.parametrize("name", list(REFUSED))
def test_what_can_not_be_told_apart_names_the_module_and_why(name, ids, tmp_path):
    recipe, words, modules = REFUSED[name]
    model = built(*recipe)
    with pytest.raises(KronyError, match=words):
        compress(model, KronyConfig("keep=0.5", init="van-loan"))
    assert plain_config(model).to_dict() == model.config.to_dict()
    compress(model, KronyConfig("keep=0.5", init="van-loan", modules=modules))  # what the sentence proposes
    logits = model(ids).logits.detach()
    model.save_pretrained(tmp_path)
    assert torch.equal(load_model(str(tmp_path))(ids).logits, logits)
    escaped = modules.replace("|", r"\|")  # as a cell of a table has it
    assert rows("What is refused")[name][:2] == [f"`{type(model).__name__}`", f"`--modules '{escaped}'`"]


def test_the_page_has_these_rows_and_no_others():
    assert list(rows("Architectures")) == list(WORK)
    assert list(rows("What is refused")) == list(REFUSED)
