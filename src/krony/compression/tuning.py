"""A short training of all compressed layers together, towards what the original predicts on the calibration text.

Training each MLP by itself (``reconstruction``) can't tell which of its errors the layers above make good, or make
worse. Here the loss is the divergence of the compressed model's next-token distributions from the original's, and its
gradient reaches every layer. No word of the text is learnt: the original alone says what is right. Only the left
factors, scalars and biases of the compressed layers move; right factors stay, so that neurons that were dropped stay
dropped.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from krony.compression.descent import relative_adamw
from krony.models.divergence import divergence
from krony.models.modes import evaluating
from krony.models.surgery import kronecker_layers
from krony.runtime.hardware import fast_dtype
from krony.runtime.progress import Progress, silent

RATE = 1e-3  # the highest, relative to the root mean square of what is trained
WARM_UP = 0.2  # of the steps
HELD_OUT = 8  # sequences at most that it is judged by, and an eighth of all at most
CLIP = 1.0  # norm of the gradient, nats


@dataclass(frozen=True)
class Tuned:
    """What it gave: the divergence from the original, nats a token, on sequences that were not trained on."""

    before: float
    after: float
    steps: int


def tune(
    model: PreTrainedModel,
    original: PreTrainedModel,
    ids: Tensor,
    *,
    steps: int,
    seed: int = 0,
    progress: Progress = silent,
) -> Tuned:
    """Trains the compressed layers of ``model`` in place, a sequence a step; the layers keep their dtype.

    If that did not bring the model nearer to the original on the held-out sequences it is left as it was.

    Args:
        original: the model that it was compressed from, in eval mode; stays as it is.
        ids: token ids ``(sequences, length)``; a lone sequence is trained on and judged by.
    """
    layers = list(kronecker_layers(model).values())
    dtypes = [layer.weight.dtype for layer in layers]
    order = torch.randperm(len(ids), generator=torch.Generator().manual_seed(seed))
    count = min(HELD_OUT, max(1, len(ids) // 8))
    held, trained = ids[order[:count]], ids[order[count:]] if len(ids) > 1 else ids
    with torch.no_grad(), _training(model, layers) as parameters:
        first = [p.clone() for p in parameters]
        wanted = [_logits(original, row[None]) for row in held]
        before = _mean(model, held, wanted)
        with torch.enable_grad():
            _descend(model, original, parameters, trained, steps, progress)
        after = _mean(model, held, wanted)
        if not after < before:
            for parameter, value in zip(parameters, first, strict=True):
                parameter.copy_(value)
            after = before
    for layer, dtype in zip(layers, dtypes, strict=True):
        layer.to(dtype)
    return Tuned(before, after, steps)


@contextlib.contextmanager
def _training(model: PreTrainedModel, layers: list) -> Iterator[list[nn.Parameter]]:
    """The compressed layers in float32, and only they with gradients; dropout is off."""
    for layer in layers:
        layer.float()
    parameters = [p for layer in layers for p in (layer.weight, layer.scalars, layer.bias) if p is not None]
    with evaluating(model):
        try:
            for parameter in parameters:
                parameter.requires_grad_(True)
            yield parameters
        finally:
            model.zero_grad()


def _descend(
    model: PreTrainedModel, original: PreTrainedModel, parameters: list[nn.Parameter], ids: Tensor, steps: int,
    progress: Progress,
) -> None:  # fmt: skip
    """A sequence a step, in turn."""
    optimizer, schedule = relative_adamw(parameters, rate=RATE, warm_up=WARM_UP, steps=steps)
    for step in range(steps):
        row = ids[step % len(ids)][None]  # (1, length)
        with torch.no_grad():
            wanted = _logits(original, row)
        loss = divergence(_logits(model, row), wanted)
        progress(step, steps, f"all layers together, {loss.item():.2f} nats from the original")
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, CLIP)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()


def _logits(model: PreTrainedModel, ids: Tensor) -> Tensor:
    """``(1, length) -> (1, length, vocabulary)``; products in the model's dtype, or in bfloat16 where that is fast."""
    low = fast_dtype(model.device) if model.dtype == torch.float32 else model.dtype
    halved = low in (torch.bfloat16, torch.float16)
    with torch.autocast(model.device.type, low if halved else None, enabled=halved):
        return model(input_ids=ids.to(model.device), use_cache=False).logits


def _mean(model: PreTrainedModel, rows: Tensor, wanted: list[Tensor]) -> float:
    losses = [divergence(_logits(model, row[None]), logits).item() for row, logits in zip(rows, wanted, strict=True)]
    return sum(losses) / len(losses)
