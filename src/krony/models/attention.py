"""The implementation of attention that is fastest for a training."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from transformers import PreTrainedModel

LONGEST = 1024  # tokens per row: the eager implementation takes memory that grows with their square


@contextmanager
def fast_attention(
    *models: PreTrainedModel | None, device: torch.device | str, length: int, dtype: torch.dtype
) -> Iterator[None]:
    """Within it the models compute attention as is fastest for rows of ``length`` tokens and products in ``dtype``.

    On CPUs torch's own implementation (``sdpa``) does not use the processor's bfloat16 products, and takes more than
    twice the time of transformers' plain matrix products (``eager``). Elsewhere, and for long rows, nothing changes.
    """
    slow = torch.device(device).type == "cpu" and dtype == torch.bfloat16 and length <= LONGEST
    with ExitStack() as stack:
        for model in models if slow else ():
            if model is not None:
                stack.enter_context(_eager(model))
        yield


@contextmanager
def _eager(model: PreTrainedModel) -> Iterator[None]:
    before = model.config._attn_implementation
    if before != "sdpa":
        yield
        return
    model.set_attn_implementation("eager")
    try:
        yield
    finally:
        model.set_attn_implementation(before)
