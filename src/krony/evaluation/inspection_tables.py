"""What ``krony inspect`` shows: a table, the reasons for forward paths, and a picture."""

from __future__ import annotations

import re
import statistics
from collections.abc import Sequence

from krony.evaluation.inspection import LayerView
from krony.pages import Table
from krony.pictures import lines


def table(views: Sequence[LayerView]) -> Table:
    """One row per matrix; with a base, also the share of its norm that is left, and the error."""
    columns = ["layer", "shape", "Frobenius", "l1", "largest σ", "median σ", "smallest σ", "scalars", "path"]
    rows = [
        [v.name, v.shape, f"{v.frobenius:.2f}", f"{v.l1:,.0f}", *(f"{s:.3g}" for s in v.singular_values)]
        + [" ".join(f"{s:.2f}" for s in v.scalars or []), _path(v)]
        for v in views
    ]
    if any(v.error is not None for v in views):
        columns += ["of base", "error"]
        rows = [[*row, f"{v.kept:.1%}", f"{v.error:.3f}"] for row, v in zip(rows, views, strict=True)]
    return Table(columns, rows)


def explanations(views: Sequence[LayerView]) -> list[str]:
    """Sentences that say why each forward path was chosen."""
    reasons = dict.fromkeys((_path(v), v.why) for v in views if v.why is not None)
    sentences = [f"{path}: {why}" for path, why in reasons]
    if any(v.fused for v in views):
        sentences.append(
            "fused: up, activation and down of an MLP run in one step, and its hidden features stay in their own order"
        )
    return sentences


def picture(views: Sequence[LayerView]) -> str:
    """The error of every matrix by layer, or the norm if there is no base: one curve per kind of matrix, as SVG."""
    has_base = any(v.error is not None for v in views)
    values = [(v.name, v.frobenius if v.error is None else v.error) for v in views]
    worst = max(values, key=lambda pair: pair[1])
    if has_base:
        middle = statistics.median(value for _, value in values)
        title = f"Relative error: median {middle:.3f}, largest {worst[1]:.3f} in {worst[0]} (less is better)"
    else:
        title = f"Frobenius norm of every matrix: largest {worst[1]:,.4g} in {worst[0]}"
    axis = "relative error, Frobenius norm" if has_base else "Frobenius norm"
    return lines(by_layer(values), title=title, x="layer", y=axis)


def by_layer(values: Sequence[tuple[str, float]]) -> dict[str, list[tuple[float, float]]]:
    """Values of named layers as curves: ``{kind of matrix: [(number of the layer, value), …]}``.

    Examples:
        >>> by_layer([("h.0.mlp.c_fc", 0.5), ("h.1.mlp.c_fc", 0.6)])
        {'mlp.c_fc': [(0.0, 0.5), (1.0, 0.6)]}
    """
    curves: dict[str, list[tuple[float, float]]] = {}
    for name, value in values:
        found = re.search(r"(?:^|\.)(\d+)\.(.+)$", name)
        kind, number = (found[2], float(found[1])) if found else (name, 0.0)
        curves.setdefault(kind, []).append((number, value))
    return {kind: sorted(points) for kind, points in curves.items()}


def _path(view: LayerView) -> str:
    """A layer's forward path for 512 tokens, and that of decoding if it is another."""
    if view.path is None:
        return ""
    decode = "" if view.decode_path == view.path else f", decode {view.decode_path}"
    return f"{view.path}{decode}{', fused' if view.fused else ''}"
