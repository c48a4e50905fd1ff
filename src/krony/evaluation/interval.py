"""How sure a ratio of two perplexities is: a bootstrap over the sequences that both were measured on."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from krony.evaluation.perplexity import measure_losses
from krony.models.modes import evaluating
from krony.runtime.progress import Progress, silent

LEVEL = 0.95  # of the interval
SAMPLES = 2000  # of the bootstrap


class Interval(NamedTuple):
    """A model's perplexity divided by another's, and where it lies in 95 of 100 texts of this kind."""

    ratio: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.ratio:.3f} ({self.low:.3f} to {self.high:.3f})"


def ratio_interval(losses: Tensor, original: Tensor, *, seed: int = 0) -> Interval:
    """The ratio of two perplexities, from the mean losses ``(sequences,)`` of both on the same sequences, in nats.

    The bootstrap (Efron 1979) draws sequences with replacement, the same for both models: what makes a text hard for
    one makes it hard for the other, and cancels. A single sequence says nothing of others, so its interval is infinite.

    Examples:
        >>> Interval(*(round(x, 2) for x in ratio_interval(torch.tensor([3.1, 2.1]), torch.tensor([3.0, 2.0]))))
        Interval(ratio=1.11, low=1.11, high=1.11)
    """
    excess = losses.double() - original.double()  # (sequences,)
    if len(excess) < 2:
        return Interval(math.exp(excess.mean()), 0.0, math.inf)
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(len(excess), (SAMPLES, len(excess)), generator=generator)
    means = excess[drawn].mean(1)  # (SAMPLES,)
    low, high = means.quantile(torch.tensor([(1 - LEVEL) / 2, (1 + LEVEL) / 2], dtype=torch.float64)).tolist()
    return Interval(math.exp(excess.mean()), math.exp(low), math.exp(high))


def sequence_losses(model: PreTrainedModel, ids: Tensor, progress: Progress = silent) -> Tensor:
    """The mean loss of each sequence of ``ids: (sequences, length)``, in nats per predicted token: ``(sequences,)``.

    Several processes share the sequences. The model's modes are the same afterwards.
    """
    with evaluating(model):
        length = ids.shape[1]
        losses, counts = measure_losses(model, ids.flatten(), window=length, stride=length, progress=progress)
    return losses / counts
