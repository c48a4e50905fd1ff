"""``krony.compress``: replace the chosen matrices of a model in place, and say what it cost."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from krony.compression.allocation import allocate_widths
from krony.compression.moments import Calibration
from krony.compression.plan import check_global, check_share, portion, uniform_shapes
from krony.compression.reconstruction import (
    Examples,
    check_reconstructible,
    examples,
    module_name,
    reconstruct,
)
from krony.compression.tuning import Tuned, tune
from krony.config import KronyConfig
from krony.data.calibration_set import pack
from krony.errors import KronyError
from krony.init.base import Factors, Moments, Target
from krony.kronecker import schemes
from krony.kronecker.algebra import KronShape
from krony.kronecker.embedding import KroneckerEmbedding, factorised
from krony.kronecker.linear import KroneckerLinear
from krony.models import quantizer
from krony.models.surgery import (
    Group,
    count_parameters,
    embedding_of,
    embedding_shape,
    find_groups,
    is_tied,
    kronecker_layers,
    layout,
    plain_config,
    put_in,
    take_out,
    untie,
)
from krony.runtime.progress import Progress, silent


@dataclass(frozen=True)
class LayerReport:
    """One replaced matrix: ``error`` is ‖W − Ŵ‖/‖W‖ in Frobenius norm, ``calibrated_error`` the same of its outputs."""

    name: str
    shape: KronShape
    error: float
    calibrated_error: float | None = None
    curve: tuple[float, ...] | None = None  # calibrated error after each round of an init that iterates

    def to_json(self) -> dict:
        return {
            "name": self.name,
            "left": list(self.shape.left),
            "right": list(self.shape.right),
            "factors": self.shape.factors,
            "error": self.error,
            "calibrated_error": self.calibrated_error,
        } | ({} if self.curve is None else {"curve": list(self.curve)})

    @classmethod
    def from_json(cls, made: dict) -> LayerReport:
        """What ``to_json`` gave."""
        (m1, n1), (m2, n2) = made["left"], made["right"]
        shape = KronShape(m1, n1, m2, n2, made["factors"])
        curve = tuple(made["curve"]) if "curve" in made else None
        return cls(made["name"], shape, made["error"], made["calibrated_error"], curve)


@dataclass(frozen=True)
class CompressionReport:
    """What ``compress`` did. Parameters are unique ones: a tied head is counted once; scalars are counted."""

    scheme: str
    init: str
    params_before: int
    params_after: int
    seconds: float
    layers: list[LayerReport] = field(default_factory=list)
    calibration: str | None = None  # where the second moments came from, in words
    tuned: Tuned | None = None
    made_with: dict[str, Any] = field(default_factory=dict)  # what config.json says of it

    def to_json(self) -> dict:
        return {
            "scheme": self.scheme,
            "init": self.init,
            "params_before": self.params_before,
            "params_after": self.params_after,
            "seconds": self.seconds,
            "made_with": self.made_with,
            "layers": [layer.to_json() for layer in self.layers],
        } | ({} if self.tuned is None else {"tuned": asdict(self.tuned)})


def compress(
    model: PreTrainedModel,
    config: KronyConfig,
    *,
    calibration: Tensor | Iterable[str] | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    cache: Path | None = None,
    progress: Progress = silent,
) -> CompressionReport:
    """Replaces the matrices that ``config`` chooses by sums of Kronecker products, in place.

    Dtype and device of every layer are kept, tied weights stay tied, and ``save_pretrained`` writes a folder that
    ``from_pretrained`` loads wherever krony is imported. The model changes only when every layer has succeeded.

    Args:
        model: a causal LM of transformers.
        config: what to replace and how.
        calibration: token ids ``(sequences, length)`` (``krony.calibration_set`` makes them), or texts.
        tokenizer: needed where ``calibration`` is texts.
        cache: folder to keep the calibration's second moments in, and to look for them.
        progress: called with the number done, the number of all, and what is being done.

    Raises:
        KronyError: the scheme does not fit, nothing matches, calibration is missing, or a weight is not finite.
    """
    start = time.perf_counter()
    if not isinstance(config, KronyConfig):
        raise KronyError(f"compress takes a KronyConfig, such as KronyConfig('keep=0.5'), not {config!r}")
    groups = plan(model, config)
    _check_reachable(model)
    before = count_parameters(model)
    ids = _token_ids(calibration, tokenizer, config)
    original = copy.deepcopy(model).eval() if config.tune else model  # the teacher, and what the errors are measured by
    known = _moments(original, groups, config, ids, cache, progress)
    source = known.source if isinstance(known, Calibration) else None
    shapes = _allocate(model, groups, config, known, progress)
    replaced: dict[str, Replacement] = {}
    tuned = None
    with torch.no_grad():
        texts = _texts(original, groups, config, ids, progress)
        for done, (group, moments, text) in enumerate(zip(groups, known, texts, strict=True)):
            progress(done, len(groups), group.sites[0].name)
            if not any(site.name in shapes for site in group.sites):
                continue  # allocation leaves this layer whole
            train = None if text is None else partial(_reconstruct, original, group, text, moments, config)
            replaced |= replacements(original, group, shapes, config, moments, train)
        embedding = None if config.embedding is None else _factorised_embedding(model, config.embedding)
        fresh = _drawn_anew(model, config.seed) if config.reinit == "all" else {}
        before_them = {name: model.get_submodule(name) for name in replaced}
        try:
            for name, new in replaced.items():
                put_in(model, name, new.layer.train(model.training))
            if config.tune and ids is not None:
                tuned = tune(model, original, ids, steps=config.tune, seed=config.seed, progress=progress)
                replaced = _measured_anew(original, groups, shapes, replaced, known)
        except BaseException:  # Ctrl-C too
            for name, module in before_them.items():
                put_in(model, name, module)
            raise
        compressed = tuple(f"{name}." for name in kronecker_layers(model))
        for name, value in model.state_dict().items() if fresh else ():
            if not name.startswith(compressed):
                value.copy_(fresh[name])
        reports = [new.report for new in replaced.values()]
        if embedding is not None:
            if is_tied(model):
                untie(model)
            put_in(model, embedding[1].name, embedding[0])
            reports.append(embedding[1])
    progress(len(groups), len(groups), "done")
    quantizer.attach_quantizer(model, config, ids.numel() if ids is not None and config.needs_text_for else None)
    after, seconds = count_parameters(model), time.perf_counter() - start
    made_with = model.config.quantization_config.made_with
    return CompressionReport(config.scheme, config.init, before, after, seconds, reports, source, tuned, made_with)


@dataclass(frozen=True)
class Replacement:
    """A new layer, the factors that it started from, and what it lost."""

    layer: KroneckerLinear
    factors: Factors
    report: LayerReport


def replacements(
    model: nn.Module,
    group: Group,
    shapes: dict[str, KronShape],
    config: KronyConfig,
    moments: Moments | None = None,
    train: Callable[[dict[str, KroneckerLinear]], None] | None = None,
) -> dict[str, Replacement]:
    """The layers that take the place of a group's, and what each lost; the model stays as it is.

    Args:
        shapes: module name -> split, for every layer of the group at least.
        train: what is done to the new layers, by name, before their errors are measured.

    Raises KronyError for a weight that is not finite.
    """
    targets = _targets(model, group, shapes)
    made = config.initialisation.initialise(targets, config, moments)
    layers = {t.name: _build(t, factors, config) for t, factors in zip(targets, made, strict=True)}
    if train is not None:
        train(layers)
    return {
        t.name: Replacement(layers[t.name], factors, _report(t, factors, layers[t.name], moments))
        for t, factors in zip(targets, made, strict=True)
    }


def _measured_anew(
    original: nn.Module,
    groups: list[Group],
    shapes: dict[str, KronShape],
    replaced: dict[str, Replacement],
    known: Iterable[Moments | None],
) -> dict[str, Replacement]:
    """With the errors that the layers have now."""
    made = {}
    for group, moments in zip(groups, known, strict=True):
        if not any(site.name in replaced for site in group.sites):
            continue
        for target in _targets(original, group, shapes):
            old = replaced[target.name]
            made[target.name] = replace(old, report=_report(target, old.factors, old.layer, moments))
    return made


def _token_ids(
    calibration: Tensor | Iterable[str] | None, tokenizer: PreTrainedTokenizerBase | None, config: KronyConfig
) -> Tensor | None:
    if calibration is None:
        if config.needs_text_for:
            raise KronyError(
                f"{config.needs_text_for} needs calibration text: pass calibration= (--calibration on the command line)"
            )
        return None
    if isinstance(calibration, Tensor):
        return calibration
    if isinstance(calibration, str):  # which would be read a character at a time
        raise KronyError(
            "calibration is one string: give a list of texts, or krony.calibration_set's ids of a file or python-docs"
        )
    if tokenizer is None:
        raise KronyError("calibration is texts, so tokenizer= is needed; or give token ids")
    return pack(list(calibration), tokenizer, seed=config.seed)


def _moments(
    model: PreTrainedModel,
    groups: list[Group],
    config: KronyConfig,
    ids: Tensor | None,
    cache: Path | None,
    progress: Progress,
) -> Iterable[Moments | None]:
    if ids is None:
        return [None] * len(groups)
    return Calibration(
        model,
        groups,
        ids,
        token_weighting=config.token_weighting,
        sensitivity=config.allocation == "global" or config.reconstruct > 0,
        cache=cache,
        progress=progress,
    )


def _texts(
    model: PreTrainedModel, groups: list[Group], config: KronyConfig, ids: Tensor | None, progress: Progress
) -> Iterable[Examples | None]:
    """What ``reconstruct`` trains each group on."""
    if ids is None or not config.reconstruct:
        return [None] * len(groups)
    return examples(model, groups, ids, token_weighting=config.token_weighting, progress=progress)


def _reconstruct(
    model: PreTrainedModel,
    group: Group,
    text: Examples,
    moments: Moments | None,
    config: KronyConfig,
    layers: dict[str, KroneckerLinear],
) -> None:
    """Trains the group's new layers, in float32 whatever their dtype."""
    name = module_name(group)
    original = copy.deepcopy(model.get_submodule(name)).eval().float()
    dtype = next(iter(layers.values())).weight.dtype
    new = {full.removeprefix(name).removeprefix("."): layer.float() for full, layer in layers.items()}
    sensitivity = None if moments is None else moments.sensitivity
    reconstruct(original, new, text, steps=config.reconstruct, seed=config.seed, sensitivity=sensitivity)
    for layer in layers.values():
        layer.to(dtype)


