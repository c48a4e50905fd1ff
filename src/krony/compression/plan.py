"""What a compression makes of a model's size, told before it is done; and the scheme for a size that is wished."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import cache

from transformers import PreTrainedModel

from krony.config import KronyConfig
from krony.errors import KronyError
from krony.init.registry import INITIALISATIONS
from krony.kronecker import schemes
from krony.kronecker.algebra import KronShape
from krony.models.surgery import Group, count_parameters, embedding_shape, find_groups, is_tied, layout


def parameters_after(model: PreTrainedModel, groups: list[Group], config: KronyConfig) -> int:
    """Unique parameters that ``compress`` leaves at most, scalars and embedding counted; for a model on meta too.

    With ``allocation="global"`` a layer that stays whole has no factors, so it can be a little less.
    """
    count = count_parameters(model)
    for shape in uniform_shapes(groups, config).values():
        count += _parameters(shape, config) - shape.rows * shape.columns
    if config.allocation == "global":
        count += _more_by_allocation(groups, config)
    if config.embedding is not None:
        _, shape = embedding_shape(model, config.embedding)
        count += shape.parameters - (0 if is_tied(model) else shape.rows * shape.columns)  # a tied head stays
    return count


def within(model: PreTrainedModel, config: KronyConfig, parameters: int) -> KronyConfig:
    """``config`` with the scheme that makes the largest model of at most so many parameters. Raises KronyError."""
    groups = find_groups(model, config.modules, config.layers)
    if config.allocation == "global":
        check_global(groups, config)
    scheme = schemes.for_budget(
        layout(model, groups),
        parameters,
        neurons=config.initialisation.whole_neurons,
        size=lambda scheme: _size(model, groups, replace(config, scheme=scheme)),
    )
    return replace(config, scheme=scheme)


def _size(model: PreTrainedModel, groups: list[Group], config: KronyConfig) -> int | None:
    """``parameters_after``, or None where the scheme can't be had."""
    if config.allocation == "global" and _kept_by_allocation(groups, config) is None:
        return None
    return parameters_after(model, groups, config)


def _parameters(shape: KronShape, config: KronyConfig) -> int:
    return shape.parameters + shape.factors * config.has_scalars(shape.factors)


def _more_by_allocation(groups: list[Group], config: KronyConfig) -> int:
    """What right factors and scalars take more, and ``max_width`` less, when neurons are given to the layers."""
    kept, more = _kept_by_allocation(groups, config) or 0.0, 0.0
    for site in (site for group in groups for site in group.sites):
        shape = site.shape(config.scheme)
        shape = shape.transposed if site.is_turned else shape  # (groups, width) ⊗ (r, 1), k factors
        unit = portion(shape.rows, config.multiple_of)
        each = shape.rows // unit + config.has_scalars(2)  # of a portion: its right factor, and its scalar
        more += kept * shape.columns + kept / unit * each - _parameters(shape, config)
    return math.ceil(more)


def _kept_by_allocation(groups: list[Group], config: KronyConfig) -> float | None:
    """How many neurons a layer keeps in the mean; None where that is less than one portion each."""
    shape = groups[0].sites[0].shape(config.scheme)
    unit = portion(shape.rows, config.multiple_of)
    total = shape.m1 * shape.factors * len(groups) // unit * unit
    ceiling = min(shape.rows, config.max_width or shape.rows) // unit * unit
    return min(total / len(groups), ceiling) if total >= unit * len(groups) and ceiling else None


def uniform_shapes(groups: list[Group], config: KronyConfig) -> dict[str, KronShape]:
    """The split of every matrix when each layer gets the same scheme. Raises KronyError if it fits one of them not."""
    shapes = {site.name: site.shape(config.scheme) for group in groups for site in group.sites}
    return {name: config.initialisation.shape(shape) for name, shape in shapes.items()}


def check_global(groups: list[Group], config: KronyConfig) -> None:
    """Raises KronyError where the layers can't share a budget, whatever the scheme."""
    if not config.initialisation.takes_allocation:
        takers = ", ".join(name for name, init in INITIALISATIONS.items() if init.takes_allocation)
        raise KronyError(f"allocation global follows the costs of init {takers}, and the init is {config.init}")
    widths = {group.sites[0].out_features for group in groups}
    if len(widths) != 1:
        raise KronyError(f"allocation global needs layers of one hidden width, and these have {sorted(widths)}")
    first = groups[0].sites[0]
    unit = portion(first.out_features, config.multiple_of)
    if first.out_features // unit - 1 > unit * first.in_features:  # portions are factors of unit x in_features
        raise KronyError(
            f"multiple_of {unit} makes more portions of {first.out_features} neurons than a layer can have factors: "
            "take a larger one"
        )


def check_share(groups: list[Group], config: KronyConfig) -> None:
    """Raises KronyError where allocation global has less than a portion for every layer."""
    if _kept_by_allocation(groups, config) is None:
        raise KronyError(_too_little_to_share(groups, config))


def _too_little_to_share(groups: list[Group], config: KronyConfig) -> str:
    shape = groups[0].sites[0].shape(config.scheme)
    unit = portion(shape.rows, config.multiple_of)
    if config.max_width is not None and config.max_width < unit:
        return f"max_width {config.max_width} is less than the {unit} neurons that a layer keeps at least"
    kept = shape.m1 * shape.factors
    return f"scheme {config.scheme} keeps {kept} neurons a layer, and allocation global gives each at least {unit}"


@cache
def portion(width: int, multiple_of: int | None) -> int:
    """How many neurons allocation gives at a time: ``multiple_of``, or about a 24th of the width."""
    if multiple_of is None:
        return min((d for d in range(1, width + 1) if width % d == 0), key=lambda d: abs(d - width / 24))
    if width % multiple_of:
        raise KronyError(f"multiple_of {multiple_of} does not divide the hidden width {width}")
    return multiple_of
