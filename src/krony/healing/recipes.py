"""How to train: the paper's recipes, and a quick one."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

from krony.errors import KronyError
from krony.options import option

EVALUATIONS = 10
CHANGES, TAUGHT, MACHINE = "The recipe, changed", "With a teacher", "Memory and speed"  # headings of ``--help``


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How to train: step size, schedule and loss.

    Attributes:
        epochs: passes over the training text.
        sequences: rows per step, over all processes and accumulation steps.
        length: tokens per row.
        learning_rate: the highest learning rate. A cosine leads from it to ``final_rate``; it is constant if the two
            are equal.
        final_rate: the learning rate of the last step; ``changed`` keeps its ratio to the highest.
        factor_rate: the highest learning rate of factors and scalars; None for ``learning_rate``.
        scalar_rate: the highest learning rate of the scalars; None for that of the factors.
        inherited_rate: the highest learning rate of all other parameters; None for ``learning_rate``.
        warm_up: steps over which the learning rate rises, at most a fifth of all steps.
        weight_decay: decay of the factors; nothing else decays. 0.1 is the published code's.
        temperature: with a teacher, softens both distributions before they are compared.
        text: with a teacher, the share of the loss that is the cross-entropy with the text itself, from 0 to 1.
        hidden: with a teacher, the weight of the distance between the hidden states of both models.
        batch: at most so many rows at once on one device; gradients of the others are accumulated.
        evaluations: how often at most the validation loss is measured during the run; each time a checkpoint is saved.
        patience: evaluations without a gain after which training stops. A short run needs its last, small steps, so
            its patience equals its evaluations; None never stops. The best state is kept in any case.

    Raises:
        KronyError: a value that is out of range.

    Examples:
        >>> Recipe(learning_rate=1e-3, sequences=4).length
        512
    """

    epochs: float = option(1.0, "Passes over the training text.", panel=CHANGES)
    sequences: int = option(2, "Sequences per step.", panel=CHANGES)
    length: int = option(512, "Tokens per sequence.", panel=CHANGES)
    learning_rate: float = option(3e-4, "The highest learning rate.", panel=CHANGES)
    factor_rate: float | None = option(
        None, "The highest for factors and scalars.", flag="factor-learning-rate", panel=CHANGES
    )
    scalar_rate: float | None = option(
        None, "The highest for scalars, instead of the factors'.", flag="scalar-learning-rate", panel=CHANGES
    )
    inherited_rate: float | None = option(
        None, "The highest for all other parameters.", flag="inherited-learning-rate", panel=CHANGES
    )
    warm_up: int = option(50, "Steps until the learning rate is at its highest.", panel=CHANGES)
    weight_decay: float = option(0.1, "Decay of the factors.", panel=CHANGES)
    temperature: float = option(1.0, "Softens both distributions.", panel=TAUGHT)
    text: float = option(0.0, "Share of the loss on the text itself, from 0 to 1.", panel=TAUGHT)
    hidden: float = option(0.0, "Weight of the distance between the hidden states.", panel=TAUGHT)
    batch: int = option(2, "At most N sequences at once on one device.", metavar="N", panel=MACHINE)
    final_rate: float = 3e-6
    evaluations: int = EVALUATIONS
    patience: int | None = 3

    def __post_init__(self) -> None:
        for name in ("sequences", "batch", "length", "evaluations", "patience"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise KronyError(f"{name} is {getattr(self, name)}: it takes a number from 1")
        if self.length == 1:
            raise KronyError("length is 1: of a row of one token nothing is predicted, so it takes a number from 2")
        for name in ("learning_rate", "factor_rate", "scalar_rate", "inherited_rate", "epochs", "temperature"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise KronyError(f"{name} is {value}: it takes a number above 0")
        for name in ("final_rate", "warm_up", "weight_decay", "hidden"):
            if not 0 <= getattr(self, name) < math.inf:
                raise KronyError(f"{name} is {getattr(self, name)}: it takes a number from 0")
        if self.final_rate > self.learning_rate:
            raise KronyError(f"final_rate is {self.final_rate}: it is at most the learning_rate, {self.learning_rate}")
        if not 0 <= self.text <= 1:
            raise KronyError(f"text is {self.text}: it is a share, from 0 to 1")

    def changed(self, **changes: Any) -> Recipe:
        """This recipe with other values.

        The final learning rate keeps its ratio to the highest one, and a batch is at most a step, unless they are
        given too. Raises KronyError for a value that is out of range.

        Examples:
            >>> f"{RECIPES['quick'].changed(learning_rate=1e-3).final_rate:.0e}"
            '1e-05'
        """
        if "learning_rate" in changes:
            changes.setdefault("final_rate", self.final_rate / self.learning_rate * changes["learning_rate"])
        if "sequences" in changes:
            changes.setdefault("batch", min(self.batch, changes["sequences"]))
        return replace(self, **changes)


_PAPER = Recipe(
    sequences=120, batch=24, length=1024, learning_rate=6e-5, final_rate=6e-6, warm_up=500, epochs=3.0
)  # a step is 5 accumulated batches of 24 rows
RECIPES = {
    "quick": Recipe(patience=EVALUATIONS, text=0.25),  # small steps, many of them
    "paper": _PAPER,
    "paper-small": replace(_PAPER, epochs=4.0),  # the smaller models train for 4 epochs
    "paper-final": replace(  # starts from the best checkpoint of ``paper``
        _PAPER, sequences=320, batch=20, learning_rate=6e-6, warm_up=0, epochs=1.0
    ),
}


def find_recipe(name: str) -> Recipe:
    """The recipe of this name. Raises KronyError."""
    if name not in RECIPES:
        raise KronyError(f"recipe {name!r} is unknown: it is one of {', '.join(RECIPES)}")
    return RECIPES[name]


def default_freeze(name: str) -> str:
    """What a named recipe freezes: ``quick`` the right factors, so that ``slim`` stays exact; the paper's nothing."""
    return "right" if name == "quick" else "none"
