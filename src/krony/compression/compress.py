"""``krony.compress``: replaces the chosen matrices of a model in place, and reports the errors."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from krony.compression.allocation import Allocation, allocate
from krony.compression.kept_layers import KeptLayers
from krony.compression.moments import Calibration
from krony.compression.plan import CompressionPlan, plan
from krony.compression.reconstruction import Examples, examples, reconstruct_group
from krony.compression.replacement import Replacement, measured, relative, replacements
from krony.compression.report import CompressionReport, LayerReport
from krony.compression.tuning import tune
from krony.config import KronyConfig
from krony.data.calibration_set import LENGTH, documents_of, pack
from krony.errors import KronyError
from krony.init.base import Moments, Ranking
from krony.kronecker.algebra import KronShape
from krony.kronecker.embedding import KroneckerEmbedding, factorised
from krony.kronecker.linear import KroneckerLinear
from krony.models import quantizer
from krony.models.loading import context_length
from krony.models.split_attention import (
    SplitAttention,
    fused_attention,
    split_attention,
    splitting,
    wholes_of,
)
from krony.models.surgery import (
    Group,
    count_parameters,
    embedding_of,
    is_tied,
    kronecker_embeddings,
    kronecker_layers,
    plain_config,
    put_in,
    untie,
)
from krony.runtime import distributed
from krony.runtime.progress import Progress, silent


def nothing_more(report: CompressionReport) -> None:
    """What follows a compression where its caller names nothing."""


def compress(
    model: PreTrainedModel,
    config: KronyConfig,
    *,
    calibration: Tensor | Iterable[str] | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    cache: Path | str | None = None,
    finish: Callable[[CompressionReport], None] = nothing_more,
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
        cache: folder that stores the second moments of the calibration text, for later calls, and the layers that
            ``reconstruct`` has trained, for a call that resumes.
        finish: called with the report when the model has changed, before those layers are deleted; may save the model.
        progress: called with the number of finished parts, the number of all parts, and what is being done.

    Returns:
        The errors of every replaced matrix, and the number of parameters before and after.

    Raises:
        KronyError: the scheme does not fit, nothing matches, calibration is missing, or a weight is not finite.

    Examples:
        >>> import krony
        >>> model = krony.demo_model()
        >>> report = krony.compress(model, krony.KronyConfig("512x256", init="van-loan", layers="0"))
        >>> [layer.name for layer in report.layers]
        ['transformer.h.0.mlp.c_fc', 'transformer.h.0.mlp.c_proj']
    """
    if not isinstance(config, KronyConfig):
        raise KronyError(f"compress takes a KronyConfig, such as KronyConfig('keep=0.5'), not {config!r}")
    settled = plan(model, config)
    ids = _token_ids(calibration, tokenizer, model, config)
    return compress_as_planned(model, settled, ids, cache=cache, finish=finish, progress=progress)


def compress_as_planned(
    model: PreTrainedModel,
    settled: CompressionPlan,
    ids: Tensor | None,
    *,
    rankings: Sequence[Ranking] | None = None,
    cache: Path | str | None = None,
    finish: Callable[[CompressionReport], None] = nothing_more,
    progress: Progress = silent,
) -> CompressionReport:
    """``compress`` by a plan for this model, on token ids ``(sequences, length)``, or without text.

    ``rankings``: what ``ranked`` gave for this model, text and configuration but for the scheme; several sizes then
    compute them once. Raises KronyError.
    """
    check_weights(model)
    sites = [site.name for group in settled.groups for site in group.sites]
    with splitting(model, wholes_of(model, sites) if settled.config.split_attention else []):
        return _compress(model, settled, ids, rankings, cache, finish, progress)


