"""The optimiser and schedule of the short trainings after an initialisation: ``reconstruct`` and ``tune``."""

from __future__ import annotations

import torch
from torch import nn


def relative_adamw(
    parameters: list[nn.Parameter], *, rate: float, warm_up: float, steps: int
) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
    """AdamW and its schedule for a short training: the rate rises for a share of the steps, then falls to near zero.

    Args:
        rate: the highest learning rate, relative to the root mean square of each parameter, so that the units of a
            model don't matter.
        warm_up: the share of the steps in which the rate rises, from 0 to 1.
        steps: the number of steps.
    """
    rates = [rate * (p.detach().square().mean().sqrt().item() or 1.0) for p in parameters]
    groups = [{"params": [p], "lr": own} for p, own in zip(parameters, rates, strict=True)]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    total = max(steps, 2)
    rising = max(warm_up, 1.5 / total)  # OneCycleLR divides by the number of rising steps less one
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, rates, total_steps=total, pct_start=rising, cycle_momentum=False
    )
    return optimizer, schedule
