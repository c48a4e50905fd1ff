"""The dtypes of a model: that in which it multiplies matrices, and that of its weights while it trains."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

import torch
from torch import nn
from transformers import PreTrainedModel

from krony.runtime.hardware import fast_dtype

HALF = (torch.bfloat16, torch.float16)


def product_dtype(model: PreTrainedModel, device: torch.device | str | None = None) -> torch.dtype:
    """The dtype of the model's matrix products on ``device``, by default its own."""
    return fast_dtype(device or model.device) if model.dtype == torch.float32 else model.dtype


def fast_products(model: PreTrainedModel) -> AbstractContextManager[None]:
    """Within it the products of a float32 model are in bfloat16 where that is fast; weights keep their dtype."""
    dtype = product_dtype(model)
    low = dtype in HALF
    return torch.autocast(model.device.type, dtype if low else None, enabled=low)


@contextmanager
def full_precision(model: nn.Module) -> Iterator[dict[str, torch.dtype]]:
    """Converts half-precision weights to float32, and at the end back to their own dtypes, which it gives by name.

    A step of AdamW is smaller than the spacing of bfloat16 numbers, so most weights would never move.
    """
    tensors = itertools.chain(model.named_parameters(), model.named_buffers())
    halves = {name: tensor for name, tensor in tensors if tensor.dtype in HALF}
    dtypes = {name: tensor.dtype for name, tensor in halves.items()}
    try:
        for tensor in halves.values():
            tensor.data = tensor.data.float()
        yield dtypes
    finally:
        for name, tensor in halves.items():
            tensor.data = tensor.data.to(dtypes[name])


@torch.no_grad()
def round_weights(model: nn.Module, dtypes: dict[str, torch.dtype]) -> None:
    """Gives float32 parameters the values that they have in ``dtypes``; those without a name there stay."""
    for name, parameter in model.named_parameters():
        if name in dtypes:
            parameter.copy_(parameter.to(dtypes[name]))