def _compress(
    model: PreTrainedModel,
    settled: CompressionPlan,
    ids: Tensor | None,
    rankings: Sequence[Ranking] | None,
    cache: Path | str | None,
    finish: Callable[[CompressionReport], None],
    progress: Progress,
) -> CompressionReport:
    start, config = time.perf_counter(), settled.config
    original = copy.deepcopy(model).eval() if config.tune else model  # the teacher, and the reference for all errors
    moments: Iterable[Moments | None] = [None] * len(settled.groups)
    if ids is not None:
        moments = calibration_for(settled, original, ids, cache=cache, progress=progress)
    allocation = allocate(model, settled, moments, progress, rankings)
    kept = KeptLayers(getattr(moments, "folder", None), config, allocation.shapes)
    tuned = None
    with torch.no_grad():
        new = _initialise(original, settled, allocation, moments, ids, kept, progress)
        modules: dict[str, nn.Module] = {name: replacement.layer for name, replacement in new.items()}
        embeddings: list[LayerReport] = []
        if settled.embedding is not None:
            name, shape = settled.embedding
            modules[name], embedding = _factorise_embedding(model, name, shape)
            embeddings.append(embedding)
        tied = is_tied(model)
        redrawn = _redrawn_weights(model, config.seed) if config.reinit == "all" else {}
        with _swapped(model, modules):
            if config.tune and ids is not None:
                tuned = tune(
                    model, original, ids, steps=config.tune, text=config.tune_text, everything=config.tune_all,
                    seed=config.seed, progress=progress,
                )  # fmt: skip
                new = _measure_again(original, settled.groups, allocation.shapes, new, moments)
        _copy_redrawn(model, redrawn)
        if tied and embeddings:
            untie(model)
    progress(len(settled.groups), len(settled.groups), "done")
    quantizer.attach_quantizer(model, made_with(config, ids))
    report = CompressionReport(
        scheme=str(config.scheme),
        init=config.init,
        params_before=settled.params_before,
        params_after=count_parameters(model),
        seconds=time.perf_counter() - start,
        layers=[*(replacement.report for replacement in new.values()), *embeddings],
        calibration=moments.source if isinstance(moments, Calibration) else None,
        tuned=tuned,
        made_with=model.config.quantization_config.made_with,
    )
    finish(report)
    distributed.all_agree(True)  # the first process has finished too
    kept.clear()
    return report


def made_with(config: KronyConfig, ids: Tensor | None) -> dict[str, object]:
    """The options of a compression, as config.json records them.

    ``ids``: token ids ``(sequences, length)`` of the calibration text, or None.
    """
    options: dict[str, object] = dict(config.non_default_options())
    if ids is not None and config.needs_text_for:
        options["calibration_tokens"] = ids.numel()
        if documents := documents_of(ids):
            options["calibration_documents"] = documents
    return options


def check_weights(model: PreTrainedModel) -> None:
    """Raises KronyError if the device has no float64, or weights are not in memory."""
    if model.device.type == "mps":
        raise KronyError("mps has no float64, which the factors need: compress on the cpu, then move the model")
    offloaded = next((name for name, parameter in model.named_parameters() if parameter.is_meta), None)
    if offloaded is not None:
        raise KronyError(
            f"{offloaded} is not in memory but offloaded, as device_map='auto' does where memory is short: load the "
            "model on one device, or compress layer by layer with krony compress --stream"
        )


def _token_ids(
    calibration: Tensor | Iterable[str] | None,
    tokenizer: PreTrainedTokenizerBase | None,
    model: PreTrainedModel,
    config: KronyConfig,
) -> Tensor | None:
    """The calibration text as token ids ``(sequences, length)``. Raises KronyError for text that can't be read."""
    if calibration is None:
        if config.needs_text_for:
            raise KronyError(
                f"{config.needs_text_for} needs calibration text: pass calibration= (--calibration on the command line)"
            )
        return None
    if isinstance(calibration, Tensor):
        return calibration
    if isinstance(calibration, str):  # iterating would give its characters
        raise KronyError(
            "calibration is one string: give a list of texts, or the ids that krony.calibration_set makes from a file "
            "or python-docs"
        )
    if tokenizer is None:
        raise KronyError("calibration is texts, so tokenizer= is needed; or give token ids")
    return pack(list(calibration), tokenizer, length=min(LENGTH, context_length(model)), seed=config.seed)


def calibration_for(
    settled: CompressionPlan,
    model: PreTrainedModel,
    ids: Tensor,
    *,
    cache: Path | str | None = None,
    progress: Progress = silent,
) -> Calibration:
    """The moments that the plan needs, of token ids ``(sequences, length)``; computed when they are read.

    Raises KronyError if the model can't take these ids.
    """
    config = settled.config
    return Calibration(
        model,
        settled.groups,
        ids,
        token_weighting=config.token_weighting,
        sensitivity=config.needs_gradient,
        cache=cache,
        progress=progress,
    )


