"""``krony.frontier``: several sizes of one model, from one calibration, without any training."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from krony.config import KronyConfig
from krony.data.calibration_set import LENGTH, TOKENS
from krony.models.loading import context_length
from krony.models.surgery import count_parameters
from krony.runtime.progress import Progress, silent
from krony.sizing.defaults import GLOBAL_ALLOCATION, KEEPS
from krony.sizing.report import Frontier, Point
from krony.sizing.sizes import Sizes
from krony.sizing.text import split

GLOBAL = KronyConfig(**GLOBAL_ALLOCATION)


def frontier(
    model: PreTrainedModel,
    calibration: str,
    *,
    tokenizer: PreTrainedTokenizerBase,
    val: str | None = None,
    keeps: Sequence[float] = KEEPS,
    config: KronyConfig = GLOBAL,
    tokens: int = TOKENS,
    cache: Path | str | None = None,
    progress: Progress = silent,
) -> Frontier:
    """Compresses copies of ``model`` to several sizes and measures each on text that was held back.

    Args:
        model: a causal LM; it does not change.
        calibration: a text or jsonl file, or ``python-docs``.
        tokenizer: the model's.
        val: text to measure on; None holds a tenth of the documents of ``calibration`` back.
        keeps: shares of hidden neurons to keep, each between 0 and 1.
        config: how to compress; its scheme is not read.
        tokens: calibrate on at most so many tokens.
        cache: folder that stores the second moments; None keeps them for this call only.
        progress: called with the number of finished parts, the number of all parts, and what is being done.

    Raises:
        KronyError: text that can't be read, a share that no scheme has, or an initialisation without costs.
    """
    length = min(LENGTH, context_length(model))
    ids, held = split(calibration, val, tokenizer, tokens=tokens, length=length, seed=config.seed)
    with kept_in(cache) as folder:
        sizes = Sizes(model, config, ids, held, cache=folder, progress=progress)
        wanted = sorted({sizes.size(keep) for keep in keeps}, key=lambda size: -size.params)
        points = []
        for size in wanted:
            measured = sizes.measure(size)
            points.append(
                Point(
                    scheme=size.scheme,
                    params=size.params,
                    bytes=size.params * model.dtype.itemsize,
                    predicted=math.exp(min(sizes.predicted(size), 700)),
                    measured=measured.ratio,
                    low=measured.low,
                    high=measured.high,
                )
            )
    params = count_parameters(model)
    return Frontier(
        model=_name(model),
        params=params,
        bytes=params * model.dtype.itemsize,
        tokens=held.numel(),
        points=points,
    )


def _name(model: PreTrainedModel) -> str:
    """What the model was loaded from: a name on the hub, or the last part of a folder's path."""
    name = str(model.name_or_path)
    return (Path(name).name if Path(name).is_dir() else name) or type(model).__name__


@contextmanager
def kept_in(cache: Path | str | None) -> Iterator[Path]:
    """The folder for second moments: ``cache``, or one that is removed at the end."""
    if cache is not None:
        yield Path(cache)
        return
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)
