"""How long the runs of a table take here: from a few steps and a few rows that are measured."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from transformers import PreTrainedModel

from krony.compression.compress import compress
from krony.data.rows import Rows
from krony.healing.recipes import Recipe
from krony.healing.trainable import adamw
from krony.models.fast_training import fast_training
from krony.models.modes import evaluating
from krony.models.precision import fast_products
from krony.reproduce.runs import Run
from krony.runtime.timing import timed

MEASURED_TOKENS = 2048  # of a step; one row at least
REPEATS = 3  # after a first one that isn't counted; the fastest is taken, because other programs only slow it down


@dataclass(frozen=True, kw_only=True)
class Work:
    """What a run still has to do.

    Attributes:
        tokens: tokens to train on.
        steps: optimiser steps.
        validated: tokens of validation text, over all measurements.
        tested: tokens of test sets, over all measurements.
    """

    tokens: float = 0.0
    steps: float = 0.0
    validated: float = 0.0
    tested: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Pace:
    """Seconds on this machine.

    Attributes:
        token: of a trained token: forward, backward, and the teacher's forward.
        step: of the optimiser's step.
        fast_token: of a validated token, with the products that training uses.
        exact_token: of a token of a test set, in the model's own precision.
    """

    token: float
    step: float
    fast_token: float
    exact_token: float

    def seconds(self, work: Work) -> float:
        """The time that ``work`` takes."""
        return (
            work.tokens * self.token
            + work.steps * self.step
            + work.validated * self.fast_token
            + work.tested * self.exact_token
        )


def measure_pace(base: PreTrainedModel, run: Run, rows: Rows, recipe: Recipe) -> Pace:
    """The pace of ``run``, measured with a copy of ``base`` that van-loan compresses to the same shapes."""
    model = copy.deepcopy(base)
    compress(model, replace(run.config, init="van-loan"))
    count = min(recipe.batch, len(rows), max(1, MEASURED_TOKENS // rows.length))
    ids = torch.stack([rows[index]["input_ids"] for index in range(count)]).to(model.device)  # (count, length)

    def forward(of: PreTrainedModel) -> Tensor:
        loss: Tensor = of(input_ids=ids, labels=ids, use_cache=False).loss
        return loss

    def learn() -> None:
        with fast_products(model):
            loss = forward(model)
        loss.backward()

    def look(of: PreTrainedModel) -> None:
        with torch.no_grad(), fast_products(of):
            forward(of)

    optimizer = adamw(model, recipe)
    with fast_training(model, base, device=model.device, length=rows.length):
        train = _fastest(learn, model)
        step = _fastest(optimizer.step, model)
        with evaluating(model):
            validate = _fastest(lambda: look(model), model)
        taught = _fastest(lambda: look(base), model) if run.taught else 0.0
    with evaluating(model), torch.no_grad():
        test = _fastest(lambda: forward(model), model)
    each = ids.numel()
    return Pace(token=(train + taught) / each, step=step, fast_token=validate / each, exact_token=test / each)


def _fastest(work: Callable[[], object], model: PreTrainedModel) -> float:
    return min([timed(model.device, work) for _ in range(1 + REPEATS)][1:])
