"""Copies of a model that share its structure but not its values."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel


def copy_with(model: PreTrainedModel, make: Callable[[Tensor], Tensor]) -> PreTrainedModel:
    """A copy of ``model`` with ``make(tensor)`` in place of each parameter and buffer; what is tied stays tied.

    ``model`` itself is not copied on the way, so the copy takes the memory of what ``make`` returns.
    """
    made: dict[int, Tensor] = {}
    for tensor in (*model.parameters(), *model.buffers()):
        value = make(tensor)
        made[id(tensor)] = nn.Parameter(value, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else value
    return copy.deepcopy(model, made)


def copy_without_values(model: PreTrainedModel) -> PreTrainedModel:
    """A copy of ``model`` on the meta device, which takes no memory to speak of and can be sent to other processes."""
    return copy_with(model, lambda tensor: torch.empty_like(tensor, device="meta"))
