"""How long a compression in memory takes on this machine: each kind of work is timed on a small part of it."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from krony.compression.allocation import least_width, ranking_of
from krony.compression.compress import calibration_for, check_weights, compress_as_planned
from krony.compression.moments import Calibration, sensitivity_rows
from krony.compression.plan import CompressionPlan, plan
from krony.compression.reconstruction import examples, reconstruct_group
from krony.compression.replacement import replacements
from krony.compression.tuning import held_out, tune
from krony.config import KronyConfig
from krony.errors import KronyWarning
from krony.init.base import Moments
from krony.models.fast_training import fast_training
from krony.models.precision import fast_products
from krony.models.split_attention import splitting, wholes_of
from krony.runtime.progress import silent
from krony.runtime.timing import timed

READ_TOKENS = 2048  # of the text that is read to time the reading; one sequence at least
STEPS = 1, 3  # of two short trainings: their difference is what steps take


@dataclass(frozen=True, kw_only=True)
class CompressionPace:
    """Seconds on this machine, for one model, text and configuration.

    Attributes:
        kept: whether the second moments are in the cache already.
        backward: to read a sequence and measure the sensitivity on it.
        forward: to read a sequence.
        factors: to compute costs, factors and errors of all groups.
        trained: of ``reconstruct``: what each token of the text takes for all groups, and each step.
        step: of ``tune``: a step without the original's forward pass.
        original: the original's forward pass.
        held: the divergence from the original on a sequence that is held back, before and after the training.
    """

    kept: bool
    backward: float
    forward: float
    factors: float
    trained: tuple[float, float]
    step: float
    original: float
    held: float

    def seconds(self, config: KronyConfig, ids: Tensor) -> float:
        """The time of a compression of the measured model by ``config`` with ``ids: (sequences, length)``.

        ``config`` may differ from the measured one in how long it tunes, and in the size.
        """
        sequences = len(ids)
        first = sensitivity_rows(ids) if config.needs_gradient else 0
        total = self.factors
        if not self.kept:
            total += first * self.backward + (sequences - first) * self.forward
        if config.reconstruct:
            per_token, per_step = self.trained
            total += per_token * ids.numel() + per_step * config.reconstruct
        if config.tune:
            held = held_out(sequences)
            total += held * self.held + config.tune * self.step
            total += min(config.tune, max(1, sequences - held)) * self.original
        return total


@torch.no_grad()
def compression_pace(
    model: PreTrainedModel, settled: CompressionPlan, ids: Tensor, *, cache: Path | str | None = None
) -> CompressionPace:
    """Times the work that the plan needs; the model does not change.

    Args:
        ids: token ids ``(sequences, length)`` of the calibration text.
        cache: the folder that may hold its second moments.

    Raises:
        KronyError: the model can't be compressed as it is, or can't take these ids.
    """
    config = settled.config
    check_weights(model)
    kept = calibration_for(settled, model, ids, cache=cache).is_stored
    few = ids[: max(1, READ_TOKENS // ids.shape[1])]
    sites = [site.name for group in settled.groups for site in group.sites]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", KronyWarning)  # the part of the text is small
        step, original, held = _tuned(model, config, ids[:1]) if config.tune else (0.0, 0.0, 0.0)
        with splitting(model, wholes_of(model, sites) if config.split_attention else []):
            model.base_model(input_ids=few[:1].to(model.device), use_cache=False)  # the first pass is slower
            backward, moments = _reading(model, settled, few, sensitivity=config.needs_gradient)
            forward = _reading(model, settled, few, sensitivity=False)[0] if config.needs_gradient else backward
            factors = len(settled.groups) * timed(model.device, lambda: _one_group(model, settled, moments))
            trained = _trained(model, settled, few, moments) if config.reconstruct else (0.0, 0.0)
    return CompressionPace(
        kept=kept,
        backward=backward / len(few),
        forward=forward / len(few),
        factors=factors,
        trained=trained,
        step=step,
        original=original,
        held=held,
    )


def _reading(
    model: PreTrainedModel, settled: CompressionPlan, ids: Tensor, *, sensitivity: bool
) -> tuple[float, Moments]:
    """Seconds to read ``ids: (sequences, length)``, and the moments of the first group."""
    weighted, found = settled.config.token_weighting, []
    text = Calibration(model, settled.groups, ids, token_weighting=weighted, sensitivity=sensitivity)

    def read() -> None:
        for index, moments in enumerate(text):
            if index == 0:
                found.append(moments)

    return timed(model.device, read), found[0]


def _one_group(model: PreTrainedModel, settled: CompressionPlan, moments: Moments) -> None:
    """The costs if there is an allocation, the factors, and the errors of the first group."""
    config, group = settled.config, settled.groups[0]
    kept = None
    if config.allocation == "global":
        width, first = group.sites[-1].in_features, settled.shapes[group.sites[0].name]
        ranking = ranking_of(model, group, moments, config, least=least_width(settled))
        kept = ranking.kept(width, first.kept_rows)
    replacements(model, group, settled.shapes, config, moments, kept=kept)


def _trained(model: PreTrainedModel, settled: CompressionPlan, ids: Tensor, moments: Moments) -> tuple[float, float]:
    """Seconds that ``reconstruct`` takes for a token of the text, and for a step; of all groups."""
    config, group = settled.config, settled.groups[0]
    text = next(examples(model, [group], ids, token_weighting=config.token_weighting, progress=silent))
    made = replacements(model, group, settled.shapes, config, moments)
    layers = {name: one.layer for name, one in made.items()}

    def train(steps: int) -> None:
        reconstruct_group(model, group, text, moments, replace(config, reconstruct=steps), copy.deepcopy(layers))

    start, step = _line(model, train)
    return len(settled.groups) * start / ids.numel(), len(settled.groups) * step


def _tuned(model: PreTrainedModel, config: KronyConfig, ids: Tensor) -> tuple[float, float, float]:
    """Of ``tune``: a step, the original's forward pass, and what is measured before and after; in seconds.

    ``ids``: one sequence, ``(1, length)``. The shapes are those of an even allocation, the factors are random.
    """
    student = copy.deepcopy(model)
    alike = KronyConfig(
        config.scheme,
        init="random",
        modules=config.modules,
        layers=config.layers,
        split_attention=config.split_attention,
    )
    compress_as_planned(student, plan(student, alike), None)
    everything = config.tune_all
    held, step = _line(model, lambda steps: tune(student, model, ids, steps=steps, everything=everything))

    def look() -> None:
        with fast_products(model):
            model.base_model(input_ids=ids.to(model.device), use_cache=False)

    with fast_training(None, model, device=model.device, length=ids.shape[1]):
        return step, timed(model.device, look), held


def _line(model: PreTrainedModel, train: Callable[[int], object]) -> tuple[float, float]:
    """What a training takes without steps, and each step; in seconds."""
    few, more = STEPS
    train(few)  # the first one is slower
    short, long = (timed(model.device, partial(train, steps)) for steps in STEPS)
    step = max(0.0, (long - short) / (more - few))
    return max(0.0, short - few * step), step
