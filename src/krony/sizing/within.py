"""The smallest size that keeps a promise: a perplexity within so much of the original's, on text it never saw."""

from __future__ import annotations

import bisect
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from krony.compression.report import CompressionReport
from krony.config import KronyConfig
from krony.data.calibration_set import LENGTH, TOKENS
from krony.errors import KronyError, PromiseError
from krony.evaluation.interval import Interval
from krony.models.loading import context_length
from krony.pages import Table
from krony.runtime.progress import Progress, silent
from krony.sizing.frontier import GLOBAL, kept_in
from krony.sizing.sizes import Size, Sizes
from krony.sizing.text import split

GUESSES = 3  # sizes that are measured where the cost curves point, before what is left of the sizes is halved


@dataclass(frozen=True, kw_only=True)
class Kept:
    """The smallest size that keeps a promise.

    Attributes:
        size: what was found.
        limit: the promise: the perplexity relative to the original's, at most.
        measured: that of ``size``.
        trials: every size that was measured, in order.
        tokens: the tokens that it was measured on.
        report: the compression to ``size``, once that is done.
    """

    size: Size
    limit: float
    measured: Interval
    trials: Sequence[tuple[Size, Interval]]
    tokens: int
    report: CompressionReport | None = None

    def __str__(self) -> str:
        return f"{self.table().markdown()}\n\n{self.sentence()}"

    def table(self) -> Table:
        """A row per size that was measured, the largest first."""
        rows = [
            [size.scheme, f"{size.params:,}", f"{at.ratio:.3f}", f"{at.low:.3f} to {at.high:.3f}"]
            + ["yes" if at.high <= self.limit else "no"]
            for size, at in sorted(self.trials, key=lambda trial: -trial[0].params)
        ]
        return Table(["size", "parameters", "measured", "95 % interval", f"within {percent(self.limit)}"], rows)

    def sentence(self) -> str:
        """What was promised and what was measured."""
        return (
            f"promised: at most {self.limit:.3f} times the original's perplexity; measured: {self.measured} on "
            f"{self.tokens:,} tokens held back from calibration"
        )

    def to_json(self) -> dict[str, Any]:
        """The promise, the figure and the trials, for ``--json``."""
        trials = [asdict(size) | at._asdict() for size, at in self.trials]
        return {
            "scheme": self.size.scheme,
            "limit": self.limit,
            "tokens": self.tokens,
            **self.measured._asdict(),
            "trials": trials,
        }


def compress_within(
    model: PreTrainedModel,
    within: float,
    calibration: str,
    *,
    tokenizer: PreTrainedTokenizerBase,
    val: str | None = None,
    config: KronyConfig = GLOBAL,
    tokens: int = TOKENS,
    cache: Path | str | None = None,
    progress: Progress = silent,
) -> Kept:
    """Compresses ``model`` in place to the smallest size that loses at most so much on text that was held back.

    The search compresses copies. The size that it finds is compressed again, in place, rather than kept beside the
    model: that would take the memory of a third model.

    Args:
        model: a causal LM; it changes only when a size keeps the promise.
        within: by what share the perplexity may rise: 0.05 for 5 %.
        calibration: a text or jsonl file, or ``python-docs``.
        tokenizer: the model's.
        val: text to measure on; None holds a tenth of the documents of ``calibration`` back.
        config: how to compress; its scheme is not read.
        tokens: calibrate on at most so many tokens.
        cache: folder that stores the second moments; None keeps them for this call only.
        progress: called with the number of finished parts, the number of all parts, and what is being done.

    Raises:
        PromiseError: no size keeps the promise; it names the nearest.
        KronyError: text that can't be read, or an initialisation without costs.
    """
    if not 0 < within < math.inf:
        raise KronyError(f"within is {within}: it takes a share above 0, such as 0.05 for 5 %")
    length = min(LENGTH, context_length(model))
    ids, held = split(calibration, val, tokenizer, tokens=tokens, length=length, seed=config.seed)
    with kept_in(cache) as folder:
        sizes = Sizes(model, config, ids, held, cache=folder, progress=progress)
        found = smallest(sizes, 1 + within)
        report = sizes.compress(model, found.size)
        return replace(found, report=report, measured=sizes.compare(model))


def smallest(sizes: Sizes, limit: float) -> Kept:
    """Finds the smallest size whose perplexity is at most ``limit`` times the original's.

    A size keeps the promise if the upper end of its 95 % interval does, and the next smaller size doesn't keep it. The
    cost curves, scaled to the sizes measured so far, say where to measure first; bisection ends the search.

    Raises PromiseError if no size keeps it, with the nearest one.
    """
    ladder, found = sizes.ladder, list[tuple[Size, Interval]]()
    kept, lost = -1, len(ladder)  # the smallest size known to keep it, the largest known not to
    scale = 1.0  # measured nats per predicted nat
    while lost - kept > 1:
        index = (kept + lost) // 2
        if len(found) < GUESSES:
            predicted = bisect.bisect_right(ladder, math.log(limit) / scale, key=sizes.predicted) - 1
            index = min(max(predicted, kept + 1), lost - 1)
        measured = sizes.measure(ladder[index])
        found.append((ladder[index], measured))
        if measured.high <= limit:
            kept = index
        else:
            lost = index
        if measured.high > 1:
            scale = max(math.log(measured.high) / max(sizes.predicted(ladder[index]), 1e-9), 1e-3)
    if kept < 0:
        nearest, at = min(found, key=lambda trial: trial[1].high)
        raise PromiseError(
            f"no size keeps the perplexity within {percent(limit)} of the original's: the nearest, {nearest.scheme} "
            f"with {nearest.params:,} parameters, is at {at}; calibrate on more text, or promise less"
        )
    measured = sizes.measure(ladder[kept])
    return Kept(size=ladder[kept], limit=limit, measured=measured, trials=found, tokens=sizes.held.numel())


def percent(limit: float) -> str:
    """By how much a limit exceeds one.

    Examples:
        >>> percent(1.05), percent(1.0001)
        ('5%', '0.01%')
    """
    return f"{round(100 * (limit - 1), 6):g}%"


def parse_within(text: str) -> float:
    """The share that a text such as ``5%`` means. Raises KronyError.

    Examples:
        >>> parse_within("5%"), parse_within("0.05")
        (0.05, 0.05)
    """
    number = text.strip().removesuffix("%")
    try:
        share = float(number) / (100 if text.strip().endswith("%") else 1)
    except ValueError:
        share = math.nan
    if not 0 < share < math.inf:
        raise KronyError(f"--within {text}: it takes a share above 0, such as 5%")
    if share >= 1 and not text.strip().endswith("%"):
        raise KronyError(f"--within {text}: that is {share:.0%}; write {number}% for {number} percent")
    return share
