"""The optimiser and schedule of the short descents after a start: ``reconstruct`` and ``tune``."""

from __future__ import annotations

import torch
from torch import nn


def relative_adamw(
    parameters: list[nn.Parameter], *, rate: float, warm_up: float, steps: int
) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
    """AdamW for a short descent, and its schedule: up for a share of the steps, then down to nothing.

    Rates are relative to the root mean square of what they change, so that a model's units don't matter.
    """
    rates = [rate * (p.detach().square().mean().sqrt().item() or 1.0) for p in parameters]
    groups = [{"params": [p], "lr": own} for p, own in zip(parameters, rates, strict=True)]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), weight_decay=0.0)
    total = max(steps, 2)
    rising = max(warm_up, 1.5 / total)  # the schedule divides by what is left of these steps after the first
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, rates, total_steps=total, pct_start=rising, cycle_momentum=False
    )
    return optimizer, schedule
