"""Which parameters train, and at which learning rate."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from krony.errors import KronyError
from krony.healing.recipes import Recipe
from krony.kronecker.embedding import KroneckerEmbedding
from krony.kronecker.linear import KroneckerLinear
from krony.models.modes import quiet
from krony.models.surgery import kronecker_embeddings, kronecker_layers


@contextmanager
def trainable(model: PreTrainedModel, frozen: Collection[str], *, checkpointing: bool = False) -> Iterator[None]:
    """Freezes parameters and switches dropout off: there is too little text to waste. At the end all is as before.

    Args:
        frozen: words of ``krony.healing.options.FROZEN``: ``right`` freezes the right factors (``slim`` stays exact),
            ``inherited`` all parameters but the factors and scalars, ``scalars`` the scalars (section 6 suggests 4),
            ``embeddings`` the embeddings and a head that is tied to them.
        checkpointing: forget activations and compute them again: less memory, more time.

    Raises:
        KronyError: a word that names nothing in this model, or one that leaves nothing to train.
    """
    fixed = _frozen_parameters(model, frozen)
    before = [(p, p.requires_grad) for p in model.parameters()]
    rates = list(_dropout(model))
    try:
        for parameter, _ in before:
            parameter.requires_grad_(id(parameter) not in fixed)
        for module, name, _ in rates:
            setattr(module, name, 0.0)
        if checkpointing:
            gradient_checkpointing(model, on=True)
        with quiet():
            yield
    finally:
        if checkpointing:
            gradient_checkpointing(model, on=False)
        for parameter, required in before:
            parameter.requires_grad_(required)
        for module, name, rate in rates:
            setattr(module, name, rate)


def _dropout(model: PreTrainedModel) -> Iterator[tuple[Any, str, float]]:
    """Every dropout rate: those of Dropout modules, and the numbers that layers (OPT) or configs (Persimmon) keep."""
    for module in (*model.modules(), model.config.get_text_config()):
        for name, value in vars(module).items():
            is_rate = name == "p" if isinstance(module, nn.Dropout) else "drop" in name
            if is_rate and isinstance(value, float):
                yield module, name, value


def gradient_checkpointing(model: PreTrainedModel, *, on: bool) -> None:
    """Switches gradient checkpointing."""
    if on:
        model.activation_checkpointing_enable()
    else:
        model.activation_checkpointing_disable()


def _frozen_parameters(model: PreTrainedModel, words: Collection[str]) -> set[int]:
    """The ids of the parameters that these words freeze."""
    factors, scalars = _factors(model)
    parameters = {id(p) for p in model.parameters()}
    frozen: set[int] = set()
    if "inherited" in words:
        if not factors:
            raise KronyError("freeze inherited leaves a dense model nothing to train: take none")
        frozen |= parameters - factors - scalars
    if "right" in words:
        frozen |= {id(layer.right) for layer in _factorised(model)}
    if "scalars" in words:
        if not scalars:
            raise KronyError("freeze scalars: this model has no scalars (krony compress --scalars adds them)")
        frozen |= scalars
    if "embeddings" in words:
        frozen |= {id(p) for p in model.get_input_embeddings().parameters()}
    return frozen


def _factorised(model: nn.Module) -> list[KroneckerLinear | KroneckerEmbedding]:
    return [*kronecker_layers(model).values(), *kronecker_embeddings(model).values()]


def _factors(model: nn.Module) -> tuple[set[int], set[int]]:
    """The ids of the factors, those of embeddings included, and of the scalars."""
    factors = {id(p) for layer in _factorised(model) for p in (layer.weight, layer.right)}
    scalars = {id(layer.scalars) for layer in kronecker_layers(model).values() if layer.scalars is not None}
    return factors, scalars


def adamw(model: nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
    """AdamW over the trainable parameters: only factors decay, and each kind has its learning rate.

    The betas are those of the published code (``train.py``); the paper gives none.
    """
    factors, scalars = _factors(model)
    training = [p for p in model.parameters() if p.requires_grad]
    factor_rate, other_rate = recipe.factor_rate or recipe.learning_rate, recipe.inherited_rate or recipe.learning_rate
    scalar_rate = recipe.scalar_rate or factor_rate
    groups = [
        {"params": [p for p in training if id(p) in factors], "weight_decay": recipe.weight_decay, "lr": factor_rate},
        {"params": [p for p in training if id(p) in scalars], "weight_decay": 0.0, "lr": scalar_rate},
        {"params": [p for p in training if id(p) not in factors | scalars], "weight_decay": 0.0, "lr": other_rate},
    ]
    return torch.optim.AdamW([g for g in groups if g["params"]], lr=recipe.learning_rate, betas=(0.9, 0.95), fused=True)
