"""Plans a compression without running it: the layers, their shapes, and the size of the compressed model."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache

from transformers import PreTrainedModel

from krony.compression.reconstruction import check_reconstructible, kept_at_once, training_memory
from krony.config import KronyConfig
from krony.errors import KronyError
from krony.init.registry import INITIALISATIONS
from krony.kronecker import schemes
from krony.kronecker.algebra import KronShape
from krony.kronecker.layer_schemes import DENSE, LayerSchemes
from krony.models.split_attention import fused_attention, splitting
from krony.models.surgery import (
    Group,
    Site,
    count_parameters,
    embedding_shape,
    find_groups,
    groups_of,
    is_tied,
    linear_names,
    model_shape,
)
from krony.runtime.hardware import fast_dtype

LIBRARIES = 600 * 1000**2  # bytes of a Python process that has imported torch and transformers
LEFT_OVER = 300 * 1000**2  # bytes that the C library still holds when the factors are computed; measured


@dataclass(frozen=True, kw_only=True)
class CompressionPlan:
    """What ``compress`` replaces, computed from a model that may lie on the meta device.

    Attributes:
        config: the options.
        groups: the layers that are compressed together, in the order of the model.
        shapes: module name -> split, before allocation divides the budget among the layers.
        embedding: name and split of the input embedding; None if it stays dense.
        params_before: unique parameters of the model.
        params_after: unique parameters of the compressed model, at most: with ``allocation="global"`` a layer that
            stays dense has no right factors, so there can be slightly fewer.
    """

    config: KronyConfig
    groups: list[Group]
    shapes: dict[str, KronShape]
    embedding: tuple[str, KronShape] | None
    params_before: int
    params_after: int

    @property
    def replaced_parameters(self) -> int:
        """The number of the original's parameters that are replaced."""
        return sum(site.out_features * site.in_features for group in self.groups for site in group.sites)

    @property
    def new_parameters(self) -> int:
        """The number of parameters that take their place."""
        return self.params_after - self.params_before + self.replaced_parameters

    def working_memory(self, itemsize: int, tokens: int, at_once: int) -> int:
        """About how many bytes the computation of the factors needs besides the weights, libraries included.

        Args:
            itemsize: bytes per weight.
            tokens: tokens of calibration text, whose second moments are in memory too; 0 for none.
            at_once: the most groups whose inputs ``reconstruct`` keeps at the same time, if they fit.
        """
        sites = [site for group in self.groups for site in group.sites]
        matrix = max(site.out_features * site.in_features for site in sites)
        if not tokens:  # W, its rearrangement and its approximation in float64
            return LIBRARIES + (4 * 8 + 2 * itemsize) * matrix
        wide = max(site.in_features for site in sites)  # second moments, their inverse, and updates in float64
        factors = 5 * 8 * wide**2 + 3 * 8 * matrix
        if not self.config.reconstruct:
            return LIBRARIES + factors
        number = fast_dtype("cpu").itemsize
        at_once = min(at_once, kept_at_once(self.groups, tokens, number))
        kept = at_once * tokens * number * max(group.sites[0].in_features for group in self.groups)
        training = max(training_memory(group, self.shapes, tokens) for group in self.groups)
        training += LEFT_OVER + 8 * max(
            sum(n**2 for n in {s.in_features for s in group.sites}) for group in self.groups
        )
        # a group's inputs are read after its factors are computed, with those of the next groups
        return LIBRARIES + max(factors + (kept if at_once > 1 else 0), training + kept)

    def memory_bytes(self, itemsize: int, tokens: int) -> int:
        """About how many bytes ``compress`` needs with the model in memory; arguments as in ``working_memory``."""
        working = self.working_memory(itemsize, tokens, len(self.groups))
        held = itemsize * (self.params_before + self.params_after) + working
        if self.config.tune:  # also the original, and in float32 new weights, a copy, gradients, AdamW's two moments
            trained = self.params_after if self.config.tune_all else self.new_parameters
            held += itemsize * self.params_before + 5 * 4 * trained
        return held


