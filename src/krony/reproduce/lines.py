"""What every table returns: lines with the paper's figure, krony's and the difference."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from statistics import fmean
from typing import Any

from krony.pages import Table
from krony.pictures import lines


@dataclass(frozen=True, kw_only=True)
class Line:
    """One figure of a table. ``paper_ratio`` and ``ratio`` are relative to the base model, for other tokenizers.

    Attributes:
        row: the table's row, as the paper names it.
        quantity: the column.
        paper: the paper's figure, or None where it prints none.
        ours: krony's figure, or None where nothing was run.
        quoted: the paper's figure is shown without running anything.
        note: the reason, or what differs.
        digits: decimal places shown.
        comparable: whether the two figures can be subtracted; the norms of two different models can't.
        spread: the smallest and the largest of krony's figures over several seeds; ``ours`` is then their mean.
    """

    row: str
    quantity: str
    paper: float | None
    ours: float | None
    paper_ratio: float | None = None
    ratio: float | None = None
    quoted: bool = False
    note: str = ""
    digits: int = 2
    comparable: bool = True
    spread: tuple[float, float] | None = None

    @property
    def difference(self) -> float | None:
        """Krony's figure minus the paper's: of the ratios where there are any, otherwise of the figures."""
        theirs, ours = (self.paper, self.ours) if self.ratio is None else (self.paper_ratio, self.ratio)
        return None if theirs is None or ours is None or not self.comparable else ours - theirs

    def to_json(self) -> dict[str, Any]:
        """The line for ``--json``."""
        names = ("row", "quantity", "paper", "ours", "difference", "paper_ratio", "ratio", "quoted", "note", "spread")
        return {name: getattr(self, name) for name in names}


@dataclass(frozen=True)
class Verdict:
    """Whether a table agrees with the paper's, and the sentences that say why."""

    agrees: bool
    sentences: list[str]

    def __str__(self) -> str:
        return f"Verdict: {'agrees' if self.agrees else 'differs'}. {' '.join(self.sentences)}"

    def to_json(self) -> dict[str, Any]:
        """The verdict for ``--json``."""
        return {"agrees": self.agrees, "sentences": self.sentences}


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """A table of the paper after its run.

    Attributes:
        target: ``table1`` and so on.
        title: what the table shows.
        model: the model it was run with.
        header: sentences before the table: the model, the budget, the tokens.
        lines: the figures.
        footer: sentences after the table.
        curves: Figure 1's, ``{model: [(share of the epoch, nats per token), …]}``.
        is_gpt2: whether the model is the paper's.
        verdict: whether the table agrees with the paper's; None where nothing was run.
        seconds: wall time of the run.
    """

    target: str
    title: str
    model: str
    header: list[str] = field(default_factory=list)
    lines: list[Line] = field(default_factory=list)
    footer: list[str] = field(default_factory=list)
    curves: dict[str, list[tuple[float, float]]] = field(default_factory=dict)
    is_gpt2: bool = True
    verdict: Verdict | None = None
    seconds: float = 0.0

    def table(self) -> Table:
        """The lines as a table; ratios get columns of their own where there are any."""
        ratios = any(line.ratio is not None or line.paper_ratio is not None for line in self.lines)
        columns = ["", "", "paper", "ours", "difference"]
        if ratios:
            columns = ["", "", "paper", "ours", "paper, of base", "ours, of base", "difference"]
        rows = []
        for line in self.lines:
            cells = [_figure(line.paper, line.digits) + (" (quoted)" if line.quoted else "")]
            cells.append(_figure(line.ours, line.digits))
            if ratios:
                cells += [_figure(line.paper_ratio, 3), _figure(line.ratio, 3)]
            digits = 3 if line.ratio is not None else line.digits
            rows.append([line.row, line.quantity, *cells, _figure(line.difference, digits, sign=True)])
        if any(line.spread for line in self.lines):
            columns.append("over seeds")
            for row, line in zip(rows, self.lines, strict=True):
                low, high = line.spread or (None, None)
                row.append("" if low is None else f"{_figure(low, line.digits)} to {_figure(high, line.digits)}")
        if any(line.note for line in self.lines):
            columns.append("note")
            rows = [[*row, line.note] for row, line in zip(rows, self.lines, strict=True)]
        return Table(columns, rows)

    def picture(self) -> str:
        """The curves as SVG."""
        ends = {name: points[-1][1] for name, points in self.curves.items()}
        best, *others = sorted(ends, key=lambda name: ends[name])
        last = max(share for points in self.curves.values() for share, _ in points)
        title = f"After {last:.0%} of an epoch {best} is at {ends[best]:.3f} nats per token"
        title += "".join(f", {name} at {ends[name]:.3f}" for name in others)
        return lines(
            self.curves, title=f"{title} (less is better)", x="share of an epoch", y="validation loss, nats per token"
        )

    def to_json(self) -> dict[str, Any]:
        """The outcome for ``--json``."""
        return {
            "target": self.target,
            "title": self.title,
            "model": self.model,
            "header": self.header,
            "lines": [line.to_json() for line in self.lines],
            "footer": self.footer,
            "curves": {name: [list(point) for point in points] for name, points in self.curves.items()},
            "verdict": None if self.verdict is None else self.verdict.to_json(),
            "seconds": self.seconds,
        }


def mean_of(outcomes: Sequence[Outcome]) -> Outcome:
    """The table of several seeds: the means of krony's figures with their ranges, and the first seed's sentences."""
    first = outcomes[0]
    if len(outcomes) == 1:
        return first
    merged = []
    for same in zip(*(outcome.lines for outcome in outcomes), strict=True):
        figures = [line.ours for line in same if line.ours is not None]
        ratios = [line.ratio for line in same if line.ratio is not None]
        if figures:
            changes = {"ours": fmean(figures), "spread": (min(figures), max(figures))}
            same = (replace(same[0], **changes, ratio=fmean(ratios) if ratios else None),)
        merged.append(same[0])
    curves = {
        name: [
            (share, fmean(outcome.curves[name][place][1] for outcome in outcomes))
            for place, (share, _) in enumerate(points)
        ]
        for name, points in first.curves.items()
    }
    footer = [sentence for sentence in first.footer if all(sentence in outcome.footer for outcome in outcomes)]
    return replace(first, lines=merged, curves=curves, footer=footer)


def _figure(value: float | None, digits: int, *, sign: bool = False) -> str:
    if value is None:
        return ""
    value = round(value, digits) + 0.0  # no -0.00
    return f"{value:{'+' if sign else ''},.{digits}f}"
