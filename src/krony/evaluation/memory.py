"""How much memory tensors take: a model's own, and the most that a call needs at one moment."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from krony.evaluation.workloads import empty_cache


def model_bytes(model: nn.Module) -> int:
    """Bytes of the parameters and buffers; tied ones count once.

    Examples:
        >>> model_bytes(nn.Linear(3, 2))
        32
    """
    tensors = [*model.parameters(), *model.buffers()]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


@torch.inference_mode()
def peak_bytes(model: PreTrainedModel, ids: Tensor) -> int:
    """The most bytes that tensors take during a prefill of ``ids``, ``(batch, length)``, in eval mode.

    Weights, activations, and tensors that layers cache for the tokens to come are included.
    """
    model.eval()
    options = {**empty_cache(model), "logits_to_keep": 1}
    return model_bytes(model) + peak_of(lambda: model(input_ids=ids, use_cache=True, **options), model.device)


def peak_of(call: Callable[[], Any], device: torch.device | str = "cpu") -> int:
    """The most bytes at one moment of the tensors that ``call`` makes.

    Examples:
        >>> peak_of(lambda: torch.empty(1000))
        4000
    """
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with _silenced(), torch.autograd.profiler.profile(profile_memory=True) as profile:
        call()
    results = profile.kineto_results
    assert results is not None
    events = sorted((e for e in results.events() if e.name() == "[memory]"), key=lambda event: event.start_ns())
    now = peak = 0
    for event in events:
        now += event.nbytes()
        peak = max(peak, now)
    return peak


@contextmanager
def _silenced() -> Iterator[None]:
    """Nothing reaches stderr, not even from C++: torch's profiler prints a message when it starts."""
    sys.stderr.flush()
    saved = os.dup(2)
    with Path(os.devnull).open("w") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)
