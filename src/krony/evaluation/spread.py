"""How sure the median of repeated measurements is, and whether it tells two models apart."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Literal, NamedTuple

LEVEL = 0.9  # of the interval
LEAST = 5  # measurements: fewer have no interval of this level


def spread(values: Sequence[float]) -> float | None:
    """The width of the 90% interval of the median, relative to the median; None for fewer than five values.

    The interval lies between two of the sorted values and assumes nothing about their distribution (Conover 1999,
    Practical Nonparametric Statistics, 3.2). Of five to seven values it is that from the least to the largest; more
    values make it narrower, and a single outlier then doesn't count.

    Examples:
        >>> spread([1.0, 1.25, 0.75, 1.0, 1.0])
        0.5
        >>> spread([1.0, 1.1]) is None
        True
    """
    if len(values) < LEAST:
        return None
    from scipy.stats import quantile_test  # slow to import

    low, high = quantile_test(values, p=0.5).confidence_interval(LEVEL)
    return float(high - low) / statistics.median(values)


class Comparison(NamedTuple):
    """A model's speed relative to another's, and the spread of this ratio; None where there are too few turns."""

    ratio: float
    spread: float | None

    @property
    def verdict(self) -> Literal["faster", "slower"] | None:
        """Whether the model is faster; None if its difference to 1 is not larger than the spread."""
        if self.spread is None or abs(self.ratio - 1) <= self.spread:
            return None
        return "faster" if self.ratio > 1 else "slower"

    def sentence(self, name: str, first: str) -> str:
        """The verdict on the model ``name`` against ``first``, or why there is none."""
        found = f"{self.ratio:.2f} times as fast as {first}"
        if self.spread is None:
            return f"no verdict on {name}: {found}, from too few turns for a spread: ask for --rounds {LEAST} or more"
        if self.verdict is None:
            why = f"the spread is {self.spread:.1%}: measure with more --rounds on a quiet machine"
            return f"no verdict on {name}: {found}, and {why}"
        return f"{name} is {found} (spread {self.spread:.1%})"


def compare(first: Sequence[float], other: Sequence[float]) -> Comparison:
    """The median, over the turns, of the first model's seconds divided by the other's, and the spread of this ratio.

    The models took turns, so what slows the machine down for a while slows both down, and cancels in a turn's ratio.
    Raises ValueError if the numbers of turns differ.

    Examples:
        >>> compare([2.0, 4.0, 2.0, 2.2, 2.0], [1.0, 2.0, 1.0, 1.1, 1.0])  # the second turn was disturbed
        Comparison(ratio=2.0, spread=0.0)
    """
    ratios = [one / two for one, two in zip(first, other, strict=True)]
    return Comparison(statistics.median(ratios), spread(ratios))
