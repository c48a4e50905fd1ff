"""Small models of both families, and a tokenizer, built in a moment."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # no test reaches for the hub

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    LlamaConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

import krony  # noqa: F401  (registers the quantizer)


def gpt2(**changes) -> PreTrainedModel:
    """A GPT-2 at random: 3 layers, width 48, hidden width 192, biases that aren't zero."""
    options = {"n_layer": 3, "n_embd": 48, "n_head": 4, "n_positions": 64, "vocab_size": 257} | changes
    return _random(GPT2Config(bos_token_id=256, eos_token_id=256, **options))


def llama(**changes) -> PreTrainedModel:
    """A Llama at random with grouped queries and a tied head: 3 layers, width 48, hidden width 144."""
    options = {"num_hidden_layers": 3, "hidden_size": 48, "intermediate_size": 144, "num_attention_heads": 4}
    options |= {"num_key_value_heads": 2, "max_position_embeddings": 64, "vocab_size": 257, "tie_word_embeddings": True}
    return _random(LlamaConfig(bos_token_id=256, eos_token_id=256, **(options | changes)))


def _random(config) -> PreTrainedModel:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):  # zero in a new model: a lost bias would go unnoticed
                parameter.normal_(std=0.1)
    return model


BUILDERS = {"gpt2": gpt2, "llama": llama}


@pytest.fixture(params=list(BUILDERS))
def model(request) -> PreTrainedModel:
    return BUILDERS[request.param]()


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte, and the end of text: 257 of them."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<|endoftext|>", bos_token="<|endoftext|>")


@pytest.fixture(scope="session")
def gpt2_folder(tmp_path_factory, tokenizer):
    """A dense GPT-2 with its tokenizer, as a folder."""
    folder = tmp_path_factory.mktemp("models") / "gpt2"
    gpt2().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def ids() -> torch.Tensor:
    return torch.randint(0, 256, (2, 24), generator=torch.Generator().manual_seed(1))
