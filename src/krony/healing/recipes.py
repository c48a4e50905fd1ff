"""How to train: the paper's recipes, and a quick one."""

from __future__ import annotations

import math
from dataclasses import dataclass

from krony.errors import KronyError

EVALUATIONS = 10


@dataclass(frozen=True)
class Recipe:
    """How to train.

    Attributes:
        sequences: rows a step, over all processes and accumulation steps.
        batch: rows at once on one device at most; the rest is accumulated.
        length: tokens a row.
        learning_rate: the highest; a cosine leads to ``final_rate``, or it is constant if they are equal.
        warm_up: steps, at most a fifth of all.
        epochs: passes over the data.
        evaluations: of the validation loss, spread over the run; a checkpoint goes with each.
        patience: evaluations without a gain before it stops. A short run needs its last, small steps, so that it has
            as much patience as there are evaluations; the best state is kept in any case.
        weight_decay: of the factors; nothing else decays. 0.1 is the published code's.
        factor_rate: the highest rate of factors and scalars, where it is not ``learning_rate``.
        inherited_rate: the highest rate of what was inherited, where it is not ``learning_rate``.
        temperature: with a teacher, both distributions are softened by it before they are compared.
        text: with a teacher, the share of the loss that is the cross-entropy with the text itself, 0 to 1.
        hidden: with a teacher, the weight of the distance between both models' hidden states.
    """

    sequences: int
    batch: int
    length: int
    learning_rate: float
    final_rate: float
    warm_up: int
    epochs: float
    patience: int = 3
    evaluations: int = EVALUATIONS
    weight_decay: float = 0.1
    factor_rate: float | None = None
    inherited_rate: float | None = None
    temperature: float = 1.0
    text: float = 0.0
    hidden: float = 0.0

    def __post_init__(self) -> None:
        for name in ("sequences", "batch", "length", "evaluations", "patience"):
            if getattr(self, name) < 1:
                raise KronyError(f"{name} is {getattr(self, name)}: it takes a number from 1")
        for name in ("learning_rate", "factor_rate", "inherited_rate", "epochs", "temperature"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise KronyError(f"{name} is {value}: it takes a number above 0")
        for name in ("final_rate", "warm_up", "weight_decay", "hidden"):
            if not 0 <= getattr(self, name) < math.inf:
                raise KronyError(f"{name} is {getattr(self, name)}: it takes a number from 0")
        if not 0 <= self.text <= 1:
            raise KronyError(f"text is {self.text}: it is a share, from 0 to 1")


RECIPES = {
    # small steps, many of them
    "quick": Recipe(2, 2, 512, 3e-4, 3e-6, 50, 1.0, patience=EVALUATIONS, text=0.25),
    "paper": Recipe(120, 24, 1024, 6e-5, 6e-6, 500, 3.0),  # 5 accumulation steps of 24 sequences
    "paper-small": Recipe(120, 24, 1024, 6e-5, 6e-6, 500, 4.0),  # 4 epochs for the smaller models
    "paper-final": Recipe(320, 20, 1024, 6e-6, 6e-6, 0, 1.0),  # from the best checkpoint of ``paper``
}
