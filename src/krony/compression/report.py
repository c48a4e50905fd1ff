"""The result of a compression: figures of every layer and of the model."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from krony.compression.tuning import Tuned
from krony.kronecker.algebra import KronShape
from krony.pages import Table

SHOWN = 3  # layers at the beginning and at the end of a printed table


@dataclass(frozen=True, kw_only=True)
class LayerReport:
    """The figures of one replaced matrix.

    Attributes:
        name: dotted name of its layer.
        shape: its split.
        error: ‖W − Ŵ‖/‖W‖ in Frobenius norm.
        calibrated_error: the same ratio for the layer's outputs on the calibration text; None without text.
        curve: the calibrated error after each round, where the initialisation iterates.
    """

    name: str
    shape: KronShape
    error: float
    calibrated_error: float | None = None
    curve: tuple[float, ...] | None = None

    def to_json(self) -> dict[str, Any]:
        """The figures as JSON objects, lists and numbers."""
        return {
            "name": self.name,
            "left": list(self.shape.left),
            "right": list(self.shape.right),
            "factors": self.shape.factors,
            "error": self.error,
            "calibrated_error": self.calibrated_error,
        } | ({} if self.curve is None else {"curve": list(self.curve)})

    @classmethod
    def from_json(cls, figures: dict[str, Any]) -> LayerReport:
        """The report that ``to_json`` wrote."""
        (m1, n1), (m2, n2) = figures["left"], figures["right"]
        return cls(
            name=figures["name"],
            shape=KronShape(m1, n1, m2, n2, figures["factors"]),
            error=figures["error"],
            calibrated_error=figures["calibrated_error"],
            curve=tuple(figures["curve"]) if "curve" in figures else None,
        )


@dataclass(frozen=True, kw_only=True)
class CompressionReport:
    """The result of ``krony.compress``; ``print`` shows a table, and so does a notebook.

    Attributes:
        scheme: the requested scheme.
        init: the initialisation.
        params_before: unique parameters before; a tied head is counted once.
        params_after: unique parameters afterwards, scalars included.
        seconds: wall-clock time of the compression.
        layers: one report per replaced matrix.
        calibration: where the second moments came from, in words; None without text.
        tuned: what the joint training gained; None without ``tune``.
        made_with: the options, as config.json records them.
    """

    scheme: str
    init: str
    params_before: int
    params_after: int
    seconds: float
    layers: list[LayerReport] = field(default_factory=list)
    calibration: str | None = None
    tuned: Tuned | None = None
    made_with: dict[str, Any] = field(default_factory=dict)

    @property
    def kept_neurons(self) -> list[int]:
        """How many hidden neurons each replaced matrix keeps, where an initialisation keeps complete ones."""
        return [(s.m1 if s.m2 > 1 else s.n1) * s.factors for s in (layer.shape for layer in self.layers)]

    @property
    def slim_padding(self) -> int:
        """The number of zero parameters that ``slim`` adds, because layers that share a budget differ in width."""
        widest = max(self.kept_neurons, default=0)
        others = [layer.shape.n1 if layer.shape.m2 > 1 else layer.shape.m1 for layer in self.layers]
        return sum((widest - kept) * other for kept, other in zip(self.kept_neurons, others, strict=True))

    def to_json(self) -> dict[str, Any]:
        """The figures as JSON objects, lists and numbers."""
        return {
            "scheme": self.scheme,
            "init": self.init,
            "params_before": self.params_before,
            "params_after": self.params_after,
            "seconds": self.seconds,
            "made_with": self.made_with,
            "layers": [layer.to_json() for layer in self.layers],
        } | ({} if self.tuned is None else {"tuned": asdict(self.tuned)})

    def table(self) -> Table:
        """One row per replaced matrix."""
        columns = ["layer", "left", "right", "factors", "error", "error of outputs"]
        return Table(columns, [_row(layer) for layer in self.layers])

    def summary(self) -> str:
        """One sentence: parameters before and after."""
        share = self.params_after / self.params_before
        return f"{self.params_before:,} -> {self.params_after:,} parameters ({share:.1%}) in {self.seconds:.1f} s"

    def sentences(self) -> list[str]:
        """What belongs under the table: what the joint training gained, if there was one, and the summary."""
        return [*([] if self.tuned is None else [self.tuned.summary()]), self.summary()]

    def __str__(self) -> str:
        table = self.table()
        rows = list(table.rows)
        if len(rows) > 2 * SHOWN + 1:
            left_out = [f"… {len(rows) - 2 * SHOWN} more …", *[""] * (len(table.columns) - 1)]
            rows = [*rows[:SHOWN], left_out, *rows[-SHOWN:]]
        widths = [max(map(len, cells)) for cells in zip(table.columns, *rows, strict=True)]
        lines = [
            "  ".join(cell.rjust(width) if index else cell.ljust(width) for index, (cell, width) in enumerate(cells))
            for cells in (list(zip(row, widths, strict=True)) for row in (table.columns, *rows))
        ]
        title = f"{len(self.layers)} matrices, scheme {self.scheme}, init {self.init}"
        return "\n".join([title, *(line.rstrip() for line in lines), *self.sentences()])

    def _repr_html_(self) -> str:
        """The table and the summary, for a notebook."""
        return f"{self.table().html()}<p>{'<br>'.join(self.sentences())}</p>"


def _row(layer: LayerReport) -> list[str]:
    s = layer.shape
    outputs = "" if layer.calibrated_error is None else f"{layer.calibrated_error:.4f}"
    return [layer.name, f"{s.m1}x{s.n1}", f"{s.m2}x{s.n2}", str(s.factors), f"{layer.error:.4f}", outputs]
