"""Digests of the contents of models and texts, which a name or a number of tokens doesn't tell apart."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

OF_THE_FILE = ("_name_or_path", "transformers_version")  # in a config: where it comes from, not what the model computes


def model_digest(model: PreTrainedModel) -> str:
    """The digest of a model's config and of all its parameters and buffers, whatever it is called."""
    config = {key: value for key, value in model.config.to_dict().items() if key not in OF_THE_FILE}
    hashed = hashlib.blake2b(json.dumps(config, sort_keys=True, default=str).encode(), digest_size=16)
    for name, tensor in model.state_dict().items():
        hashed.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        hashed.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return hashed.hexdigest()


def token_digest(tokens: np.ndarray) -> str:
    """The digest of token ids ``(n,)``; a memory map is read to its end.

    Examples:
        >>> token_digest(np.array([0, 1, 2])) == token_digest(np.arange(3)) != token_digest(np.array([0, 2, 1]))
        True
    """
    return hashlib.blake2b(np.ascontiguousarray(tokens).view(np.uint8).data, digest_size=16).hexdigest()


def key(made_with: dict[str, Any]) -> str:
    """Ten hexadecimal digits that stand for everything a run depends on."""
    return hashlib.blake2b(json.dumps(made_with, sort_keys=True).encode(), digest_size=5).hexdigest()
