"""A short training of the compressed model, towards the original's predictions and the calibration text.

Training each MLP by itself (``reconstruction``) ignores how later layers correct or amplify its errors. Here the loss
is the divergence of the compressed model's next-token distributions from the original's, mixed with the cross-entropy
of the text's own tokens, and its gradient reaches every layer. The left factors, scalars and biases of the compressed
layers change, and with ``everything`` all other weights but the embeddings. Right factors do not, so dropped neurons
stay dropped.
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from krony.compression.descent import relative_adamw
from krony.models.comparison import Comparison, plain_heads
from krony.models.divergence import PLAIN, Goal, following
from krony.models.fast_training import fast_training
from krony.models.modes import evaluating
from krony.models.precision import fast_products, product_dtype
from krony.models.surgery import kronecker_layers
from krony.runtime.progress import Progress, silent

RATE = 1e-3  # the highest rate, relative to the root mean square of each parameter
WARM_UP = 0.2  # share of the steps
HELD_OUT = 8  # held-out sequences at most, and at most an eighth of all
CLIP = 1.0  # the largest norm of the gradient


@dataclass(frozen=True, kw_only=True)
class Tuned:
    """What a training came to on held-out sequences, in nats per token.

    Attributes:
        before: the divergence from the original before the training.
        after: the same after it.
        loss_before: the loss that is trained, before: the divergence, mixed with the cross-entropy of the text.
        loss_after: the same after it.
        steps: the number of steps.
    """

    before: float
    after: float
    loss_before: float
    loss_after: float
    steps: int

    @property
    def improved(self) -> bool:
        """Whether the loss fell; otherwise the weights have their values from before."""
        return self.loss_after < self.loss_before

    def summary(self) -> str:
        """One sentence: what the training changed on the sequences that are held back."""
        if not self.improved:
            return (
                f"{self.steps} steps of training did not lower the loss on sequences held back, "
                f"{self.loss_before:.3f} nats per token: the weights keep their values from before"
            )
        gained = f"the divergence from the original {self.before:.3f} -> {self.after:.3f}"
        if (self.loss_before, self.loss_after) != (self.before, self.after):
            gained = f"the loss {self.loss_before:.3f} -> {self.loss_after:.3f}, {gained}"
        return f"trained for {self.steps} steps: {gained} nats per token, on sequences held back"


def tune(
    model: PreTrainedModel,
    original: PreTrainedModel,
    ids: Tensor,
    *,
    steps: int,
    text: float = 0.0,
    everything: bool = False,
    seed: int = 0,
    progress: Progress = silent,
) -> Tuned:
    """Trains ``model`` in place, one sequence per step; weights keep their dtype.

    If the loss on the held-out sequences does not fall, the weights keep their values.

    Args:
        original: the uncompressed model, in eval mode; it does not change.
        ids: token ids ``(sequences, length)``; a single sequence serves for training and evaluation.
        steps: number of steps.
        text: the share of the cross-entropy with the text in the loss, from 0 to 1.
        everything: trains all weights but the embeddings; otherwise the compressed layers alone.
        seed: seed of the choice of held-out sequences.
        progress: called with the step, the number of steps, and what is being done.
    """
    order = torch.randperm(len(ids), generator=torch.Generator().manual_seed(seed)).tolist()
    count = held_out(len(ids))
    held, trained = order[:count], order[count:] if len(ids) > 1 else order
    fast = fast_training(model, original, device=model.device, length=ids.shape[1])
    parameters = _trained(model, everything)
    with torch.no_grad(), _training(model, parameters) as undo, fast:
        lesson = _Lesson(model, original, ids, text)
        loss_before, before = lesson.measure(held)
        with torch.enable_grad():
            _descend(lesson, parameters, trained, steps, seed, progress)
        loss_after, after = lesson.measure(held)
        if not loss_after < loss_before:
            undo()
            loss_after, after = loss_before, before
    return Tuned(before=before, after=after, loss_before=loss_before, loss_after=loss_after, steps=steps)


def held_out(sequences: int) -> int:
    """How many of so many sequences are held back to measure on."""
    return min(HELD_OUT, max(1, sequences // 8))


def _trained(model: PreTrainedModel, everything: bool) -> list[nn.Parameter]:
    """The parameters that change, each once."""
    layers = list(kronecker_layers(model).values())
    if not everything:
        return [p for layer in layers for p in (layer.weight, layer.scalars, layer.bias) if p is not None]
    fixed = {id(layer.right) for layer in layers} | {id(p) for p in model.get_input_embeddings().parameters()}
    head = model.get_output_embeddings()
    if head is not None and getattr(model.config.get_text_config(), "tie_word_embeddings", False):
        fixed.add(id(head.weight))  # also beside a factorised embedding
    return [p for p in model.parameters() if id(p) not in fixed and p.is_floating_point()]


@contextlib.contextmanager
def _training(model: PreTrainedModel, parameters: list[nn.Parameter]) -> Iterator[Callable[[], None]]:
    """Within it the parameters are in float32, or float64, and have gradients, and dropout is off.

    Yields a function that gives them their first values again; an exception does so too.
    """
    first = [p.data for p in parameters]

    def undo() -> None:
        for parameter, value in zip(parameters, first, strict=True):
            parameter.data = value

    for parameter, value in zip(parameters, first, strict=True):
        parameter.data = value.to(torch.promote_types(value.dtype, torch.float32), copy=True)
    try:
        with evaluating(model):
            for parameter in parameters:
                parameter.requires_grad_(True)
            yield undo
    except BaseException:
        undo()
        raise
    finally:
        model.zero_grad()
        for parameter, value in zip(parameters, first, strict=True):
            parameter.data = parameter.data.to(value.dtype)


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
        progress(step, steps, f"all layers together, loss {loss.item():.2f}")
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, CLIP)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()


class _Lesson:
    """The loss of ``model`` on single sequences of ``ids: (sequences, length)``, taught by ``original`` and the text.

    The original's last states are kept where its head is all that follows them: a second pass over the text then costs
    no pass through the original.
    """

    def __init__(self, model: PreTrainedModel, original: PreTrainedModel, ids: Tensor, text: float) -> None:
        self.model, self.original, self.ids, self.text = model, original, ids, text
        self.dtype = product_dtype(model)
        self.comparison = Comparison(plain_heads(model, original), self.dtype)
        self.kept: dict[int, Tensor] = {}

    def loss(self, row: int) -> Tensor:
        """Of one sequence, in nats per token; a scalar."""
        return self.comparison.loss(self._last(self.model, row), self._wanted(row), self._goal(row))

    @torch.no_grad()
    def measure(self, rows: list[int]) -> tuple[float, float]:
        """The mean loss of these sequences, and their mean divergence from the original, without gradients."""
        losses, divergences = [], []
        for row in rows:
            states, wanted = self._last(self.model, row), self._wanted(row)
            divergences.append(self.comparison.loss(states, wanted, PLAIN).item())
            losses.append(
                self.comparison.loss(states, wanted, self._goal(row)).item() if self.text else divergences[-1]
            )
        return sum(losses) / len(rows), sum(divergences) / len(rows)

    def _goal(self, row: int) -> Goal:
        labels = following(self.ids[row][None]).to(self.model.device) if self.text else None
        return Goal(text=self.text, labels=labels)

    @torch.no_grad()
    def _wanted(self, row: int) -> Tensor:
        if row not in self.kept:
            states = self._last(self.original, row)
            if self.comparison.heads is None:  # logits, which are too many to keep
                return states
            self.kept[row] = states.to(self.dtype)
        return self.kept[row]

    def _last(self, model: PreTrainedModel, row: int) -> Tensor:
        """``(1, length, width)``, or ``(1, length, vocabulary)``: what ``Comparison`` compares."""
        with self.comparison.headless(), fast_products(model):
            return model(input_ids=self.ids[row][None].to(model.device), use_cache=False).logits