def plan(model: PreTrainedModel, config: KronyConfig) -> list[Group]:
    """The groups that ``compress`` would replace; works on a model on the meta device. Raises KronyError."""
    groups = find_groups(model, config.modules, config.layers)
    schemes.check_name(config.scheme, layout(model, find_groups(model) if config.modules == "mlp" else groups))
    if config.allocation == "global":
        check_global(groups, config)
        check_share(groups, config)
    if config.embedding is not None:
        embedding_shape(model, config.embedding)
    shapes = uniform_shapes(groups, config)
    for group in groups:
        names = [site.name for site in group.sites]
        whole = group.is_mlp and len(names) > 1
        config.initialisation.check(names, [shapes[name] for name in names], is_mlp=whole)
    if config.reconstruct:
        for group in groups:
            check_reconstructible(model, group)
    return groups


def _check_reachable(model: PreTrainedModel) -> None:
    """Raises KronyError where weights aren't there to be read, or the device lacks float64."""
    if model.device.type == "mps":
        raise KronyError("factors are computed in float64, which mps has not: compress on the cpu, and move it then")
    away = next((name for name, parameter in model.named_parameters() if parameter.is_meta), None)
    if away is not None:
        raise KronyError(
            f"{away} is not in memory but offloaded, as device_map='auto' does where there is too little: load the "
            "model on one device, or go layer by layer with krony compress --stream"
        )


