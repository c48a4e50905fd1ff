"""Learning from the original: how far the student's words and hidden states are from the teacher's.

Hinton et al. 2015 for the words; the hidden states as in DistilBERT and TinyBERT, but relative to their own size, so
that neither a layer nor a token of large activations speaks for all.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from krony.errors import KronyError
from krony.recipes import Recipe

PIECE = 2**22  # logits that the divergence takes at once: 16 MB in float32


def distil(outputs: ModelOutput, wanted: ModelOutput, ids: Tensor, recipe: Recipe) -> Tensor:
    """The loss of a student that is taught, a scalar.

    Args:
        outputs: what the student's forward pass gave for ``ids``; with ``hidden_states`` if ``recipe.hidden``.
        wanted: what the teacher's gave.
        ids: token ids ``(batch, length)``.
    """
    loss = (1 - recipe.text) * divergence(outputs.logits, wanted.logits, recipe.temperature)
    if recipe.text:
        logits = _float(outputs.logits[:, :-1].flatten(0, 1))  # (batch*(length-1), vocabulary)
        loss = loss + recipe.text * F.cross_entropy(logits, ids[:, 1:].flatten())
    if recipe.hidden:
        loss = loss + recipe.hidden * distance(outputs.hidden_states[1:], wanted.hidden_states[1:])
    return loss


def divergence(logits: Tensor, wanted: Tensor, temperature: float = 1.0) -> Tensor:
    """Mean over tokens of KL(teacher ‖ student), nats; both ``(..., vocabulary)`` in any dtype.

    With a temperature T both are softened, and the figure is multiplied by T², which keeps the gradient's size.
    """
    return _Divergence.apply(logits.flatten(0, -2), wanted.detach().flatten(0, -2), temperature)


class _Divergence(torch.autograd.Function):
    """Some tokens at a time: with 50,000 words, passes over memory would take longer than the model's own products.

    The gradient is known in closed form, T (softmax(student/T) − softmax(teacher/T)) / tokens, and made on the way.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, wanted: Tensor, temperature: float) -> Tensor:
        gradient = torch.empty_like(logits) if ctx.needs_input_grad[0] else None  # (tokens, vocabulary)
        total = logits.new_zeros((), dtype=_float(logits[:0]).dtype)
        step = max(1, PIECE // logits.shape[1])
        for start in range(0, len(logits), step):
            piece = slice(start, start + step)
            student, teacher = (_float(x[piece]).div(temperature).log_softmax(-1) for x in (logits, wanted))
            likely = teacher.exp()
            total += teacher.sub_(student).mul_(likely).sum()
            if gradient is not None:
                gradient[piece] = student.exp_().sub_(likely).mul_(temperature / len(logits))
        if gradient is not None:
            ctx.save_for_backward(gradient)
        return total * (temperature**2 / len(logits))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, wanted: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * wanted, None, None


def distance(states: Sequence[Tensor], wanted: Sequence[Tensor]) -> Tensor:
    """Mean over layers and tokens of ‖student − teacher‖²/‖teacher‖²; a layer's states are ``(..., width)``."""
    layers = []
    for ours, theirs in zip(states, wanted, strict=True):
        lost = (_float(ours) - _float(theirs)).square().sum(-1)  # (...)
        layers.append((lost / _float(theirs).square().sum(-1).clamp_min(1e-12)).mean())
    return torch.stack(layers).mean()


def check_teacher(model: PreTrainedModel, teacher: PreTrainedModel, recipe: Recipe) -> None:
    """Raises KronyError unless ``teacher`` can teach ``model`` by this recipe."""
    ours, theirs = model.config.get_text_config(), teacher.config.get_text_config()
    if theirs.vocab_size != ours.vocab_size:
        raise KronyError(
            f"the teacher knows {theirs.vocab_size} tokens and the model {ours.vocab_size}: "
            "it is no model of the same kind"
        )
    sizes = [(config.num_hidden_layers, config.hidden_size) for config in (ours, theirs)]
    if recipe.hidden and sizes[0] != sizes[1]:
        (layers, width), (their_layers, their_width) = sizes
        raise KronyError(
            f"hidden states can't be compared: the teacher has {their_layers} layers of width {their_width} and the "
            f"model {layers} of {width}; leave hidden at 0"
        )


def _float(x: Tensor) -> Tensor:
    """In float32 at least."""
    return x if x.dtype == torch.float64 else x.float()
