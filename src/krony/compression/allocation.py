"""Divides one budget of hidden neurons among all layers, so that the total cost is least.

A method's ranking says what dropping the next neurons of a layer costs. With the sensitivity of the loss to each
layer's outputs, the costs of different layers are in one unit (proportional to nats per token). Each layer's cost curve
is replaced by its lower convex hull; dropping units in the order of rising marginal cost is then optimal.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from torch import Tensor, nn

from krony.compression.plan import CompressionPlan, portion
from krony.compression.replacement import sound_moments
from krony.config import KronyConfig
from krony.errors import KronyError
from krony.init.base import Moments, Ranking
from krony.kronecker.algebra import KronShape
from krony.models.surgery import Group, take_out
from krony.runtime import distributed
from krony.runtime.progress import Progress


@dataclass(frozen=True)
class Allocation:
    """What every layer becomes.

    Attributes:
        shapes: the split of every matrix, by name; layers that stay dense are left out.
        kept: the neurons that an MLP keeps, in rising order, by the name of its first matrix, where they are known.
    """

    shapes: dict[str, KronShape]
    kept: dict[str, Tensor] = field(default_factory=dict)


def allocate(
    model: nn.Module,
    settled: CompressionPlan,
    moments: Iterable[Moments | None],
    progress: Progress,
    rankings: Sequence[Ranking] | None = None,
) -> Allocation:
    """Divides the budget of ``settled``.

    With ``allocation="uniform"`` every layer has its split in ``settled.shapes``. With ``"global"``, ``moments`` holds
    one record per group; ``rankings`` are those of ``ranked`` where they are known. Raises KronyError if the budget has
    less than one portion per layer.
    """
    groups, config, shapes = settled.groups, settled.config, settled.shapes
    if config.allocation == "uniform":
        return Allocation(shapes)
    first = shapes[groups[0].sites[0].name]  # (groups, width) ⊗ (r, 1), k factors
    width, unit = first.rows, least_width(settled)
    if rankings is None:
        rankings = ranked(model, settled, moments, progress, least=unit)
    costs, budget = [ranking.costs for ranking in rankings], first.kept_rows * len(groups)
    widths, allocated = allocate_widths(costs, unit, budget, config.max_width), Allocation({})
    for group, ranking, count in zip(groups, rankings, widths, strict=True):
        if count < width:
            allocated.kept[group.sites[0].name] = ranking.kept(width, count)
            for site in group.sites:
                allocated.shapes[site.name] = site.shape(f"{unit}x{first.columns}:{count // unit}")
    return allocated


def least_width(settled: CompressionPlan) -> int:
    """The fewest hidden neurons that a layer can keep; all layers keep multiples of it."""
    return portion(settled.groups[0].sites[0].out_features, settled.config.multiple_of)


def ranked(
    model: nn.Module, settled: CompressionPlan, moments: Iterable[Moments | None], progress: Progress, *, least: int
) -> list[Ranking]:
    """Per group the ranking of its neurons, all but ``least`` of them, on the CPU.

    ``moments`` holds one record per group, with sensitivity. Processes share the groups.
    """
    rankings: dict[int, Ranking] = {}
    for done, (group, known) in enumerate(zip(settled.groups, moments, strict=True)):
        progress(done, len(settled.groups), "allocation")
        assert known is not None  # ``plan`` has refused configurations without text
        if distributed.does(done):
            rankings[done] = ranking_of(model, group, known, settled.config, least=least)
    return [distributed.result_of(index, rankings) for index in range(len(settled.groups))]


def ranking_of(model: nn.Module, group: Group, moments: Moments, config: KronyConfig, *, least: int) -> Ranking:
    """``ranked`` for a single group, whose weights are in memory."""
    rank = config.initialisation.rank
    assert rank is not None and moments.hidden is not None  # ``plan`` has refused other methods, and single layers
    weight, bias = take_out(model, group.sites[-1].name)
    with sound_moments(group):
        found = rank(weight, bias, moments, weight.shape[1] - least)
    return Ranking(found.order.cpu(), found.costs.cpu())


def allocate_widths(costs: Sequence[Tensor], unit: int, budget: int, max_width: int | None = None) -> list[int]:
    """The number of hidden neurons that each layer keeps: multiples of ``unit`` that sum to at most ``budget``.

    Args:
        costs: per layer, the cost of dropping its n cheapest neurons, for n from 0 to its width less one unit,
            ``(width - unit + 1,)``, rising.
        unit: neurons per portion; divides every width.
        budget: neurons of all layers together.
        max_width: the most neurons that a layer may keep.

    Raises:
        KronyError: one unit per layer exceeds the budget.

    Examples:
        >>> import torch
        >>> cheap, expensive = torch.tensor([0.0, 1.0, 2.0, 3.0]), torch.tensor([0.0, 5.0, 10.0, 15.0])
        >>> allocate_widths([cheap, expensive], unit=1, budget=5)
        [1, 4]
    """
    widths = [len(cost) - 1 + unit for cost in costs]
    ceiling = [min(width, (max_width or width) // unit * unit) for width in widths]
    if len(costs) * unit > budget or min(ceiling) < unit:
        raise KronyError(f"a budget of {budget} neurons for {len(costs)} layers: at least {unit} per layer are needed")
    slopes = [_slopes(cost[::unit].tolist()) for cost in costs]  # marginal cost of each portion, rising
    kept = list(ceiling)
    heap = [(slopes[i][(widths[i] - kept[i]) // unit], i) for i in range(len(kept)) if kept[i] > unit]
    heapq.heapify(heap)
    total = sum(kept)
    while total > budget:
        _, layer = heapq.heappop(heap)
        kept[layer] -= unit
        total -= unit
        if kept[layer] > unit:
            heapq.heappush(heap, (slopes[layer][(widths[layer] - kept[layer]) // unit], layer))
    return kept


def _slopes(cost: list[float]) -> list[float]:
    """The slopes of the lower convex hull of the points ``(n, cost[n])``, one for each step from n to n + 1."""
    hull: list[int] = []
    for n in range(len(cost)):
        while len(hull) >= 2:
            a, b = hull[-2:]
            if (cost[b] - cost[a]) * (n - b) < (cost[n] - cost[b]) * (b - a):
                break
            hull.pop()
        hull.append(n)
    slopes: list[float] = []
    for a, b in itertools.pairwise(hull):
        slopes += [(cost[b] - cost[a]) / (b - a)] * (b - a)
    return slopes
