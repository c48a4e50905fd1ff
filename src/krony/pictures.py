"""Pictures as SVG, all in one style: curves, bars, and matrices as coloured cells.

Every picture has a title that says what it shows, and its legend below, where it covers no data. The background is
transparent. Text and colours adapt to a light or dark page wherever the viewer knows which it is.
"""

from __future__ import annotations

import html
import io
import math
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

Pairs = Sequence[tuple[float, float]]

# On a light page and on a dark one. The colour-blind can tell the colours apart; markers and hatches help in print.
INK, FAINT = ("#1f2328", "#e6edf3"), ("#d0d7de", "#3d444d")
COLOURS = (
    ("#0072b2", "#4ba6e0"),  # blue
    ("#d55e00", "#f0883e"),  # vermilion
    ("#009e73", "#3fcf9f"),  # green
    ("#c2609a", "#e39cc3"),  # pink
    ("#b97d00", "#e6b84a"),  # ochre
    ("#6f5bb5", "#a99be0"),  # violet
    INK,
)
MARKERS, HATCHES, DASHES = "osD^vPX", ("", "///", "...", "\\\\\\", "xx", "++", "oo"), ("-", "--", ":")
WIDTH = 7.2  # inches
LINE = 0.2  # inches per line of text
MANY = 24  # points of a curve, or bars, from which each is drawn smaller and without its figure


