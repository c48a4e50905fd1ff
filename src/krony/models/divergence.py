"""How far one model's next-token distributions are from another's: the Kullback-Leibler divergence."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

PIECE = 2**22  # logits that the divergence takes at once: 16 MB in float32


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
        total = logits.new_zeros((), dtype=at_least_float32(logits[:0]).dtype)
        step = max(1, PIECE // logits.shape[1])
        for start in range(0, len(logits), step):
            piece = slice(start, start + step)
            student, teacher = (at_least_float32(x[piece]).div(temperature).log_softmax(-1) for x in (logits, wanted))
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


def at_least_float32(x: Tensor) -> Tensor:
    """In float32 at least."""
    return x if x.dtype == torch.float64 else x.float()
