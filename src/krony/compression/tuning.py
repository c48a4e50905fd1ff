"""A short training of all compressed layers together, towards the original's predictions on the calibration text.

Training each MLP by itself (``reconstruction``) ignores how later layers correct or amplify its errors. Here the loss
is the divergence of the compressed model's next-token distributions from the original's, and its gradient reaches every
layer. The targets are the original's distributions only, not the tokens of the text. Only the left factors, scalars and
biases of the compressed layers change; right factors do not, so dropped neurons stay dropped.
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from krony.compression.descent import relative_adamw
from krony.kronecker.linear import KroneckerLinear
from krony.models.attention import fast_attention
from krony.models.comparison import Comparison
from krony.models.modes import evaluating
from krony.models.precision import fast_products, product_dtype
from krony.models.surgery import kronecker_layers
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
    order = torch.randperm(len(ids), generator=torch.Generator().manual_seed(seed)).tolist()
    count = min(HELD_OUT, max(1, len(ids) // 8))
    held, trained = order[:count], order[count:] if len(ids) > 1 else order
    fast = fast_attention(model, original, device=model.device, length=ids.shape[1], dtype=product_dtype(model))
    with torch.no_grad(), _training(model, layers) as parameters, fast:
        lesson = _Lesson(model, original, ids)
        first = [p.clone() for p in parameters]
        before = lesson.mean(held)
        with torch.enable_grad():
            _descend(lesson, parameters, trained, steps, seed, progress)
        after = lesson.mean(held)
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
    lesson: _Lesson, parameters: list[nn.Parameter], rows: list[int], steps: int, seed: int, progress: Progress
) -> None:
    """Trains on one sequence per step, in a new order in each pass over the text."""
    optimizer, schedule = relative_adamw(parameters, rate=RATE, warm_up=WARM_UP, steps=steps)
    shuffle = random.Random(seed)
    for step in range(steps):
        if step and step % len(rows) == 0:
            shuffle.shuffle(rows)
        loss = lesson.loss(rows[step % len(rows)])
        progress(step, steps, f"all layers together, {loss.item():.2f} nats from the original")
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, CLIP)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()


class _Lesson:
    """The divergence of ``model`` from ``original`` on single sequences of ``ids: (sequences, length)``.

    The original's last states are kept where its head is all that follows them: a second pass over the text then costs
    no pass through the original.
    """

    def __init__(self, model: PreTrainedModel, original: PreTrainedModel, ids: Tensor) -> None:
        self.model, self.original, self.ids = model, original, ids
        self.dtype = product_dtype(model)
        self.comparison = Comparison(model, original, self.dtype)
        self.kept: dict[int, Tensor] = {}

    def loss(self, row: int) -> Tensor:
        """Of one sequence, in nats per token; a scalar."""
        return self.comparison.loss(self._last(self.model, row), self._wanted(row))

    def mean(self, rows: list[int]) -> float:
        """Of these sequences, without gradients."""
        with torch.no_grad():
            return sum(self.loss(row).item() for row in rows) / len(rows)

    @torch.no_grad()
    def _wanted(self, row: int) -> Tensor:
        if row not in self.kept:
            states = self._last(self.original, row)
            if not self.comparison.layers:  # logits, which are too many to keep
                return states
            self.kept[row] = states.to(self.dtype)
        return self.kept[row]

    def _last(self, model: PreTrainedModel, row: int) -> Tensor:
        """``(1, length, width)``, or ``(1, length, vocabulary)``: what ``Comparison`` compares."""
        with self.comparison.headless(), fast_products(model):
            return model(input_ids=self.ids[row][None].to(model.device), use_cache=False).logits
