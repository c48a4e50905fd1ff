"""How long work takes, in seconds and in words."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch


def timed(device: torch.device, call: Callable[[], Any]) -> float:
    """Seconds that ``call`` takes, including its work on the GPU."""
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    wait()
    start = time.perf_counter()
    call()
    wait()
    return time.perf_counter() - start


def duration(seconds: float) -> str:
    """A time in words, with two digits or more.

    Examples:
        >>> duration(5400), duration(45.2), duration(0.2)
        ('90 minutes', '45 seconds', '1 second')
    """
    for size, unit in ((86_400, "days"), (3_600, "hours"), (60, "minutes")):
        if seconds >= 2 * size:
            return f"{seconds / size:,.{0 if seconds >= 10 * size else 1}f} {unit}"
    whole = max(1, round(seconds))
    return f"{whole} second{'s' * (whole > 1)}"
