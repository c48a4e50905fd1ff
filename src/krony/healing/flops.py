"""How much of the machine a training uses: achieved FLOP/s, and their share of the peak where that is known."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedModel

from krony.models.modes import evaluating
from krony.models.precision import fast_products

# Peak of dense bfloat16 products in FLOP/s, by a part of the device's name: NVIDIA's data sheets.
PEAKS = {"H100 80GB HBM3": 989e12, "H200": 989e12, "A100": 312e12, "L40S": 362e12}

ON_CPU = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu  # torch's counter knows those of GPUs alone


@torch.no_grad()
def forward_flops(model: PreTrainedModel, length: int) -> int:
    """FLOPs of a forward pass over one row of ``length`` tokens: two per multiplication and addition.

    The products that are run are counted, so a sum of Kronecker products counts what its forward path takes.
    """
    ids = torch.zeros(1, length, dtype=torch.long, device=model.device)
    counting = FlopCounterMode(display=False, custom_mapping={ON_CPU: _attention})
    with evaluating(model), fast_products(model), counting as counter:
        model(input_ids=ids, use_cache=False)
    return int(counter.get_total_flops())


def training_flops(model: PreTrainedModel, teacher: PreTrainedModel | None, length: int) -> float:
    """FLOPs per trained token: a forward pass, a backward pass of twice as many, and the teacher's forward pass."""
    taught = 0 if teacher is None else forward_flops(teacher, length)
    return (3 * forward_flops(model, length) + taught) / length


def peak(device: torch.device, *, bf16: bool) -> float | None:
    """The peak FLOP/s of a device; None where it isn't known, as for a CPU or products in float32."""
    if device.type != "cuda" or not bf16:
        return None
    name = torch.cuda.get_device_name(device)
    return next((flops for part, flops in PEAKS.items() if part in name), None)


def _attention(query: tuple[int, ...], key: tuple[int, ...], value: tuple[int, ...], *_: Any, **__: Any) -> int:
    """FLOPs of scores and sums, of all pairs of tokens; shapes ``(batch, heads, tokens, head_dim)``."""
    batch, heads, tokens, width = query
    return 2 * batch * heads * tokens * key[2] * (width + value[3])