def _allocate(
    model: nn.Module, groups: list[Group], config: KronyConfig, known: Iterable[Moments | None], progress: Progress
) -> dict[str, KronShape]:
    """The split of every matrix; layers that stay whole are left out."""
    shapes = uniform_shapes(groups, config)
    if config.allocation == "uniform":
        return shapes
    first = shapes[groups[0].sites[0].name]  # (groups, width) ⊗ (r, 1), k factors
    width, unit = first.rows, portion(first.rows, config.multiple_of)
    curves, cost_curve = [], config.initialisation.cost_curve
    assert cost_curve is not None  # ``plan`` refuses others
    for done, (group, moments) in enumerate(zip(groups, known, strict=True)):
        progress(done, len(groups), "allocation")
        assert moments is not None and moments.hidden is not None  # init neurons always has them
        weight, bias = take_out(model, group.sites[-1].name)
        curves.append(cost_curve(weight, bias, moments, width - unit))
    kept = allocate_widths(curves, unit, first.m1 * first.factors * len(groups), config.max_width)
    made = {}
    for group, count in zip(groups, kept, strict=True):
        for site in group.sites if count < width else ():
            made[site.name] = site.shape(f"{unit}x{first.columns}:{count // unit}")
    return made


def _targets(model: nn.Module, group: Group, shapes: dict[str, KronShape]) -> list[Target]:
    targets = []
    for site in group.sites:
        weight, bias = take_out(model, site.name)
        if not torch.isfinite(weight).all():
            raise KronyError(f"{site.name}: its weight has values that are not finite, so there is nothing to fit")
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
        left = left / scalar  # whatever the scalars start at, the matrix is the same
    if layer.scalars is not None:
        layer.scalars.fill_(scalar)
    layer.weight.copy_(left)
    layer.right.copy_(factors.right)
    bias = target.bias if factors.bias is None else factors.bias
    if layer.bias is not None and bias is not None:
        layer.bias.copy_(bias)
    return layer


