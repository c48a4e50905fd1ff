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


@torch.no_grad()
def forward_flops(model: PreTrainedModel, length: int) -> int:
    """FLOPs of a forward pass over one row of ``length`` tokens: two per multiplication and addition.

    The products that are run are counted, so a sum of Kronecker products counts what its forward path takes.
    """
    ids = torch.zeros(1, length, dtype=torch.long, device=model.device)
    with evaluating(model), fast_products(model), flop_counter() as counter:
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


def flop_counter() -> FlopCounterMode:
    """torch's counter, which knows its own attention on GPUs alone, and here on CPUs too.

    All pairs of tokens count, and backward twice what they do forward: what is computed again is not counted.
    """
    forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
    return FlopCounterMode(
        display=False,
        custom_mapping={forward: _attention, backward: lambda _, *shapes, **__: 2 * _attention(*shapes[:3])},
    )


def _attention(query: tuple[int, ...], key: tuple[int, ...], value: tuple[int, ...], *_: Any, **__: Any) -> int:
    """FLOPs of scores and sums; shapes ``(batch, heads, tokens, head_dim)``."""
    batch, heads, tokens, width = query
    return 2 * batch * heads * tokens * key[2] * (width + value[3])
