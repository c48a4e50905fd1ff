"""What was predicted and measured for each size: as a table, as a picture, and as JSON."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from krony.pages import Table
from krony.pictures import lines


@dataclass(frozen=True, kw_only=True)
class Point:
    """One size of a model.

    Attributes:
        scheme: what makes it.
        params: its unique parameters, at most.
        bytes: what they take in the model's dtype.
        predicted: its perplexity relative to the original's, from the cost curves.
        measured: the same, measured on text that was held back.
        low: the lower end of the 95 % interval of ``measured``.
        high: its upper end.
    """

    scheme: str
    params: int
    bytes: int
    predicted: float
    measured: float
    low: float
    high: float


@dataclass(frozen=True, kw_only=True)
class Frontier:
    """Quality against size.

    Attributes:
        model: the original's name.
        params: its unique parameters.
        bytes: what they take in its dtype.
        tokens: the tokens that the sizes were measured on.
        points: the sizes, the largest first.
    """

    model: str
    params: int
    bytes: int
    tokens: int
    points: Sequence[Point]

    def __str__(self) -> str:
        return f"{self.table().markdown()}\n\n{self.summary()}"

    def _repr_html_(self) -> str:
        """The table, the picture and the summary, for a notebook."""
        return f"{self.table().html()}{self.picture()}<p>{self.summary()}</p>"

    def table(self) -> Table:
        """A row per size."""
        columns = ["size", "parameters", "of original", "MB", "predicted", "measured", "95 % interval"]
        original = ["the original", f"{self.params:,}", "100.0%", f"{self.bytes / 1e6:.1f}", "", "1.000", ""]
        rows = [
            [p.scheme, f"{p.params:,}", f"{p.params / self.params:.1%}", f"{p.bytes / 1e6:.1f}", f"{p.predicted:.3f}"]
            + [f"{p.measured:.3f}", f"{p.low:.3f} to {p.high:.3f}"]
            for p in self.points
        ]
        return Table(columns, [original, *rows])

    def summary(self) -> str:
        """What the figures are."""
        return (
            f"predicted and measured are the perplexity relative to the original's; measured on {self.tokens:,} tokens "
            "that were held back from calibration"
        )

    def picture(self) -> str:
        """Measured and predicted perplexity against the parameters, as SVG."""
        size = {"the original": [(self.params / 1e6, 1.0)]}
        size["measured"] = [(p.params / 1e6, p.measured) for p in reversed(self.points)]
        size["predicted"] = [(p.params / 1e6, p.predicted) for p in reversed(self.points)]
        middle = self.points[len(self.points) // 2]
        return lines(
            size,
            title=f"{self.model}: {middle.scheme} costs {middle.measured:.2f} times the perplexity; less is better",
            x="million parameters",
            y="times the original's perplexity",
            log=True,
        )

    def to_json(self) -> dict[str, Any]:
        """The figures for ``--json``."""
        return asdict(self)