def _report(target: Target, factors: Factors, layer: KroneckerLinear, moments: Moments | None) -> LayerReport:
    """The layer's errors: of the matrix, and of its outputs on the calibration text."""
    second = None if moments is None else moments.of(target.role).matrix
    weight = target.weight.double()
    sizes = weight.norm().item(), 0.0 if second is None else _output_norm(weight, second)
    lost = layer.dense_weight(torch.float64)
    if factors.order is not None:
        places = factors.order.argsort()  # back to the old places: C is larger than W
        lost = lost[:, places] if target.role == "down" else lost[places]
    lost.sub_(weight)  # in place: these are the largest matrices there are
    calibrated = None if second is None else _relative(_output_norm(lost, second), sizes[1])
    error = _relative(lost.norm().item(), sizes[0])
    return LayerReport(target.name, target.shape, error, calibrated, factors.curve)


def _factorised_embedding(model: PreTrainedModel, size: int) -> tuple[KroneckerEmbedding, LayerReport]:
    """What takes the embedding's place, and what it loses."""
    name, shape = embedding_shape(model, size)
    whole = embedding_of(model)[1]
    new = factorised(whole, shape)
    lost = whole.weight.double() - new.dense_weight(torch.float64)
    return new, LayerReport(name, shape, _relative(lost.norm().item(), whole.weight.double().norm().item()))


def _output_norm(weight: Tensor, second: Tensor) -> float:
    """sqrt(tr(W C Wᵀ)): root mean square of the outputs."""
    return ((weight @ second.to(weight.device)) * weight).sum().clamp_min(0).sqrt().item()


def _relative(part: float, whole: float) -> float:
    return part / whole if whole > 0 else 0.0


def _drawn_anew(model: PreTrainedModel, seed: int) -> dict[str, Tensor]:
    """Weights as the model's class draws them for a new model, by name."""
    with torch.random.fork_rng(devices=[]):  # a new model is drawn on the CPU
        torch.manual_seed(seed)
        return type(model)(plain_config(model)).state_dict()
