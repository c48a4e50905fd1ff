"""Which parameters train, and at which rate."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from krony.errors import KronyError
from krony.healing.recipes import Recipe
from krony.models.surgery import kronecker_layers

FREEZE = ("none", "right", "inherited", "scalars", "embeddings")


def parse_freeze(freeze: str) -> set[str]:
    """The words of ``freeze``, which is one or more of ``FREEZE``, joined by commas. Raises KronyError."""
    words = [word.strip() for word in freeze.split(",")]
    for word in words:
        if word not in FREEZE:
            raise KronyError(f"freeze {word!r} is unknown: it is one of {', '.join(FREEZE)}, or several with commas")
    if "none" in words and len(words) > 1:
        raise KronyError(f"freeze {freeze!r} says both none and something: drop one")
    return set(words) - {"none"}


@contextmanager
def trainable(model: PreTrainedModel, freeze: str, *, checkpointing: bool = False) -> Iterator[None]:
    """Freezes what stays, and leaves dropout out: there is too little text to waste. All is undone at the end.

    Args:
        freeze: ``right`` keeps right factors (``slim`` stays exact), ``inherited`` all but the factors and scalars,
            ``scalars`` the scalars (section 6 suggests 4), ``embeddings`` the embeddings and a head that is tied to
            them, ``none`` nothing; or several, joined by commas.
        checkpointing: forget activations and compute them again: less memory, more time.

    Raises:
        KronyError: an unknown word, a word about what the model has not, or nothing that is left to train.
    """
    frozen = _frozen(model, parse_freeze(freeze))
    before = [(p, p.requires_grad) for p in model.parameters()]
    rates = list(_dropout(model))
    logger = logging.getLogger("transformers.trainer")
    level = logger.level
    try:
        for parameter, _ in before:
            parameter.requires_grad_(id(parameter) not in frozen)
        for module, name, _ in rates:
            setattr(module, name, 0.0)
        if checkpointing:
            _checkpointing(model, on=True)
        logger.setLevel(logging.ERROR)
        yield
    finally:
        logger.setLevel(level)
        if checkpointing:
            _checkpointing(model, on=False)
        for parameter, required in before:
            parameter.requires_grad_(required)
        for module, name, rate in rates:
            setattr(module, name, rate)


def _dropout(model: PreTrainedModel) -> Iterator[tuple[Any, str, float]]:
    """Every rate of dropout: of the modules, and the numbers that layers such as OPT's and configs such as
    Persimmon's keep for the function.
    """
    for module in (*model.modules(), model.config.get_text_config()):
        for name, value in vars(module).items():
            is_rate = name == "p" if isinstance(module, nn.Dropout) else "drop" in name
            if is_rate and isinstance(value, float):
                yield module, name, value


@contextmanager
def full_precision(model: PreTrainedModel) -> Iterator[None]:
    """Half-precision weights in float32 for as long, and in their own dtype again at the end.

    A step of AdamW is less than what bfloat16 tells apart: most weights would never move.
    """
    tensors = itertools.chain(model.parameters(), model.buffers())
    halves = [(t, t.dtype) for t in tensors if t.dtype in (torch.bfloat16, torch.float16)]
    try:
        for tensor, _ in halves:
            tensor.data = tensor.data.float()
        yield
    finally:
        for tensor, dtype in halves:
            tensor.data = tensor.data.to(dtype)


def _checkpointing(model: PreTrainedModel, *, on: bool) -> None:
    """The method was renamed in transformers 5."""
    verb = "enable" if on else "disable"
    method = getattr(model, f"activation_checkpointing_{verb}", None) or getattr(
        model, f"gradient_checkpointing_{verb}"
    )
    method()


def _frozen(model: PreTrainedModel, words: set[str]) -> set[int]:
    """The ids of the parameters that stay."""
    layers = kronecker_layers(model).values()
    scalars = {id(layer.scalars) for layer in layers if layer.scalars is not None}
    factors = {id(p) for layer in layers for p in (layer.weight, layer.right)}
    parameters = {id(p) for p in model.parameters()}
    frozen: set[int] = set()
    if "inherited" in words:
        if not factors:
            raise KronyError("freeze inherited leaves a dense model nothing to train: take none")
        frozen |= parameters - factors - scalars
    if "right" in words:
        frozen |= {id(layer.right) for layer in layers}
    if "scalars" in words:
        if not scalars:
            raise KronyError("freeze scalars: this model has none (krony compress --scalars gives it some)")
        frozen |= scalars
    if "embeddings" in words:
        frozen |= {id(p) for p in model.get_input_embeddings().parameters()}
    return frozen


def adamw(model: nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
    """AdamW over what trains: factors decay, what was inherited and scalars don't; each kind at its rate.

    Betas are the published code's (``train.py``), which the paper doesn't give.
    """
    layers = kronecker_layers(model).values()
    factors = {id(p) for layer in layers for p in (layer.weight, layer.right)}
    scalars = {id(layer.scalars) for layer in layers if layer.scalars is not None}
    training = [p for p in model.parameters() if p.requires_grad]
    own, rest = recipe.factor_rate or recipe.learning_rate, recipe.inherited_rate or recipe.learning_rate
    groups = [
        {"params": [p for p in training if id(p) in factors], "weight_decay": recipe.weight_decay, "lr": own},
        {"params": [p for p in training if id(p) in scalars], "weight_decay": 0.0, "lr": own},
        {"params": [p for p in training if id(p) not in factors | scalars], "weight_decay": 0.0, "lr": rest},
    ]
    return torch.optim.AdamW([g for g in groups if g["params"]], lr=recipe.learning_rate, betas=(0.9, 0.95))
