"""The sound files that cases damage: models of two families, a compressed one, texts, a checkpoint, a cache."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import krony
from krony.compression.moments import Calibration
from krony.data.calibration_set import calibration_set
from krony.models.published_code import to_reference
from krony.models.surgery import find_groups
from small_models import gpt2, llama

TEXT = "All is well that ends well, and what begins well is half done.\n"
SMALL = {"n_layer": 2, "n_embd": 16, "n_head": 2, "n_positions": 64}


def build(home: Path) -> None:
    """Writes the files into the empty folder ``home``; less than half a megabyte."""
    tokenizer = _tokenizer()
    dense = gpt2(**SMALL)
    dense.save_pretrained(home / "dense", max_shard_size="20KB")
    llama(num_hidden_layers=2, hidden_size=16, intermediate_size=32, num_attention_heads=2).save_pretrained(
        home / "llama"
    )
    for name in ("dense", "llama", "compressed"):
        tokenizer.save_pretrained(home / name)
    _texts(home)
    _cache(home, dense, tokenizer)
    krony.compress(dense, krony.KronyConfig("keep=0.5", init="van-loan"))
    dense.save_pretrained(home / "compressed")
    torch.save(to_reference(dense), home / "checkpoint.pt")


def _tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte, the end of text, and a chat template."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    made = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<|endoftext|>", bos_token="<|endoftext|>")
    made.chat_template = "{{ messages }}"
    return made


def _texts(home: Path) -> None:
    (home / "text.txt").write_text(TEXT * 30)
    lines = [json.dumps({"text": f"{number}. {TEXT * 4}"}) for number in range(24)]
    (home / "lines.jsonl").write_text("\n".join(lines) + "\n")
    (home / "one.json").write_text(json.dumps([{"text": TEXT * 8}] * 12))


def _cache(home: Path, dense: torch.nn.Module, tokenizer: PreTrainedTokenizerFast) -> None:
    """The second moments that ``compress --calibration text.txt`` keeps for the dense model."""
    from krony.models.loading import load_model

    ids = calibration_set(str(home / "text.txt"), tokenizer, length=64, seed=0)
    loaded = load_model(str(home / "dense"))
    list(Calibration(loaded, find_groups(loaded), ids, cache=home / "cache"))
