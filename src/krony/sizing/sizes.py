"""The sizes of one model: what each is predicted to lose, and what it loses on text that was held back."""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from torch import Tensor
from transformers import PreTrainedModel

from krony.compression.allocation import allocate_widths, ranked
from krony.compression.compress import compress_as_planned
from krony.compression.moments import Calibration
from krony.compression.plan import CompressionPlan, chosen_groups, plan, portion, size_of
from krony.compression.report import CompressionReport
from krony.config import KronyConfig
from krony.errors import KronyError
from krony.evaluation.interval import Interval, ratio_interval, sequence_losses
from krony.init.base import Ranking
from krony.init.registry import INITIALISATIONS
from krony.kronecker.layer_schemes import LayerSchemes
from krony.kronecker.schemes import KEEP_GROUP
from krony.models.surgery import count_parameters
from krony.runtime.progress import Progress, silent


@dataclass(frozen=True, kw_only=True)
class Size:
    """One compressed model.

    Attributes:
        scheme: its scheme.
        keep: the share of hidden neurons that it keeps, over all layers.
        params: its unique parameters, at most.
    """

    scheme: str
    keep: float
    params: int


class Sizes:
    """Compresses copies of ``model`` to several sizes, all calibrated on the same text.

    Args:
        model: the original; it does not change.
        config: how to compress; its scheme is not read.
        ids: token ids ``(sequences, length)`` to calibrate on.
        held: token ids ``(sequences, length)`` of other text, to measure on.
        cache: folder that stores the second moments.
        progress: called with the number of finished parts, the number of all parts, and what is being done.

    Raises:
        KronyError: the initialisation's costs are no losses, the scheme is one per layer, or no layer matches.
    """

    def __init__(
        self, model: PreTrainedModel, config: KronyConfig, ids: Tensor, held: Tensor, *,
        cache: Path | str | None = None, progress: Progress = silent,
    ) -> None:  # fmt: skip
        if not config.initialisation.predicts_loss:
            names = ", ".join(name for name, init in INITIALISATIONS.items() if init.predicts_loss)
            raise KronyError(f"sizes are compared with init {names}, and the init is {config.init}")
        if isinstance(config.scheme, LayerSchemes):
            raise KronyError(
                "sizes are compared with one scheme for all layers, and the config has one per layer: leave it out "
                "(modules and layers choose what is replaced)"
            )
        self.groups = chosen_groups(model, config)
        self.model, self.config, self.ids, self.held = model, config, ids, held
        self.cache, self.progress = cache, progress
        self.measured: dict[str, Interval] = {}

    @cached_property
    def ladder(self) -> list[Size]:
        """Every size from the largest to the smallest, in equal portions of neurons.

        Raises KronyError if no scheme fits this model, and says why.
        """
        first = self.groups[0].sites[0]
        width = first.out_features
        group = max(r for r in range(1, KEEP_GROUP + 1) if width % r == 0)
        schemes = {f"{width // group}x{first.in_features}:{kept}": kept / group for kept in range(group - 1, 0, -1)}
        if schemes:
            self._plan(next(iter(schemes)))  # says what is wrong with the options
        whole = count_parameters(self.model)
        found = []
        for scheme, keep in schemes.items():
            params = size_of(self.model, self.groups, replace(self.config, scheme=scheme))
            # None: it doesn't fit, or less than a portion per layer; and the factors of very few neurons can outweigh
            # what they save
            if params is not None and params < whole:
                found.append(Size(scheme=scheme, keep=keep, params=params))
        if not found:
            raise KronyError(f"{width} hidden neurons can't be divided into portions that save parameters")
        return found

    def size(self, keep: float) -> Size:
        """The size that keeps this share of the neurons. Raises KronyError if there is none."""
        settled = self._plan(f"keep={keep:g}")
        first = self.groups[0].sites[0]
        shape = settled.shapes[first.name]
        kept = shape.kept_rows / first.out_features
        return Size(scheme=str(settled.config.scheme), keep=kept, params=settled.params_after)

    def predicted(self, size: Size) -> float:
        """By how many nats per token the loss rises, by the second-order costs of the dropped neurons.

        A prediction for small changes, and in the units of the calibration's weights: it orders sizes, and its scale is
        right only once a size is measured.
        """
        width = self.groups[0].sites[0].out_features
        each = round(size.keep * width)
        curves = [ranking.costs for ranking in self._rankings]
        kept = [each] * len(curves)
        if self.config.allocation == "global":
            kept = allocate_widths(curves, self._least, each * len(kept), self.config.max_width)
        return float(sum(curve[width - n] for curve, n in zip(curves, kept, strict=True))) / 2

    def measure(self, size: Size) -> Interval:
        """The perplexity of this size on the held-back text, relative to the original's."""
        if size.scheme not in self.measured:
            model = copy.deepcopy(self.model)
            self.compress(model, size)
            self.measured[size.scheme] = self.compare(model)
        return self.measured[size.scheme]

    def compress(self, model: PreTrainedModel, size: Size) -> CompressionReport:
        """Compresses the original, or a copy of it, to this size in place."""
        rankings = self._rankings if self.config.allocation == "global" else None
        settled = self._plan(size.scheme)
        return compress_as_planned(
            model, settled, self.ids, rankings=rankings, cache=self.cache, progress=self.progress
        )

    def compare(self, model: PreTrainedModel) -> Interval:
        """The perplexity of any model on the held-back text, relative to the original's."""
        return ratio_interval(sequence_losses(model, self.held, self.progress), self._original_losses)

    @cached_property
    def _original_losses(self) -> Tensor:
        return sequence_losses(self.model, self.held, self.progress)

    @cached_property
    def _least(self) -> int:
        """Neurons that every layer keeps at least."""
        width = self.groups[0].sites[0].out_features
        return portion(width, self.config.multiple_of) if self.config.allocation == "global" else 1

    @cached_property
    def _rankings(self) -> list[Ranking]:
        settled = self._plan(self.ladder[0].scheme)
        moments = Calibration(
            self.model, settled.groups, self.ids, token_weighting=self.config.token_weighting, sensitivity=True,
            cache=self.cache, progress=self.progress,
        )  # fmt: skip
        return ranked(self.model, settled, moments, self.progress, least=self._least)

    def _plan(self, scheme: str) -> CompressionPlan:
        return plan(self.model, replace(self.config, scheme=scheme))
