"""Digests of what a model computes: its config and its weights, whatever it is called and wherever it lies."""

from __future__ import annotations

import hashlib
import json

import torch
from transformers import PretrainedConfig, PreTrainedModel

OF_THE_FILE = ("_name_or_path", "transformers_version")  # in a config: where it comes from, not what the model computes


def model_digest(model: PreTrainedModel) -> str:
    """The digest of a model's config and of all its parameters and buffers."""
    hashed = hashlib.blake2b(config_digest(model.config).encode(), digest_size=16)
    for name, tensor in model.state_dict().items():
        hashed.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        hashed.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return hashed.hexdigest()


def config_digest(config: PretrainedConfig) -> str:
    """The digest of a config: equal weights compute something else with another activation or other positions.

    Examples:
        >>> from transformers import GPT2Config
        >>> config_digest(GPT2Config()) == config_digest(GPT2Config(activation_function="relu"))
        False
    """
    settings = {key: value for key, value in config.to_dict().items() if key not in OF_THE_FILE}
    return hashlib.blake2b(json.dumps(settings, sort_keys=True, default=str).encode(), digest_size=16).hexdigest()
