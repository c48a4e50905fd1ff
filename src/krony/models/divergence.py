"""The Kullback-Leibler divergence of one model's next-token distributions from another's."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

PIECE = 2**22  # logits per piece: 16 MB in float32


def divergence(logits: Tensor, wanted: Tensor, temperature: float = 1.0) -> Tensor:
    """The mean of KL(teacher ‖ student) in nats per token, a scalar in float32 (float64 for float64 logits).

    ``logits`` (student) and ``wanted`` (teacher) are ``(..., vocabulary)`` in any dtype; only ``logits`` get a
    gradient. A temperature T divides both, and the result is multiplied by T², which keeps the size of the gradient
    (Hinton et al. 2015).

    Examples:
        >>> uniform, certain = torch.zeros(1, 2), torch.tensor([[0.0, -1000.0]])
        >>> round(divergence(uniform, certain).item(), 4)  # ln 2
        0.6931
    """
    return _Divergence.apply(logits.flatten(0, -2), wanted.detach().flatten(0, -2), temperature)


class _Divergence(torch.autograd.Function):
    """Works on a piece of the tokens at a time: with 50,000 words, full passes over memory would dominate the run time.

    The gradient has a closed form, T (softmax(student/T) − softmax(teacher/T)) / tokens, and the forward pass computes
    it.
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
    """``x`` in float64 if it is float64, otherwise in float32; the shape stays."""
    return x if x.dtype == torch.float64 else x.float()
