"""Tables and pictures: one look for the terminal, Markdown and the HTML page."""

from __future__ import annotations

import html
import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Pairs = Sequence[tuple[float, float]]

# Okabe and Ito's colours: told apart by the colour-blind; markers and hatches tell them apart in print.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
CROWD = 7  # names that a legend inside a picture holds
MARKERS, HATCHES = "osD^vPX", ("", "//", "..", "\\\\", "xx", "++", "oo")


@dataclass(frozen=True)
class Table:
    """Cells as they are shown; the first column is text, the others figures."""

    columns: Sequence[str]
    rows: Sequence[Sequence[str]]

    def markdown(self) -> str:
        """As a Markdown table."""
        marks = ["---", *["---:"] * (len(self.columns) - 1)]
        return "\n".join(f"| {' | '.join(row)} |" for row in (self.columns, marks, *self.rows))

    def html(self) -> str:
        """As an HTML table."""
        head = "".join(f"<th>{html.escape(c)}</th>" for c in self.columns)
        body = "".join("<tr>" + "".join(f"<td>{html.escape(c)}</td>" for c in row) + "</tr>\n" for row in self.rows)
        return f"<table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{body}</tbody>\n</table>"


def lines(
    series: Mapping[str, Pairs], x: str, y: str, *, level: tuple[str, float] | None = None, log: bool = True
) -> str:
    """A picture of one or more curves, as SVG. ``level`` is a horizontal line with its name; ``log`` is of y."""

    def draw(axes: Any) -> None:
        for index, (name, points) in enumerate(series.items()):
            style = {"color": COLOURS[index % 7], "marker": MARKERS[index % 7], "markersize": 5}
            axes.plot(*zip(*points, strict=True), label=name, **style)
        if level is not None:
            axes.axhline(level[1], color="black", linestyle=":", label=level[0])
        axes.set(xlabel=x, ylabel=y, yscale="log" if log else "linear")
        _plain_numbers(axes.xaxis, axes.yaxis)
        names = len(series) + (level is not None)
        if names <= CROWD:
            axes.legend()
        else:  # it would lie on the lines
            axes.figure.set_figheight(axes.figure.get_figheight() + 0.11 * names)
            axes.figure.legend(loc="outside lower center", ncols=2, frameon=False)

    return _svg(draw)


def bars(groups: Mapping[str, Mapping[str, float]], y: str, *, level: float | None = None, log: bool = False) -> str:
    """A picture of groups of bars, ``{bar: {group: height}}``, as SVG; ``level`` is a horizontal line."""

    def draw(axes: Any) -> None:
        places = list(dict.fromkeys(name for heights in groups.values() for name in heights))
        width = 0.8 / len(groups)
        for index, (bar, heights) in enumerate(groups.items()):
            xs = [places.index(name) + (index - (len(groups) - 1) / 2) * width for name in heights]
            style = {"color": COLOURS[index % 7], "hatch": HATCHES[index % 7], "edgecolor": "white"}
            drawn = axes.bar(xs, list(heights.values()), width, label=bar, **style)
            if len(places) <= 6:
                axes.bar_label(drawn, fmt="{:.3g}", padding=2)
        if level is not None:
            axes.axhline(level, color="black", linestyle=":")
        many = len(places) > 6
        axes.set_xticks(range(len(places)), places, rotation=45 if many else 0, ha="right" if many else "center")
        axes.set_ylabel(y)
        axes.set_yscale("log" if log else "linear")
        _plain_numbers(axes.yaxis)
        if len(groups) > 1:
            axes.legend()

    return _svg(draw)


def page(title: str, parts: Sequence[tuple[str, str]]) -> str:
    """An HTML page that stands alone: headings with HTML below each."""
    body = "\n".join(f"<h2>{html.escape(heading)}</h2>\n{content}" for heading, content in parts)
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<title>{html.escape(title)}</title>
<style>
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }}
table {{ border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: 0.9rem; }}
th, td {{ padding: 0.3rem 0.7rem; text-align: right; border-bottom: 1px solid #ddd; }}
th:first-child, td:first-child {{ text-align: left; }}
svg {{ max-width: 100%; height: auto; }}
blockquote {{ margin: 0.5rem 0; padding-left: 1rem; border-left: 3px solid #ccc; }}
</style>
</head>
<body>
<h1>{html.escape(title)}</h1>
{body}
</body>
</html>
"""


def paragraphs(*sentences: str) -> str:
    """Text as HTML paragraphs."""
    return "\n".join(f"<p>{html.escape(sentence)}</p>" for sentence in sentences)


def _plain_numbers(*sides: Any) -> None:
    """10,000 rather than 10⁴."""
    for side in sides:
        side.set_major_formatter(lambda value, _: f"{value:,.10g}")
        side.set_minor_formatter(lambda value, _: "")


def _svg(draw: Callable[[Any], None]) -> str:
    from matplotlib import rc_context
    from matplotlib.figure import Figure  # not pyplot: no window system, no state

    # the same figures give the same file, and text is drawn as text
    with rc_context({"svg.hashsalt": "krony", "svg.fonttype": "none", "font.size": 10}):
        figure = Figure(figsize=(6.4, 4.0), layout="constrained")
        axes = figure.add_subplot()
        axes.spines[["top", "right"]].set_visible(False)
        draw(axes)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    svg = buffer.getvalue()
    return svg[svg.index("<svg") :]
