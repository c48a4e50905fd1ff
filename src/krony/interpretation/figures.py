"""The pictures of ``krony inspect --report``, as SVG."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from krony.interpretation.subspaces import kind_of, number_of
from krony.interpretation.views import FactorView, Interpretation, LayerFactors, Similarity
from krony.pictures import bars, heatmaps, lines

WIDE = 8  # right factors beside each other
CELLS = 4096  # a right factor with more is drawn in part


def by_kind(seen: Interpretation) -> dict[str, list[LayerFactors]]:
    """The layers of each kind, such as ``mlp.c_fc``."""
    kinds: dict[str, list[LayerFactors]] = {}
    for layer in seen.layers:
        kinds.setdefault(kind_of(layer.name), []).append(layer)
    return kinds


def right_factors(kind: str, layers: list[LayerFactors]) -> str:
    """Every right factor of a kind of matrix, divided by its norm, as coloured cells."""
    same = [layer for layer in layers if layer.right == layers[0].right]
    panels = {}
    for layer in same:
        for factor in layer.factors:
            norm = sum(x * x for row in factor.right for x in row) ** 0.5 or 1.0
            panels[f"{number_of(layer.name)}.{factor.index}"] = [[x / norm for x in row] for row in factor.right]
    k = len(layers[0].factors)
    size = "x".join(map(str, layers[0].right))
    return heatmaps(
        panels,
        title=f"The {len(panels)} right factors B of {kind}, {size}, each divided by its norm",
        axis="entry of B / ‖B‖",
        x="column of B (layer.factor above)",
        y="row of B",
        columns=max(1, WIDE // k) * k,
        signed=True,
    )


def spectra(layer: LayerFactors) -> str:
    """The singular values of every left factor of a layer, relative to the largest."""
    curves = {}
    for factor in layer.factors:
        largest = factor.singular_values[0] or 1.0
        curves[f"factor {factor.index}"] = [(n + 1.0, s / largest) for n, s in enumerate(factor.singular_values)]
    ranks = ", ".join(f"{factor.effective_rank:.0f}" for factor in layer.factors)
    title = f"{layer.name}: effective rank {ranks} of {min(layer.left)}"
    return lines(curves, title=title, x="number of the singular value of A", y="σ / largest σ")


def _curves(
    layers: list[LayerFactors], figure: Callable[[FactorView], float | None]
) -> Iterator[tuple[str, list[tuple[float, float]]]]:
    """For each number of a factor its figures by layer."""
    for index in range(max(len(layer.factors) for layer in layers)):
        found = [
            (float(place), value)
            for place, layer in enumerate(layers)
            if index < len(layer.factors) and (value := figure(layer.factors[index])) is not None
        ]
        if found:
            yield (
                f"factor {index}",
                [(float(number_of(layers[int(n)].name)) if _numbered(layers) else n, y) for n, y in found],
            )


def _numbered(layers: list[LayerFactors]) -> bool:
    return all(number_of(layer.name).isdigit() for layer in layers)


def effective_ranks(kind: str, layers: list[LayerFactors]) -> str:
    """The effective rank of every left factor by layer."""
    ranks = [factor.effective_rank for layer in layers for factor in layer.factors]
    title = f"Left factors of {kind}: effective rank {min(ranks):.1f} to {max(ranks):.1f} of {min(layers[0].left)}"
    return lines(dict(_curves(layers, lambda f: f.effective_rank)), title=title, x="layer", y="effective rank of A")


def shares(kind: str, layers: list[LayerFactors]) -> str:
    """Every factor's share of the output energy by layer."""
    largest = max(
        ((factor.share, layer, factor) for layer in layers for factor in layer.factors), key=lambda one: one[0]
    )
    title = (
        f"Output energy of {kind}: the largest share is {largest[0]:.0%}, layer {number_of(largest[1].name)}, factor "
    )
    title += str(largest[2].index)
    return lines(dict(_curves(layers, lambda f: f.share)), title=title, x="layer", y="share of the output energy")


def ablations(kind: str, layers: list[LayerFactors]) -> str:
    """The perplexity without each factor relative to the model's, by layer."""
    ratios = [(factor.ratio, layer, factor) for layer in layers for factor in layer.factors if factor.ratio is not None]
    worst = max(ratios, key=lambda one: one[0])
    where = f"layer {number_of(worst[1].name)}, factor {worst[2].index}"
    title = f"Without one factor of {kind}: at most {worst[0]:.2f} times the perplexity ({where})"
    if len(layers) == 1:
        lengths = {f"factor {factor.index}": ratio for ratio, _, factor in ratios}
        return bars({"": lengths}, title=title, axis="times the model's perplexity", level=1.0, log=True)
    return lines(
        dict(_curves(layers, lambda f: f.ratio)),
        title=title,
        x="layer",
        y="times the model's perplexity",
        level=("the model", 1.0),
        log=True,
    )


def similarity(found: Similarity) -> str:
    """The mean of cos² of the principal angles for each pair of subspaces."""
    what = "Leading directions of the left factors" if found.of == "left" else "Spans of the right factors"
    title = f"{what} of {found.kind}: mean cos² between layers {found.across:.2f}, by chance {found.chance:.2f}"
    name = "layer.factor" if found.of == "left" else "layer"
    return heatmaps(
        {f"{found.directions} of {found.space} dimensions": found.mean_cos2},
        title=title,
        axis="mean cos² of the principal angles",
        x=name,
        y=name,
        ticks=found.names,
    )
