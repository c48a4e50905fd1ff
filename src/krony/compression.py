"""``krony.compress``: replace the chosen matrices of a model in place, and say what it cost."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

import torch
from torch import nn
from transformers import PreTrainedModel

from krony import hf, schemes
from krony.config import KronyConfig
from krony.errors import KronyError
from krony.init import Factors, Target, get_init
from krony.kron import KronShape
from krony.linear import KroneckerLinear
from krony.progress import Progress, silent
from krony.surgery import (
    Group,
    count_parameters,
    find_groups,
    kronecker_layers,
    layout,
    plain_config,
    put_in,
    take_out,
)


@dataclass(frozen=True)
class LayerReport:
    """One replaced matrix: ``error`` is ‖W − Ŵ‖/‖W‖ in Frobenius norm, ``calibrated_error`` the same of its outputs."""

    name: str
    shape: KronShape
    error: float
    calibrated_error: float | None = None

    def to_json(self) -> dict:
        return {
            "name": self.name,
            "left": list(self.shape.left),
            "right": list(self.shape.right),
            "factors": self.shape.factors,
            "error": self.error,
            "calibrated_error": self.calibrated_error,
        }


@dataclass(frozen=True)
class Report:
    """What ``compress`` did. Parameters are unique ones: a tied head is counted once; scalars are counted."""

    scheme: str
    init: str
    params_before: int
    params_after: int
    seconds: float
    layers: list[LayerReport] = field(default_factory=list)

    def to_json(self) -> dict:
        return {
            "scheme": self.scheme,
            "init": self.init,
            "params_before": self.params_before,
            "params_after": self.params_after,
            "seconds": self.seconds,
            "layers": [layer.to_json() for layer in self.layers],
        }


def compress(model: PreTrainedModel, config: KronyConfig, *, progress: Progress = silent) -> Report:
    """Replaces the matrices that ``config`` chooses by sums of Kronecker products, in place.

    Dtype and device of every layer are kept, tied weights stay tied, and ``save_pretrained`` writes a folder that
    ``from_pretrained`` loads wherever krony is imported. The model changes only when every layer has succeeded.

    Args:
        model: a causal LM of transformers.
        config: what to replace and how.
        progress: called before each group of layers with the number done, the number of all, and a name.

    Raises:
        KronyError: the scheme does not fit, nothing matches, or a weight is not finite.
    """
    start = time.perf_counter()
    groups = plan(model, config)
    before = count_parameters(model)
    initialise = get_init(config.init)
    replaced: dict[str, tuple[KroneckerLinear, LayerReport]] = {}
    with torch.no_grad():
        for done, group in enumerate(groups):
            progress(done, len(groups), group.sites[0].name)
            targets = _targets(model, group, config.scheme)
            for target, factors in zip(targets, initialise(targets, config), strict=True):
                layer = _build(target, factors, config)
                replaced[target.name] = layer, LayerReport(target.name, target.shape, _error(target, layer))
        for name, (layer, _) in replaced.items():
            put_in(model, name, layer)
        if config.reinit == "all":
            _reinitialise(model, config.seed)
    progress(len(groups), len(groups), "done")
    hf.mark(model, config)
    layers = [layer_report for _, layer_report in replaced.values()]
    return Report(config.scheme, config.init, before, count_parameters(model), time.perf_counter() - start, layers)


def plan(model: PreTrainedModel, config: KronyConfig) -> list[Group]:
    """The groups that ``compress`` would replace; works on a model on the meta device. Raises KronyError."""
    groups = find_groups(model, config.modules, config.layers)
    schemes.check_name(config.scheme, layout(model, find_groups(model) if config.modules == "mlp" else groups))
    for group in groups:
        for site in group.sites:
            site.shape(config.scheme)
    return groups


def _targets(model: nn.Module, group: Group, scheme: str) -> list[Target]:
    targets = []
    for site in group.sites:
        weight, bias = take_out(model, site.name)
        if not torch.isfinite(weight).all():
            raise KronyError(f"{site.name}: its weight has values that are not finite, so there is nothing to fit")
        targets.append(Target(site.name, site.role, weight, bias, site.shape(scheme)))
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
        left = left / scalar  # whatever the scalars start at, the matrix is the same
    if layer.scalars is not None:
        layer.scalars.fill_(scalar)
    layer.weight.copy_(left)
    layer.right.copy_(factors.right)
    bias = target.bias if factors.bias is None else factors.bias
    if layer.bias is not None and bias is not None:
        layer.bias.copy_(bias)
    return layer


def _error(target: Target, layer: KroneckerLinear) -> float:
    weight = target.weight.double()
    lost = weight - layer.dense_weight(torch.float64)
    norm = weight.norm().item()
    return lost.norm().item() / norm if norm > 0 else 0.0


def _reinitialise(model: PreTrainedModel, seed: int) -> None:
    """Draws every weight outside the compressed layers anew, as the model's class does for a new model."""
    with torch.random.fork_rng(devices=[]):  # a new model is drawn on the CPU
        torch.manual_seed(seed)
        fresh = type(model)(plain_config(model)).state_dict()
    compressed = tuple(f"{name}." for name in kronecker_layers(model))
    for name, value in model.state_dict().items():
        if not name.startswith(compressed):
            value.copy_(fresh[name])
