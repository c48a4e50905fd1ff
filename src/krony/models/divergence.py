"""The Kullback-Leibler divergence of one model's next-token distributions from another's."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

# Logits in float32 at once: on a CPU as many as its caches hold, elsewhere 128 MB.
PIECES, PIECE = {"cpu": 2**18}, 2**25
HEAD_ROWS = 128  # tokens whose logits are in memory at once where a head is applied here
NO_LABEL = -100  # as in transformers: this token is not followed by text


class Head(NamedTuple):
    """The matrix that turns the last states of a model into logits.

    Attributes:
        weight: ``(vocabulary, width)``.
        bias: ``(vocabulary,)`` or None.
    """

    weight: Tensor
    bias: Tensor | None = None

    def logits(self, states: Tensor) -> Tensor:
        """``(tokens, width) -> (tokens, vocabulary)``, in the dtype of the weight."""
        return F.linear(states.to(self.weight.dtype), self.weight, self.bias)


class Goal(NamedTuple):
    """What the student is compared with, besides the teacher's distributions.

    Attributes:
        temperature: divides the logits of both before the comparison, which is multiplied by its square: that keeps the
            size of the gradient (Hinton et al. 2015).
        text: the share of the cross-entropy with the text itself, from 0 to 1; the divergence has the rest.
        labels: the tokens that follow, ``(tokens,)``, ``NO_LABEL`` where none does; None if ``text`` is 0.
    """

    temperature: float = 1.0
    text: float = 0.0
    labels: Tensor | None = None


PLAIN = Goal()


def divergence(logits: Tensor, wanted: Tensor, goal: Goal = PLAIN) -> Tensor:
    """The mean of KL(teacher ‖ student) in nats per token, a scalar in float32 (float64 for float64 logits).

    ``logits`` (student) and ``wanted`` (teacher) are ``(..., vocabulary)`` in any dtype; only ``logits`` get a
    gradient. With ``goal.text`` it is mixed with the mean cross-entropy of the tokens that have a label.

    Examples:
        >>> uniform, certain = torch.zeros(1, 2), torch.tensor([[0.0, -1000.0]])
        >>> round(divergence(uniform, certain).item(), 4)  # ln 2
        0.6931
    """
    return _Divergence.apply(logits.flatten(0, -2), wanted.detach().flatten(0, -2), goal)


def head_divergence(states: Tensor, wanted: Tensor, head: Head, wanted_head: Head, goal: Goal = PLAIN) -> Tensor:
    """``divergence(head.logits(states), wanted_head.logits(wanted), goal)``, without holding all the logits.

    With 50,000 words, the logits of a step take more memory than everything else in it, and moving them takes more time
    than computing them. ``states`` and ``wanted`` are ``(..., width)``; ``states`` and ``head`` get a gradient.

    Examples:
        >>> states, head = torch.randn(3, 4), Head(torch.randn(5, 4))
        >>> bool(head_divergence(states, states, head, head) < 1e-6)
        True
    """
    return _HeadDivergence.apply(states.flatten(0, -2), *head, wanted.detach().flatten(0, -2), wanted_head, goal)


def _compare(
    logits: Tensor, wanted: Tensor, goal: Goal, labels: Tensor | None, weight: float
) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Per piece of the tokens: its place, the sum of its losses, and their gradient with respect to the logits.

    The gradient has a closed form, T (softmax(student/T) − softmax(teacher/T)) and softmax(student) − label, and most
    of it is computed for the loss anyway. A piece stays in the caches; full passes over memory would dominate the run
    time. ``weight`` is the cross-entropy's in the sum.
    """
    t, share = goal.temperature, 1 - goal.text
    step = max(1, PIECES.get(logits.device.type, PIECE) // logits.shape[1])
    for start in range(0, len(logits), step):
        piece = slice(start, start + step)
        student, teacher = (_log_softmax(x[piece], t) for x in (logits, wanted))
        likely = teacher.exp()
        lost = teacher.sub_(student).mul_(likely).sum() * (share * t**2)
        gradient = student.exp().sub_(likely).mul_(share * t) if goal.text or t != 1 else student.exp_().sub_(likely)
        if labels is not None:
            plain = student if t == 1 else _log_softmax(logits[piece], 1.0)
            lost = lost + weight * _add_text(plain, labels[piece], gradient, weight)
        yield piece, lost, gradient


def _add_text(log_q: Tensor, labels: Tensor, gradient: Tensor, weight: float) -> Tensor:
    """The summed cross-entropy of ``labels: (tokens,)``; adds its gradient to ``gradient``, times ``weight``."""
    rows = (labels != NO_LABEL).nonzero().squeeze(1)
    chosen = labels[rows]
    gradient[rows] += weight * log_q[rows].exp()
    gradient[rows, chosen] -= weight
    return -log_q[rows, chosen].sum()


def _text_weight(goal: Goal, tokens: int) -> float:
    """What a token's cross-entropy counts in a sum that is divided by all tokens; only some have a label."""
    if goal.labels is None:
        return 0.0
    return goal.text * tokens / max(1, int((goal.labels != NO_LABEL).sum()))


def _log_softmax(logits: Tensor, temperature: float) -> Tensor:
    logits = at_least_float32(logits)
    return (logits if temperature == 1 else logits / temperature).log_softmax(-1)


class _Divergence(torch.autograd.Function):
    """The mean over tokens of logits ``(tokens, vocabulary)``; the forward pass computes the gradient too."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, wanted: Tensor, goal: Goal) -> Tensor:
        gradient = torch.empty_like(logits) if ctx.needs_input_grad[0] else None  # (tokens, vocabulary)
        total = logits.new_zeros((), dtype=at_least_float32(logits[:0]).dtype)
        for piece, lost, slope in _compare(logits, wanted, goal, goal.labels, _text_weight(goal, len(logits))):
            total += lost
            if gradient is not None:
                gradient[piece] = slope.div_(len(logits))
        if gradient is not None:
            ctx.save_for_backward(gradient)
        return total / len(logits)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, wanted: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * wanted, None, None


class _HeadDivergence(torch.autograd.Function):
    """The mean over tokens of states ``(tokens, width)``; logits exist for ``HEAD_ROWS`` tokens at a time."""

    @staticmethod
    def forward(
        ctx: Any, states: Tensor, weight: Tensor, bias: Tensor | None, wanted: Tensor, wanted_head: Head, goal: Goal
    ) -> Tensor:
        d_states, d_weight, d_bias = (
            torch.zeros_like(x) if x is not None and needed else None
            for x, needed in zip((states, weight, bias), ctx.needs_input_grad, strict=False)
        )
        head, text_weight = Head(weight, bias), _text_weight(goal, len(states))
        total = states.new_zeros((), dtype=at_least_float32(states[:0]).dtype)
        for start in range(0, len(states), HEAD_ROWS):
            rows = slice(start, start + HEAD_ROWS)
            logits = head.logits(states[rows])  # (rows, vocabulary)
            labels = None if goal.labels is None else goal.labels[rows]
            for piece, lost, slope in _compare(logits, wanted_head.logits(wanted[rows]), goal, labels, text_weight):
                total += lost
                logits[piece] = slope.div_(len(states))  # their gradient takes their place
            if d_states is not None:
                d_states[rows] = logits @ weight
            if d_weight is not None:
                d_weight += logits.T @ states[rows].to(weight.dtype)
            if d_bias is not None:
                d_bias += logits.sum(0)
        ctx.save_for_backward(d_states, d_weight, d_bias)
        return total / len(states)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, wanted: Tensor) -> tuple[Tensor | None, ...]:
        parts = (None if part is None else part * wanted.to(part.dtype) for part in ctx.saved_tensors)
        return (*parts, None, None, None)


def following(ids: Tensor) -> Tensor:
    """The token after each one, ``(batch, length) -> (batch*length,)``; the last of a row has none."""
    labels = ids.roll(-1, dims=1)
    labels[:, -1] = NO_LABEL
    return labels.flatten()


def at_least_float32(x: Tensor) -> Tensor:
    """``x`` in float64 if it is float64, otherwise in float32; the shape stays."""
    return x if x.dtype == torch.float64 else x.float()
