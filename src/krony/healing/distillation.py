"""Learning from the original: how far the student's predictions and hidden states are from the teacher's.

Predictions as in Hinton et al. 2015. Hidden states as in DistilBERT and TinyBERT, but relative to their own size, so
that no layer or token with large activations dominates the loss.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from krony.errors import KronyError
from krony.healing.recipes import Recipe
from krony.models.comparison import Comparison
from krony.models.divergence import Goal, at_least_float32, following


def distil(outputs: ModelOutput, wanted: ModelOutput, ids: Tensor, recipe: Recipe, comparison: Comparison) -> Tensor:
    """The loss of a student with a teacher, a scalar.

    Args:
        outputs: output of the student's forward pass on ``ids``, in ``comparison.headless()``; with ``hidden_states``
            if ``recipe.hidden``.
        wanted: output of the teacher's.
        ids: token ids ``(batch, length)``.
    """
    labels = following(ids) if recipe.text else None
    loss = comparison.loss(outputs.logits, wanted.logits, Goal(recipe.temperature, recipe.text, labels))
    if recipe.hidden:
        loss = loss + recipe.hidden * distance(outputs.hidden_states[1:], wanted.hidden_states[1:])
    return loss


def distance(states: Sequence[Tensor], wanted: Sequence[Tensor]) -> Tensor:
    """Mean over layers and tokens of ‖student − teacher‖²/‖teacher‖²; a layer's states are ``(..., width)``."""
    layers = []
    for ours, theirs in zip(states, wanted, strict=True):
        lost = (at_least_float32(ours) - at_least_float32(theirs)).square().sum(-1)  # (...)
        layers.append((lost / at_least_float32(theirs).square().sum(-1).clamp_min(1e-12)).mean())
    return torch.stack(layers).mean()


def check_teacher(model: PreTrainedModel, teacher: PreTrainedModel, recipe: Recipe) -> None:
    """Raises KronyError unless ``teacher`` fits ``model`` and the recipe."""
    ours, theirs = model.config.get_text_config(), teacher.config.get_text_config()
    if theirs.vocab_size != ours.vocab_size:
        raise KronyError(
            f"the teacher knows {theirs.vocab_size} tokens and the model {ours.vocab_size}: take the model's original"
        )
    sizes = [(config.num_hidden_layers, config.hidden_size) for config in (ours, theirs)]
    if recipe.hidden and sizes[0] != sizes[1]:
        (layers, width), (their_layers, their_width) = sizes
        raise KronyError(
            f"hidden states can't be compared: the teacher has {their_layers} layers of width {their_width} and the "
            f"model {layers} of {width}; leave hidden at 0"
        )