def _initialise(
    original: PreTrainedModel,
    settled: CompressionPlan,
    allocation: Allocation,
    moments: Iterable[Moments | None],
    ids: Tensor | None,
    kept: KeptLayers,
    progress: Progress,
) -> dict[str, Replacement]:
    """The new layers by name, trained if ``config.reconstruct`` is set; ``original`` does not change.

    Processes share the groups.
    """
    config, groups = settled.config, settled.groups
    made: dict[int, dict[str, Replacement]] = {}
    texts: Iterator[Examples] = iter(())
    trained = bool(ids is not None and config.reconstruct)
    own = [index for index in range(len(groups)) if distributed.does(index)]
    # read at once: another run of the same compression deletes them when it is complete
    found = {index: state for index in own if trained and (state := kept.read(index)) is not None}
    if ids is not None and trained:
        left = [groups[index] for index in own if index not in found]
        texts = examples(original, left, ids, token_weighting=config.token_weighting, progress=progress)
    for index, (group, known) in enumerate(zip(groups, moments, strict=True)):
        progress(index, len(groups), group.sites[0].name)
        if not distributed.does(index):
            continue
        train: Callable[[dict[str, KroneckerLinear]], None] | None = None
        is_kept = index in found
        if is_kept:
            train = partial(kept.fill, index, found.pop(index))
        elif trained:
            train = partial(reconstruct_group, original, group, next(texts), known, config)
        if not any(site.name in allocation.shapes for site in group.sites):
            made[index] = {}  # allocation leaves this layer dense
            continue
        chosen = allocation.kept.get(group.sites[0].name)
        made[index] = replacements(original, group, allocation.shapes, config, known, kept=chosen, train=train)
        if trained and not is_kept:
            kept.save(index, {name: one.layer for name, one in made[index].items()})
        if distributed.count() > 1:  # layers travel by way of the CPU
            made[index] = {name: one.to("cpu") for name, one in made[index].items()}
    new: dict[str, Replacement] = {}
    for index in range(len(groups)):
        new |= {name: one.to(original.device) for name, one in distributed.result_of(index, made).items()}
    return new


@contextmanager
def _swapped(model: nn.Module, layers: dict[str, nn.Module]) -> Iterator[None]:
    """Puts ``layers`` into the model; restores the old ones if the block raises, Ctrl-C included."""
    before = {name: model.get_submodule(name) for name in layers}
    try:
        for name, layer in layers.items():
            put_in(model, name, layer.train(model.training))
        yield
    except BaseException:
        for name, module in before.items():
            put_in(model, name, module)
        raise


def _measure_again(
    original: nn.Module,
    groups: list[Group],
    shapes: dict[str, KronShape],
    new: dict[str, Replacement],
    moments: Iterable[Moments | None],
) -> dict[str, Replacement]:
    """The same layers with their present errors."""
    return {
        name: replace(new[name], report=report)
        for group, known in zip(groups, moments, strict=True)
        if any(site.name in new for site in group.sites)
        for name, report in measured(original, group, shapes, new, known).items()
    }


def _factorise_embedding(model: PreTrainedModel, name: str, shape: KronShape) -> tuple[KroneckerEmbedding, LayerReport]:
    """The factorised input embedding, and its error."""
    dense = embedding_of(model)[1]
    new = factorised(dense, shape)
    difference = dense.weight.double() - new.dense_weight(torch.float64)
    return new, LayerReport(
        name=name, shape=shape, error=relative(difference.norm().item(), dense.weight.double().norm().item())
    )


def _redrawn_weights(model: PreTrainedModel, seed: int) -> dict[str, Tensor]:
    """Random weights by name, as the model's class initialises a new model."""
    with torch.random.fork_rng(devices=[]):  # the new model is on the CPU
        torch.manual_seed(seed)
        new = type(model)(plain_config(model))
    split_attention(
        new, [name for name in fused_attention(new) if isinstance(model.get_submodule(name), SplitAttention)]
    )
    return new.state_dict()


def _copy_redrawn(model: PreTrainedModel, redrawn: dict[str, Tensor]) -> None:
    """Copies redrawn weights into every module that isn't compressed, and biases into those that are; does nothing if
    there are none.
    """
    compressed = tuple(f"{name}." for name in (*kronecker_layers(model), *kronecker_embeddings(model)))
    for name, value in model.state_dict().items() if redrawn else ():
        if not name.startswith(compressed) or name.endswith(".bias"):
            value.copy_(redrawn[name])
