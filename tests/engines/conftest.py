"""llama.cpp, and models of the types that it runs, at random."""

import importlib.util
from pathlib import Path

import pytest
from transformers import Gemma3TextConfig, GPT2Config, LlamaConfig, Qwen2Config

import krony
from small_models import at_random

SIZES = {"num_hidden_layers": 7, "hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
SIZES |= {"intermediate_size": 160, "max_position_embeddings": 512, "initializer_range": 0.2}
WORDS = {"vocab_size": 4096, "bos_token_id": 0, "eos_token_id": 0}  # of the shipped model's tokenizer
LONG = {"rope_type": "llama3", "rope_theta": 1e4, "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
TYPES = {
    "gpt2": lambda: GPT2Config(
        n_layer=3, n_embd=64, n_head=4, n_positions=256, n_inner=96, initializer_range=0.2, **WORDS
    ),
    "llama": lambda: LlamaConfig(**SIZES, **WORDS),
    "llama, all options": lambda: LlamaConfig(
        **SIZES, **WORDS, head_dim=32, attention_bias=True, mlp_bias=True, tie_word_embeddings=True,
        rope_parameters=LONG | {"original_max_position_embeddings": 64},
    ),
    "qwen2": lambda: Qwen2Config(**SIZES, **WORDS),
    "gemma3": lambda: Gemma3TextConfig(
        **SIZES, **WORDS, head_dim=16, query_pre_attn_scalar=16, sliding_window=16, pad_token_id=0
    ),
}  # fmt: skip


@pytest.fixture(scope="session")
def words():
    """The shipped model's tokenizer."""
    return krony.load_tokenizer("demo")


@pytest.fixture
def of_type():
    """Builds a model of a type of ``TYPES``, with changes; norms and biases are random too."""

    def build(name: str, **changes: object):
        config = TYPES[name]()
        config.update(changes)
        return at_random(config)

    return build


@pytest.fixture
def llama_cpp():
    """Starts llama.cpp with a GGUF file, by the client that the benchmark uses too."""
    place = Path(__file__).parents[2] / "benchmarks/llama_cpp.py"
    spec = importlib.util.spec_from_file_location("llama_cpp", place)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return lambda file: module.LlamaCpp(file, threads=1, context=256)