def plan(model: PreTrainedModel, config: KronyConfig) -> CompressionPlan:
    """Plans the compression of ``model``, which may lie on the meta device; nothing changes.

    Raises KronyError if the scheme does not fit, nothing matches, or an option can't work with this model.

    Examples:
        >>> import krony
        >>> plan(krony.demo_model(), krony.KronyConfig(keep=0.5, init="van-loan")).new_parameters
        1572888
    """
    if not config.scheme:
        raise KronyError("a size is missing: KronyConfig(keep=0.5) keeps half of the neurons of every MLP")
    groups = chosen_groups(model, config)
    _check_names(model, groups, config)
    if config.allocation == "global":
        check_global(groups, config)
        check_share(groups, config)
    shapes = uniform_shapes(groups, config)
    for group in groups:
        names = [site.name for site in group.sites]
        is_mlp = group.is_mlp and len(names) > 1
        config.initialisation.check(names, [shapes[name] for name in names], is_mlp=is_mlp)
        if config.reconstruct:
            check_reconstructible(model, group)
    return CompressionPlan(
        config=config,
        groups=groups,
        shapes=shapes,
        embedding=None if config.embedding is None else embedding_shape(model, config.embedding),
        params_before=count_parameters(model),
        params_after=parameters_after(model, groups, config),
    )


def parameters_after(model: PreTrainedModel, groups: list[Group], config: KronyConfig) -> int:
    """Unique parameters of the compressed model, at most; scalars and embedding included."""
    count = count_parameters(model)
    for shape in uniform_shapes(groups, config).values():
        count += _parameters(shape, config) - shape.rows * shape.columns
    if config.allocation == "global":
        count += _extra_of_allocation(groups, config)
    if config.embedding is not None:
        _, shape = embedding_shape(model, config.embedding)
        count += shape.parameters - (0 if is_tied(model) else shape.rows * shape.columns)  # a tied head stays
    return count


def within(model: PreTrainedModel, config: KronyConfig, parameters: int) -> KronyConfig:
    """``config`` with the scheme of the largest model that has at most ``parameters`` unique parameters.

    Raises KronyError if no scheme is small enough.
    """
    groups = chosen_groups(model, config)
    if config.allocation == "global":
        check_global(groups, config)
    scheme = schemes.for_budget(
        model_shape(model, groups),
        parameters,
        neurons=config.initialisation.whole_neurons,
        size=lambda scheme: size_of(model, groups, replace(config, scheme=scheme)),
    )
    return replace(config, scheme=scheme)


def chosen_groups(model: PreTrainedModel, config: KronyConfig) -> list[Group]:
    """The layers that ``config`` chooses, in the order of the model; which may be parts of fused attention matrices.

    Raises KronyError if there are none.
    """
    if not config.split_attention:
        return _groups(model, config)
    fused = fused_attention(model)
    if not fused:
        raise KronyError(
            f"split_attention: {type(model).__name__} has no attention matrix that holds Q, then K, then V in one, as "
            "those of GPT-2, MPT and Phi-3 do: leave it out"
        )
    with splitting(model, fused):
        return _groups(model, config)


def _groups(model: PreTrainedModel, config: KronyConfig) -> list[Group]:
    if not isinstance(config.scheme, LayerSchemes):
        return find_groups(model, config.modules, config.layers)
    chosen = config.scheme.choose(linear_names(model))
    try:
        return groups_of(model, chosen)
    except KronyError as error:  # a tied head
        raise KronyError(f"{config.scheme}: {error}: give it {DENSE}") from None


def uniform_shapes(groups: list[Group], config: KronyConfig) -> dict[str, KronShape]:
    """The split of every matrix before any allocation. Raises KronyError if a layer doesn't fit its scheme."""
    return {site.name: config.initialisation.shape(_shape(site, config)) for group in groups for site in group.sites}


def _check_names(model: PreTrainedModel, groups: list[Group], config: KronyConfig) -> None:
    """Raises KronyError for one of the paper's names where the model isn't GPT-2 124M."""
    for site in (site for group in groups for site in group.sites):
        if (scheme := config.scheme_for(site.name)) in schemes.PAPER_NAMES:
            with _blamed(site, config):
                mlps = find_groups(model) if config.modules == "mlp" else groups
                schemes.check_name(scheme, model_shape(model, mlps))


def _shape(site: Site, config: KronyConfig) -> KronShape:
    """The split that the scheme means for a layer. Raises KronyError if it does not fit."""
    with _blamed(site, config):
        return site.shape(config.scheme_for(site.name))


@contextmanager
def _blamed(site: Site, config: KronyConfig) -> Iterator[None]:
    """Errors in the block name the pattern, and its line, that decides about this layer, where each has its scheme."""
    try:
        yield
    except KronyError as error:
        if isinstance(config.scheme, LayerSchemes) and (pattern := config.scheme.deciding(site.name)):
            raise KronyError(f"{config.scheme.where(pattern)}: {error}") from None
        raise


