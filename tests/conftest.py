"""What most tests need: a small model of each family, a tokenizer, and a folder with both."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # no test reaches for the hub

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedModel, PreTrainedTokenizerFast

import krony  # noqa: F401  (registers the quantizer)
from small_models import BUILDERS, gpt2


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    """No test finds what another kept."""
    monkeypatch.setenv("KRONY_CACHE", str(tmp_path_factory.mktemp("cache")))


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
