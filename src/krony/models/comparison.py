"""A student compared with its teacher, from the states before their heads wherever these make the logits alone."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from krony.kronecker.derived import is_sharded
from krony.models.divergence import PLAIN, Goal, Head, divergence, head_divergence
from krony.models.modes import evaluating
from krony.models.precision import fast_products


class Comparison:
    """How far the predictions of a student are from those of its teacher.

    Args:
        heads: what ``plain_heads`` says of the student and its teacher. Without them the logits themselves are
            compared, which takes more memory and time.
        dtype: the dtype of the heads' products; None for that of their weights.
    """

    def __init__(self, heads: tuple[nn.Linear, nn.Linear] | None, dtype: torch.dtype | None = None) -> None:
        self.heads, self.dtype = heads, dtype
        self.fixed: dict[nn.Linear, Head] = {}  # heads that don't train, converted

    @contextmanager
    def headless(self) -> Iterator[None]:
        """Within it the ``logits`` of both models are their last states, ``(batch, length, width)``."""
        with ExitStack() as stack:
            for layer in set(self.heads or ()):
                stack.enter_context(without_effect(layer))
            yield

    def loss(self, ours: Tensor, theirs: Tensor, goal: Goal = PLAIN) -> Tensor:
        """The divergence in nats per token, a scalar; the arguments are what ``headless`` made of the ``logits``."""
        if self.heads is None:
            return divergence(ours, theirs, goal)
        student, teacher = self.heads
        trains = any(p.requires_grad for p in student.parameters())
        return head_divergence(ours, theirs, self._head(student, trains), self._head(teacher, trains=False), goal)

    def _head(self, layer: nn.Linear, trains: bool) -> Head:
        """The matrix of a head in the dtype of the products; one that doesn't train is converted once."""
        keep = not trains and not is_sharded(layer)  # shards are gathered into memory that is freed again
        if keep and layer in self.fixed:
            return self.fixed[layer]
        head = Head(*(None if p is None else p.to(self.dtype or p.dtype) for p in (layer.weight, layer.bias)))
        if keep:
            self.fixed[layer] = head
        return head


def plain_heads(student: PreTrainedModel, teacher: PreTrainedModel) -> tuple[nn.Linear, nn.Linear] | None:
    """The heads of both, or None where either does more to its logits than its head does (Gemma 2 caps them)."""
    ours, theirs = plain_head(student), plain_head(teacher)
    return None if ours is None or theirs is None else (ours, theirs)


@torch.no_grad()
def plain_head(model: PreTrainedModel) -> nn.Linear | None:
    """The last layer of a causal LM, if the logits are what it makes of the last states and nothing else; or None."""
    head = model.get_output_embeddings()
    if type(head) is not nn.Linear or "forward" in vars(head) or head._forward_hooks or head._forward_pre_hooks:
        return None
    ids = torch.zeros(1, 2, dtype=torch.long, device=model.device)
    asked = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "use_cache": False}
    with evaluating(model), fast_products(model):
        logits = model(**asked).logits
        with without_effect(head):
            states = model(**asked).logits
        same = states.shape[-1] == head.in_features and torch.allclose(head(states), logits)
    return head if same else None


@contextmanager
def without_effect(layer: nn.Module) -> Iterator[None]:
    """Within it the layer returns what it gets; its parameters stay where they are."""
    layer.forward = _unchanged  # an attribute of its own hides the method of its class
    try:
        yield
    finally:
        del layer.forward


def _unchanged(x: Tensor) -> Tensor:
    """One function for all layers and steps: torch.compile compiles anew for a function that it doesn't know."""
    return x