def check_global(groups: list[Group], config: KronyConfig) -> None:
    """Raises KronyError if these layers can't share a budget with any scheme."""
    if not config.initialisation.takes_allocation:
        names = ", ".join(name for name, init in INITIALISATIONS.items() if init.takes_allocation)
        raise KronyError(f"allocation global works with init {names}, and the init is {config.init}")
    widths = {group.sites[0].out_features for group in groups}
    if len(widths) != 1:
        raise KronyError(f"allocation global needs layers of one hidden width, and these have {sorted(widths)}")
    first = groups[0].sites[0]
    unit = portion(first.out_features, config.multiple_of)
    if first.out_features // unit - 1 > unit * first.in_features:  # portions are factors of unit x in_features
        if config.multiple_of is None:
            raise KronyError(
                f"the hidden width {first.out_features} divides into portions of {unit} only, more than a layer can "
                "have factors: use allocation uniform"
            )
        raise KronyError(
            f"multiple_of {unit} makes more portions of {first.out_features} neurons than a layer can have factors: "
            "use a larger one"
        )


def check_share(groups: list[Group], config: KronyConfig) -> None:
    """Raises KronyError if allocation global has less than one portion per layer."""
    if _kept_by_allocation(groups, config) is not None:
        return
    shape = _shape(groups[0].sites[0], config)
    unit = portion(shape.rows, config.multiple_of)
    if config.max_width is not None and config.max_width < unit:
        raise KronyError(f"max_width is {config.max_width}, and every layer keeps at least {unit} neurons: raise it")
    raise KronyError(
        f"scheme {config.scheme} keeps {shape.kept_rows} neurons per layer, "
        f"and allocation global gives each layer at least {unit}"
    )


@cache
def portion(width: int, multiple_of: int | None) -> int:
    """The number of neurons per portion of the allocation: ``multiple_of``, or a divisor near a 24th of the width.

    Raises KronyError if ``multiple_of`` does not divide the width.

    Examples:
        >>> portion(3072, None), portion(3072, 64)
        (128, 64)
    """
    if multiple_of is None:
        return min((d for d in range(1, width + 1) if width % d == 0), key=lambda d: abs(d - width / 24))
    if width % multiple_of:
        raise KronyError(f"multiple_of {multiple_of} does not divide the hidden width {width}")
    return multiple_of


def size_of(model: PreTrainedModel, groups: list[Group], config: KronyConfig) -> int | None:
    """``parameters_after``; None for a scheme that doesn't fit every matrix, or has less than one portion per layer for
    the allocation.
    """
    try:
        uniform_shapes(groups, config)
    except KronyError:  # left factors that divide one matrix and not another
        return None
    if config.allocation == "global" and _kept_by_allocation(groups, config) is None:
        return None
    return parameters_after(model, groups, config)


def _parameters(shape: KronShape, config: KronyConfig) -> int:
    """Parameters of a layer of this shape, scalars included."""
    return shape.parameters + shape.factors * config.has_scalars(shape.factors)


def _extra_of_allocation(groups: list[Group], config: KronyConfig) -> int:
    """Parameters that allocation adds in right factors and scalars, less those that ``max_width`` saves."""
    kept, extra = _kept_by_allocation(groups, config) or 0.0, 0.0
    for site in (site for group in groups for site in group.sites):
        shape = _shape(site, config)
        shape = shape.transposed if site.is_turned else shape  # (groups, width) ⊗ (r, 1), k factors
        unit = portion(shape.rows, config.multiple_of)
        each = shape.rows // unit + config.has_scalars(2)  # per portion: its right factor and its scalar
        extra += kept * shape.columns + kept / unit * each - _parameters(shape, config)
    return math.ceil(extra)


def _kept_by_allocation(groups: list[Group], config: KronyConfig) -> float | None:
    """The mean number of neurons that a layer keeps; None if it is less than one portion."""
    shape = _shape(groups[0].sites[0], config)
    unit = portion(shape.rows, config.multiple_of)
    total = shape.kept_rows * len(groups) // unit * unit
    ceiling = min(shape.rows, config.max_width or shape.rows) // unit * unit
    return min(total / len(groups), ceiling) if total >= unit * len(groups) and ceiling else None
