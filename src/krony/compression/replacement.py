"""Builds the layers that replace a model's matrices, and measures their errors."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.linalg import LinAlgError  # type: ignore[attr-defined]

from krony.compression.report import LayerReport
from krony.config import KronyConfig
from krony.errors import KronyError
from krony.init.base import Factors, Moments, Target
from krony.kronecker.algebra import KronShape
from krony.kronecker.linear import KroneckerLinear
from krony.models.surgery import Group, take_out


@dataclass(frozen=True)
class Replacement:
    """A new layer, its errors, and the place that each hidden neuron has in it, ``(n,)``: None for its own."""

    layer: KroneckerLinear
    report: LayerReport
    order: Tensor | None = None

    def to(self, device: torch.device | str) -> Replacement:
        """The same on another device."""
        return Replacement(self.layer.to(device), self.report, None if self.order is None else self.order.to(device))


def replacements(
    model: nn.Module,
    group: Group,
    shapes: dict[str, KronShape],
    config: KronyConfig,
    moments: Moments | None = None,
    *,
    kept: Tensor | None = None,
    train: Callable[[dict[str, KroneckerLinear]], None] | None = None,
) -> dict[str, Replacement]:
    """The layers that replace a group's, by name, with their errors; the model does not change.

    Args:
        shapes: module name -> split, with at least every layer of the group.
        moments: the group's moments; None without calibration text.
        kept: the neurons that stay, in rising order, where they are chosen already.
        train: called with the new layers by name before their errors are measured.

    Raises:
        KronyError: a weight is not finite, or the initialisation can't work with the group.
    """
    targets = _targets(model, group, shapes)
    with sound_moments(group):
        initial = _initial(targets, config, moments, kept)
    layers = {t.name: _build(t, factors, config) for t, factors in zip(targets, initial, strict=True)}
    if train is not None:
        train(layers)
    return {
        t.name: Replacement(
            layers[t.name], _report(t, factors.order, factors.curve, layers[t.name], moments), factors.order
        )
        for t, factors in zip(targets, initial, strict=True)
    }


def _initial(targets: list[Target], config: KronyConfig, moments: Moments | None, kept: Tensor | None) -> list[Factors]:
    """The factors of a group; by a choice of neurons only for a method that makes such choices."""
    method = config.initialisation
    if kept is None:
        return method.initialise(targets, config, moments)
    assert method.initialise_kept is not None
    return method.initialise_kept(targets, config, moments, kept.to(targets[0].weight.device))


@contextmanager
def sound_moments(group: Group) -> Iterator[None]:
    """Raises KronyError where the block finds second moments of which no factorisation exists.

    Sums of squares always have one, with the ridge that initialisations add. A damaged cache may have none, and its
    other properties don't show it.
    """
    try:
        yield
    except LinAlgError as error:
        raise KronyError(
            f"{group.sites[0].name}: its second moments are not those of any text ({str(error).partition(':')[0]}): "
            "where they were kept in a cache, it is damaged; --no-cache reads the text again"
        ) from None


def measured(
    original: nn.Module,
    group: Group,
    shapes: dict[str, KronShape],
    new: dict[str, Replacement],
    moments: Moments | None,
) -> dict[str, LayerReport]:
    """The present errors of the new layers of a group, by name."""
    return {
        target.name: _report(target, known.order, known.report.curve, known.layer, moments)
        for target in _targets(original, group, shapes)
        for known in [new[target.name]]
    }


def _targets(model: nn.Module, group: Group, shapes: dict[str, KronShape]) -> list[Target]:
    """The matrices of a group. Raises KronyError for a weight that is not finite."""
    targets = []
    for site in group.sites:
        weight, bias = take_out(model, site.name)
        if not torch.isfinite(weight).all():
            raise KronyError(f"{site.name}: its weight has values that are not finite, so nothing can be fitted to it")
        targets.append(Target(site.name, site.role, weight, bias, shapes[site.name]))
    return targets


def _build(target: Target, factors: Factors, config: KronyConfig) -> KroneckerLinear:
    """The layer that holds these factors, in the target's dtype and on its device."""
    weight, shape = target.weight, target.shape
    has_scalars = config.has_scalars(shape.factors)
    layer = KroneckerLinear(
        shape, bias=target.bias is not None, scalars=has_scalars, device=weight.device, dtype=weight.dtype
    )
    left, scalar = factors.left * factors.scale, 1.0
    if has_scalars:
        scalar = config.scalar_init if config.scalar_init is not None else factors.scale
        left = left / scalar  # the matrix does not depend on the scalars' first values
    if layer.scalars is not None:
        layer.scalars.fill_(scalar)
    layer.weight.copy_(left)
    layer.right.copy_(factors.right)
    bias = target.bias if factors.bias is None else factors.bias
    if layer.bias is not None and bias is not None:
        layer.bias.copy_(bias)
    return layer


def _report(
    target: Target,
    order: Tensor | None,
    curve: tuple[float, ...] | None,
    layer: KroneckerLinear,
    moments: Moments | None,
) -> LayerReport:
    """The relative errors of the layer: of its matrix, and of its outputs on the calibration text."""
    second = None if moments is None else moments.of(target.role).matrix
    weight = target.weight.double()
    sizes = weight.norm().item(), 0.0 if second is None else _output_norm(weight, second)
    difference = layer.dense_weight(torch.float64)
    if order is not None:
        places = order.argsort()  # reorders Ŵ instead of C, which is larger
        difference = difference[:, places] if target.role == "down" else difference[places]
    difference.sub_(weight)  # in place, because these are the largest matrices
    calibrated = None if second is None else relative(_output_norm(difference, second), sizes[1])
    error = relative(difference.norm().item(), sizes[0])
    return LayerReport(name=target.name, shape=target.shape, error=error, calibrated_error=calibrated, curve=curve)


def _output_norm(weight: Tensor, second: Tensor) -> float:
    """sqrt(tr(W C Wᵀ)): the root mean square norm of the outputs."""
    return ((weight @ second.to(weight.device)) * weight).sum().clamp_min(0).sqrt().item()


def relative(error: float, size: float) -> float:
    """``error / size``; 0 if ``size`` is 0."""
    return error / size if size > 0 else 0.0
