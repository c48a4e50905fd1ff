"""llama.cpp, and models of the types that it runs, at random."""

import json
import socket
import urllib.request

import pytest
import torch
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
    """Builds a model of a type of ``TYPES``; norms and biases are random too."""
    return lambda name: at_random(TYPES[name]())


class LlamaCpp:
    """llama.cpp with one model, asked through its own web interface; float32 wherever it lets one choose."""

    def __init__(self, file):
        import xllamacpp

        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        options = xllamacpp.CommonParams()
        options.model.path = str(file)
        options.port, options.n_ctx, options.n_parallel, options.n_gpu_layers = port, 256, 1, 0
        options.cpuparams.n_threads, options.verbosity, options.warmup = 1, -1, False
        options.cache_type_k = options.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
        options.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        self.server, self.address = xllamacpp.Server(options), f"http://127.0.0.1:{port}"

    def ask(self, path, **question):
        body, kind = json.dumps(question).encode(), {"Content-Type": "application/json"}
        with urllib.request.urlopen(urllib.request.Request(f"{self.address}/{path}", body, kind)) as answer:
            return json.loads(answer.read())

    def tokens(self, text):
        return self.ask("tokenize", content=text, add_special=True)["tokens"]

    def greedy(self, ids, count=64):
        how = {"temperature": 0, "n_predict": count, "ignore_eos": True, "cache_prompt": False}
        return self.ask("completion", prompt=ids, return_tokens=True, **how)["tokens"]

    def likely(self, ids, count=20):
        """The ids of the likeliest next tokens, and the logarithms of their probabilities."""
        answer = self.ask("completion", prompt=ids, n_predict=1, temperature=0, n_probs=count, ignore_eos=True)
        found = answer["completion_probabilities"][0]["top_logprobs"]
        return [one["id"] for one in found], torch.tensor([one["logprob"] for one in found])


@pytest.fixture
def llama_cpp():
    return LlamaCpp
