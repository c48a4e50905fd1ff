"""The dtype in which a model multiplies matrices: bfloat16 for a float32 model where that is faster."""

from __future__ import annotations

from contextlib import AbstractContextManager

import torch
from transformers import PreTrainedModel

from krony.runtime.hardware import fast_dtype


def product_dtype(model: PreTrainedModel, device: torch.device | str | None = None) -> torch.dtype:
    """The dtype of the model's matrix products on ``device``, by default its own."""
    return fast_dtype(device or model.device) if model.dtype == torch.float32 else model.dtype


def fast_products(model: PreTrainedModel) -> AbstractContextManager[None]:
    """Within it the products of a float32 model are in bfloat16 where that is fast; weights keep their dtype."""
    dtype = product_dtype(model)
    low = dtype in (torch.bfloat16, torch.float16)
    return torch.autocast(model.device.type, dtype if low else None, enabled=low)
