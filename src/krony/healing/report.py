"""What a training run did, in figures, as a table and as JSON."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from krony.healing.trajectory import Trajectories
from krony.pages import Table, shown


@dataclass(frozen=True, kw_only=True)
class HealReport:
    """What a training run did. Losses are nats per token on the validation text.

    Attributes:
        tokens: tokens trained on.
        seconds: wall time.
        loss_before: loss before the training.
        loss_trained: loss of the best trained state.
        loss_after: loss of the model as the run leaves it: that of the best state, which may be the first.
        curve: tokens seen, and the training loss up to there.
        validation: tokens seen, and the validation loss there.
        scalars: per layer that has scalars, tokens seen and the scalar of each factor there.
    """

    tokens: int
    seconds: float
    loss_before: float
    loss_trained: float
    loss_after: float
    curve: list[tuple[int, float]] = field(default_factory=list)
    validation: list[tuple[int, float]] = field(default_factory=list)
    scalars: Trajectories = field(default_factory=dict)

    @property
    def improved(self) -> bool:
        """Whether the training lowered the validation loss."""
        return self.loss_trained < self.loss_before

    def no_gain(self, name: str) -> str:
        """The sentence for a training that did not improve ``name``: what happened, and what to change."""
        last = self.validation[-1][1] if self.validation else self.loss_trained
        before, best, end = (shown(perplexity(loss)) for loss in (self.loss_before, self.loss_trained, last))
        return (
            f"training did not improve {name}: validation perplexity was {before} before, {best} in the best trained "
            f"state and {end} at the end; lower the learning rate, or train on more text of the kind that validates"
        )

    def to_json(self) -> dict[str, Any]:
        """The figures for ``--json``: perplexities, and losses for the curves."""
        return {
            "tokens": self.tokens,
            "seconds": self.seconds,
            "improved": self.improved,
            "perplexity_before": perplexity(self.loss_before),
            "perplexity_trained": perplexity(self.loss_trained),
            "perplexity_after": perplexity(self.loss_after),
            "curve": [list(point) for point in self.curve],
            "validation": [list(point) for point in self.validation],
            "scalars": {name: [list(point) for point in points] for name, points in self.scalars.items()},
        }

    def __str__(self) -> str:
        before, trained = (shown(perplexity(loss)) for loss in (self.loss_before, self.loss_trained))
        sentence = (
            f"validation perplexity {before} before, {trained} after {self.tokens:,} tokens of training "
            f"({self.seconds:,.0f} s)"
        )
        if self.improved:
            return sentence
        kept = "before" if self.loss_after == self.loss_before else "after"
        return f"{sentence}: training did not improve the model, and it is left as it was {kept} training"

    def _repr_html_(self) -> str:
        rows = [
            ("before", perplexity(self.loss_before)),
            ("trained", perplexity(self.loss_trained)),
            ("as it is left", perplexity(self.loss_after)),
        ]
        table = Table(["", "validation perplexity"], [[name, shown(value)] for name, value in rows])
        return f"{table.html()}\n<p>{self.tokens:,} tokens in {self.seconds:,.0f} s</p>"


def perplexity(loss: float) -> float:
    """The perplexity of a loss in nats per token; finite, however bad the loss is.

    Examples:
        >>> perplexity(0.0)
        1.0
    """
    return math.exp(min(loss, 700.0))
