"""Loads and saves models and tokenizers by name."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from krony.models.source import ModelSource


def load_model(name: str | Path, *, dtype: str | torch.dtype = "auto", device: str = "cpu") -> PreTrainedModel:
    """Loads a causal LM in eval mode, dense or compressed, from safetensors only.

    Args:
        name: a folder, a hub name, or ``demo`` for the model that comes with krony.
        dtype: ``auto`` for the dtype it was saved in (``demo``: float32), or float32, bfloat16, float16, float64.
        device: a device name of torch; ``auto`` spreads the model over all devices.

    Raises:
        KronyError: no such model, no network, a damaged or incomplete file, or an architecture that isn't a causal LM.

    Examples:
        >>> model = load_model("demo")
        >>> sum(parameter.numel() for parameter in model.parameters())
        5918720
    """
    return ModelSource.find(str(name)).load(dtype=dtype, device=device)


def load_shapes(name: str | Path, *, dtype: str | torch.dtype = "auto") -> PreTrainedModel:
    """Makes a model of these shapes without values, on the meta device: no weight is read, and it can't run.

    For a script that heals with shards (``krony.heal(…, shard=True)``): only its first process needs the values.

    Args:
        name: as for ``load_model``.
        dtype: as for ``load_model``; ``auto`` is what the config says, or float32 if it says nothing.

    Raises:
        KronyError: no such model, or an architecture that isn't a causal LM.

    Examples:
        >>> sum(parameter.numel() for parameter in load_shapes("demo").parameters())
        5918720
    """
    return ModelSource.find(str(name)).shapes(dtype)


def load_tokenizer(name: str | Path) -> PreTrainedTokenizerBase:
    """Loads the tokenizer of a model: a folder, a hub name, or ``demo``. Raises KronyError if there is none.

    Examples:
        >>> len(load_tokenizer("demo"))
        4096
    """
    return ModelSource.find(str(name)).tokenizer


def demo_model() -> PreTrainedModel:
    """Loads the GPT-2 of six layers that comes with krony, in float32 and eval mode.

    ``load_tokenizer("demo")`` loads its tokenizer.
    """
    return load_model("demo")


def context_length(model: PreTrainedModel) -> int:
    """The number of tokens in the model's context; 1024 if its config gives none."""
    config = model.config.get_text_config()
    return int(getattr(config, "max_position_embeddings", None) or 1024)
