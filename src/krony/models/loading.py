"""Loading and saving models and tokenizers by name, in one line each."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

import torch
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from krony.errors import KronyError
from krony.models.source import ModelSource


def load_model(name: str, *, dtype: str | torch.dtype = "auto", device: str = "cpu") -> PreTrainedModel:
    """Loads a causal LM in eval mode, dense or compressed, from safetensors only.

    Args:
        name: a folder, a hub name, or ``demo`` for the model that comes with krony.
        dtype: ``auto`` for the dtype it was saved in (``demo``: float32), or float32, bfloat16, float16, float64.
        device: as torch names it; ``auto`` spreads the model over the devices there are.

    Raises:
        KronyError: no such model, no network, a damaged or incomplete file, an architecture that isn't a causal LM.
    """
    return ModelSource.find(name).load(dtype=dtype, device=device)


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """Loads the tokenizer of a model: a folder, a hub name, or ``demo``. Raises KronyError if there is none."""
    return ModelSource.find(name).tokenizer()


def load_config(name: str) -> PretrainedConfig:
    """The config of a model, without its weights. Raises KronyError."""
    return ModelSource.find(name).config


def demo_model() -> PreTrainedModel:
    """Loads the GPT-2 of six layers that comes with krony, in float32 and eval mode.

    ``load_tokenizer("demo")`` fits it.
    """
    return load_model("demo")


def save(model: PreTrainedModel, folder: Path, *, source: str) -> None:
    """Writes ``model`` with the tokenizer (chat template included) of ``source``, if it has one."""
    model.save_pretrained(folder)
    save_tokenizer(folder, source=source)


def save_tokenizer(folder: Path, *, source: str) -> None:
    """Writes the tokenizer of ``source``, if it has one."""
    with suppress(KronyError):
        load_tokenizer(source).save_pretrained(folder)


def context_length(model: PreTrainedModel) -> int:
    """The most tokens that the model takes at once."""
    config = model.config.get_text_config()
    return int(getattr(config, "max_position_embeddings", None) or 1024)
