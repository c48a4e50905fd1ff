"""A short training of all compressed layers together, towards the original's predictions on the calibration text.

Training each MLP by itself (``reconstruction``) ignores how later layers correct or amplify its errors. Here the loss
is the divergence of the compressed model's next-token distributions from the original's, and its gradient reaches every
layer. The targets are the original's distributions only, not the tokens of the text. Only the left factors, scalars and
biases of the compressed layers change; right factors do not, so dropped neurons stay dropped.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from krony.compression.descent import relative_adamw
from krony.kronecker.linear import KroneckerLinear
from krony.models.divergence import divergence
from krony.models.modes import evaluating
from krony.models.surgery import kronecker_layers
from krony.runtime.hardware import fast_dtype
from krony.runtime.progress import Progress, silent

RATE = 1e-3  # the highest rate, relative to the root mean square of each parameter
WARM_UP = 0.2  # share of the steps
HELD_OUT = 8  # held-out sequences at most, and at most an eighth of all
CLIP = 1.0  # the largest norm of the gradient


@dataclass(frozen=True)
class Tuned:
    """The divergence from the original, in nats per token, on held-out sequences.

    Attributes:
        before: before the training.
        after: after it.
        steps: the number of steps.
    """

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
    """Trains the compressed layers of ``model`` in place, one sequence per step; the layers keep their dtype.

    If the divergence from the original on the held-out sequences does not fall, the layers keep their values.

    Args:
        original: the uncompressed model, in eval mode; it does not change.
        ids: token ids ``(sequences, length)``; a single sequence serves for training and evaluation.
        steps: number of steps.
        seed: seed of the choice of held-out sequences.
        progress: called with the step, the number of steps, and what is being done.
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
def _training(model: PreTrainedModel, layers: list[KroneckerLinear]) -> Iterator[list[nn.Parameter]]:
    """Yields the trained parameters: the compressed layers', in float32 and with gradients; dropout is off."""
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
    """Trains on one sequence per step, in turn."""
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
    """``(1, length) -> (1, length, vocabulary)``; in the model's dtype, or for float32 in bfloat16 where it is fast."""
    low = fast_dtype(model.device) if model.dtype == torch.float32 else model.dtype
    halved = low in (torch.bfloat16, torch.float16)
    with torch.autocast(model.device.type, low if halved else None, enabled=halved):
        return model(input_ids=ids.to(model.device), use_cache=False).logits


def _mean(model: PreTrainedModel, rows: Tensor, wanted: list[Tensor]) -> float:
    """The mean divergence over these sequences, in nats per token."""
    losses = [divergence(_logits(model, row[None]), logits).item() for row, logits in zip(rows, wanted, strict=True)]
    return sum(losses) / len(losses)
