"""The scalars of a healed model over its training, which ``krony heal`` leaves in the model's folder."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from pathlib import Path

from krony.errors import KronyError
from krony.pages import Table
from krony.pictures import lines
from krony.storage.files import write_json
from krony.storage.tensor_files import read_json

FILE = "scalars.json"
MOST = 14  # curves that a picture can show each

# name of a layer -> tokens seen, and the scalar of each factor there
Trajectories = dict[str, list[tuple[int, list[float]]]]


def write_trajectories(folder: Path, scalars: Trajectories) -> None:
    """Writes the trajectories to a model's folder."""
    write_json(folder / FILE, scalars)


def read_trajectories(folder: Path) -> Trajectories:
    """The trajectories in a model's folder. Raises KronyError where there are none, or the file is malformed."""
    file = folder / FILE
    if not file.is_file():
        raise KronyError(f"{folder} holds no {FILE}: krony heal writes it to OUT where the model has scalars")
    found = read_json(file)
    try:
        known = {str(name): [(int(t), [float(v) for v in values]) for t, values in found[name]] for name in found}
        if not all(points and len({len(values) for _, values in points}) == 1 for points in known.values()):
            raise ValueError
    except (TypeError, ValueError):
        raise KronyError(f"{file} is malformed: per layer it has pairs of tokens and scalars") from None
    return known


def table(scalars: Trajectories) -> Table:
    """One row per layer: its scalars at first and at last."""
    columns = ["layer", "scalars before", "after", "tokens"]
    rows = [
        [name, *(" ".join(f"{value:.3f}" for value in points[place][1]) for place in (0, -1)), f"{points[-1][0]:,}"]
        for name, points in scalars.items()
    ]
    return Table(columns, rows)


def picture(scalars: Trajectories) -> str:
    """Every scalar against tokens as SVG; of many the median of each factor over the layers, and the extremes."""
    curves = dict(_curves(scalars))
    ends = [[points[place][1] for points in curves.values()] for place in (0, -1)]
    before, after = (f"{min(values):.2f} to {max(values):.2f}" for values in ends)
    tokens = max(points[-1][0] for points in curves.values())
    return lines(
        curves if len(curves) <= MOST else _summary(scalars),
        title=f"Over {tokens:,} tokens the {len(curves)} scalars go from {before} (median "
        f"{statistics.median(ends[0]):.2f}) to {after} (median {statistics.median(ends[1]):.2f})",
        x="tokens",
        y="scalar",
    )


def _curves(scalars: Trajectories) -> Iterator[tuple[str, list[tuple[float, float]]]]:
    """Each scalar's points by the name of its layer and the number of its factor."""
    for name, points in scalars.items():
        for number in range(len(points[0][1])):
            yield f"{name}, factor {number}", [(tokens, values[number]) for tokens, values in points]


def _summary(scalars: Trajectories) -> dict[str, list[tuple[float, float]]]:
    """The median of each factor over the layers, and the smallest and the largest scalar of all."""
    at: dict[int, list[list[float]]] = {}
    for points in scalars.values():
        for tokens, values in points:
            at.setdefault(tokens, []).append(values)
    factors = max(len(values) for rows in at.values() for values in rows)
    found = {
        f"factor {number}, median of the layers": [
            (float(tokens), statistics.median(values[number] for values in rows if len(values) > number))
            for tokens, rows in at.items()
        ]
        for number in range(factors)
    }
    for name, extreme in (("the smallest of all", min), ("the largest of all", max)):
        found[name] = [(float(tokens), extreme(map(extreme, rows))) for tokens, rows in at.items()]
    return found
