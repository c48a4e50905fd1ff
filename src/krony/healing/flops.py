"""How much of the machine a training uses: achieved FLOP/s, and their share of the peak where that is known."""

from __future__ import annotations

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
    with evaluating(model), fast_products(model), FlopCounterMode(display=False) as counter:
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
