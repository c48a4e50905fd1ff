"""The optimiser of the short descents: rates relative to what they change, and the schedule."""

import pytest
import torch
from torch import nn

from krony.compression.descent import relative_adamw


def parameters() -> list[nn.Parameter]:
    torch.manual_seed(0)
    return [nn.Parameter(torch.randn(8, 8)), nn.Parameter(100 * torch.randn(4)), nn.Parameter(torch.zeros(3))]


def test_rates_are_relative_to_the_root_mean_square():
    some = parameters()
    optimizer, _ = relative_adamw(some, rate=0.01, warm_up=0.25, steps=20)
    highest = [group["max_lr"] for group in optimizer.param_groups]
    sizes = [p.detach().square().mean().sqrt().item() for p in some]
    assert highest == pytest.approx([0.01 * sizes[0], 0.01 * sizes[1], 0.01])  # zeros: the rate itself
    assert all(group["weight_decay"] == 0 for group in optimizer.param_groups)


@pytest.mark.parametrize("steps", [1, 2, 20])
def test_the_rate_rises_and_falls_to_nothing(steps):
    some = parameters()
    optimizer, schedule = relative_adamw(some, rate=0.01, warm_up=0.25, steps=steps)
    rates = []
    for _ in range(steps):
        sum(p.sum() for p in some).backward()
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    highest = optimizer.param_groups[0]["max_lr"]
    assert max(rates) <= highest and min(rates) > 0
    if steps == 20:
        assert rates.index(max(rates)) in (4, 5) and optimizer.param_groups[0]["lr"] < 0.02 * highest


def test_the_units_of_a_model_do_not_matter():
    """Weights a hundred times as large move a hundred times as far."""
    moved = []
    for scale in (1.0, 100.0):
        weight = nn.Parameter(scale * parameters()[0].detach())
        before = weight.detach().clone()
        optimizer, schedule = relative_adamw([weight], rate=0.01, warm_up=0.25, steps=5)
        for _ in range(5):
            optimizer.zero_grad()
            (weight / scale).square().sum().backward()
            optimizer.step()
            schedule.step()
        moved.append((weight.detach() - before) / scale)
    torch.testing.assert_close(*moved, rtol=1e-4, atol=1e-6)