def lines(
    series: Mapping[str, Pairs],
    *,
    title: str,
    x: str,
    y: str,
    level: tuple[str, float] | None = None,
    top: float | None = None,
    log: bool = False,
    log_x: bool = False,
) -> str:
    """Curves.

    Args:
        series: the points ``(x, y)`` of each curve by its name.
        title: what the picture shows; a sentence.
        x: what the horizontal axis shows, with the unit.
        y: what the vertical axis shows, with the unit.
        level: the name and the height of a horizontal line.
        top: the highest value drawn. The legend lists the values of a curve that are above it.
        log: whether the vertical axis is logarithmic.
        log_x: whether the horizontal axis is.

    Examples:
        >>> svg = lines({"loss": [(0, 3.5), (1, 3.2)]}, title="One step helps", x="step", y="nats per token")
        >>> "One step helps" in svg
        True
    """
    names = [_label(name, points, top) for name, points in series.items()] + ([level[0]] if level else [])

    def draw(axes: Any) -> None:
        for index, (name, points) in enumerate(zip(names, series.values(), strict=False)):
            small = len(points) > MANY
            axes.plot(
                *zip(*points, strict=True),
                label=name,
                color=COLOURS[index % 7][0],
                marker=MARKERS[index % 7],
                linestyle=DASHES[index // 7 % 3],
                markersize=3 if small else 5,
                linewidth=1.2 if small else 1.6,
            )
        if level is not None:
            axes.axhline(level[1], color=INK[0], linestyle=":", linewidth=1.2, label=level[0])
        axes.set(xlabel=x, ylabel=y)
        values = [value for points in series.values() for _, value in points] + ([level[1]] if level else [])
        _scale(axes, "y", values, log, top)
        places = [place for points in series.values() for place, _ in points]
        _scale(axes, "x", places, log_x, None)
        if not log_x and all(float(place).is_integer() for place in places):
            axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(axis="y", color=FAINT[0], linewidth=0.8)

    return _svg(draw, title, height=3.0, legend=names)


def bars(
    groups: Mapping[str, Mapping[str, float]], *, title: str, axis: str, level: float | None = None, log: bool = False
) -> str:
    """Horizontal bars: one row per place, and in it one bar per group.

    Args:
        groups: ``{group: {place: length}}``.
        title: what the picture shows; a sentence.
        axis: what the lengths are, with the unit.
        level: a value to compare with, drawn as a line. Logarithmic bars start there, others at 0.
        log: whether the axis is logarithmic.

    Examples:
        >>> svg = bars({"prefill": {"original": 1.0, "half": 1.8}}, title="Half is faster", axis="times the original")
        >>> "Half is faster" in svg
        True
    """
    places = list(dict.fromkeys(place for lengths in groups.values() for place in lengths))
    start = (level or 1.0) if log else 0.0

    def draw(axes: Any) -> None:
        width = 0.8 / len(groups)
        for index, (group, lengths) in enumerate(groups.items()):
            middles = [places.index(place) + (index - (len(groups) - 1) / 2) * width for place in lengths]
            drawn = axes.barh(
                middles,
                [length - start for length in lengths.values()],
                width,
                left=start,
                label=group,
                color=COLOURS[index % 7][0],
                hatch=HATCHES[index % 7],
                edgecolor="white",
                linewidth=0,
            )
            if len(places) * len(groups) <= MANY:
                axes.bar_label(drawn, [_short(length) for length in lengths.values()], padding=3, fontsize=9)
        if level is not None:
            axes.axvline(level, color=INK[0], linewidth=1.2, zorder=0.9)  # behind the bars
        axes.set_yticks(range(len(places)), places)
        axes.set_ylim(len(places) - 0.5, -0.5)
        axes.set_xlabel(axis)
        values = [length for lengths in groups.values() for length in lengths.values()]
        _scale(axes, "x", [*values, start], log, None)
        axes.margins(x=0.08)
        axes.grid(axis="x", color=FAINT[0], linewidth=0.8)
        axes.tick_params(axis="y", length=0)

    row = LINE * max(1.2, 0.75 * len(groups) + 0.35)
    return _svg(draw, title, height=0.7 + row * len(places), legend=list(groups) if len(groups) > 1 else [])


def heatmaps(
    panels: Mapping[str, Sequence[Sequence[float]]],
    *,
    title: str,
    axis: str,
    x: str,
    y: str,
    columns: int = 1,
    signed: bool = False,
    ticks: Sequence[str] | None = None,
) -> str:
    """Matrices as coloured cells, from 0 (transparent) to 1; ``signed``: from -1 in vermilion to 1 in blue.

    Args:
        panels: the rows of each matrix by its name, which stands above it. All have the same size.
        title: what the picture shows; a sentence.
        axis: what the colours mean, with the unit.
        x: what the columns of a matrix are.
        y: what its rows are.
        columns: matrices beside each other.
        signed: whether values may be negative.
        ticks: the names of the rows, which are those of the columns too; numbers if there are none.

    Examples:
        >>> svg = heatmaps({"B": [[1.0, 0.0]]}, title="One half", axis="entry", x="column", y="row", signed=True)
        >>> "One half" in svg
        True
    """
    first = next(iter(panels.values()))
    high, wide = len(first), len(first[0])
    columns, rows = min(columns, len(panels)), math.ceil(len(panels) / columns)
    cell = min(0.85 * (WIDTH - 0.6) / columns / wide, 1.6 / high if len(panels) > 1 else 4.5 / high, 0.6)  # inches

    def fill(figure: Any) -> None:
        from matplotlib.cm import ScalarMappable
        from matplotlib.colors import LinearSegmentedColormap, Normalize, to_rgba

        ends = [to_rgba(COLOURS[0][0], 0.0), to_rgba(COLOURS[0][0], 1.0)]
        if signed:
            ends = [to_rgba(COLOURS[1][0], 1.0), to_rgba(COLOURS[1][0], 0.0), *ends]
        places = [0.0, 0.5, 0.5, 1.0] if signed else [0.0, 1.0]
        colours = LinearSegmentedColormap.from_list("krony", list(zip(places, ends, strict=True)))
        scale = Normalize(-1.0 if signed else 0.0, 1.0)
        grid = figure.subplots(rows, columns, squeeze=False)
        for index, axes in enumerate(grid.flat):
            if index >= len(panels):
                axes.set_axis_off()
                continue
            name, values = list(panels.items())[index]
            axes.imshow(values, cmap=colours, norm=scale, interpolation="none")
            axes.set_title(name, fontsize=8)
            axes.tick_params(length=0, labelsize=8)
            for side, count in (("x", wide), ("y", high)):
                step = math.ceil(count * (0.16 if ticks is None else 0.14) / (cell * count))  # so that labels fit
                marks = range(0, count, max(1, step))
                getattr(axes, f"set_{side}ticks")(marks, [str(m) if ticks is None else ticks[m] for m in marks])
            if ticks is not None:
                axes.tick_params(axis="x", rotation=90)
        figure.supxlabel(x, fontsize=9)
        figure.supylabel(y, fontsize=9)
        bar = figure.colorbar(ScalarMappable(scale, colours), ax=grid, location="right", shrink=0.8, aspect=30)
        bar.set_label(axis, fontsize=9)
        bar.ax.tick_params(labelsize=8)

    return _figure(fill, title, height=max(1.4, rows * (cell * high + 0.45) + 0.5))


def _label(name: str, points: Pairs, top: float | None) -> str:
    """The name of a curve, with the values that are above the picture."""
    above = [value for _, value in points if top is not None and value > top]
    if not above:
        return name
    shown = ", ".join(map(_short, above)) if len(above) <= 3 else f"{_short(above[0])} … {_short(above[-1])}"
    return f"{name} ({'above' if len(above) < len(points) else 'all above'}: {shown})"


def _short(value: float) -> str:
    """Three digits, or the complete number where it is larger: 1.78, 42.8, 60,137."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}"


def _scale(axes: Any, side: str, values: Sequence[float], log: bool, top: float | None) -> None:
    """Linear or logarithmic ticks with plain numbers, and the highest value shown."""
    from matplotlib.ticker import LogLocator, NullLocator

    axis = getattr(axes, f"{side}axis")
    limits = getattr(axes, f"set_{side}lim")
    shown = [value for value in values if top is None or value <= top]
    if log:
        getattr(axes, f"set_{side}scale")("log")
        high = top or max(shown)
        decades = math.log10(high / min(shown)) if min(shown) > 0 else 9.0
        steps = (1.0, 1.2, 1.5, 2.0, 3.0, 4.0, 5.0, 7.0) if decades < 1.3 else (1.0, 2.0, 5.0)
        axis.set_major_locator(LogLocator(subs=steps if decades < 3.5 else (1.0,), numticks=20))
        axis.set_minor_locator(NullLocator())
        if top is not None:
            limits(min(shown) / (high / min(shown)) ** 0.04, top)
    elif top is not None:
        limits(top=top)
    axis.set_major_formatter(_plain)


def _plain(value: float, _: object = None) -> str:
    """10,000 rather than 10⁴."""
    return f"{value:,.10g}"


def _svg(draw: Callable[[Any], None], title: str, *, height: float, legend: Sequence[str]) -> str:
    """A picture with its title above and its legend below; ``height`` is that of the axes, in inches."""
    names = [textwrap.fill(name, 84) for name in legend]
    longest = max((len(name) for name in names), default=0)
    columns = 3 if longest <= 22 else 2 if longest <= 42 else 1
    rows = sum(1 + name.count("\n") for name in names) if columns == 1 else math.ceil(len(names) / columns)

    def fill(figure: Any) -> None:
        axes = figure.add_subplot()
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        draw(axes)
        if names:
            handles, _ = axes.get_legend_handles_labels()
            figure.legend(
                handles, names, loc="outside lower left", ncols=columns, frameon=False, fontsize=9, handlelength=2.4
            )

    return _figure(fill, title, height=height + LINE * rows)


def _figure(fill: Callable[[Any], None], title: str, *, height: float) -> str:
    """A figure with its title above; ``height`` is that of all the rest, in inches."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure  # not pyplot: no window system, no state

    heading = textwrap.wrap(title, 78, break_on_hyphens=False)
    style: Any = {
        "svg.hashsalt": "krony",  # the same figures give the same file
        "svg.fonttype": "none",  # text is text
        "font.size": 10,
        "hatch.linewidth": 0.6,
        **dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), INK[0]),
    }
    with rc_context(style):
        figure = Figure(figsize=(WIDTH, height + LINE * len(heading) + 0.3), layout="constrained")
        fill(figure)
        figure.suptitle("\n".join(heading), x=0.01, ha="left", fontsize=11, fontweight="bold")
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None}, transparent=True)
    return _adaptive(buffer.getvalue(), title)


def _adaptive(svg: str, title: str) -> str:
    """The picture alone, with a title for screen readers and the colours of a dark page."""
    svg = svg[svg.index("<svg") :]
    end = svg.index(">") + 1
    rules = "\n".join(
        f'[style*="{what}: {light}"], [{what}="{light}"] {{ {what}: {dark} !important }}'
        for light, dark in _distinct((*COLOURS, FAINT))
        for what in ("fill", "stroke")
    )
    dark = f"<style>@media (prefers-color-scheme: dark) {{\n{rules}\n}}</style>"
    return f"{svg[:end]}\n<title>{html.escape(title)}</title>\n{dark}{svg[end:]}"


def _distinct(pairs: Iterable[tuple[str, str]]) -> list[tuple[str, str]]:
    return list(dict.fromkeys(pairs))
