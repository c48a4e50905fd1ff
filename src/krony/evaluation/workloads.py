"""What is timed: a prefill, a decode, a training step. Each workload runs once with a model and returns seconds."""

from __future__ import annotations

import gc
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from krony.evaluation.settings import SpeedSettings
from krony.runtime.timing import timed

Workload = Callable[[Any], float]


def alternate(models: Sequence[Any], workload: Workload, rounds: int, *, warm_up: bool = True) -> list[list[float]]:
    """Seconds of every turn of each model. The models take turns, and the order is reversed every round.

    So a busy moment of the machine affects all models. With ``warm_up`` one more round comes first, which isn't kept.
    """
    seconds: list[list[float]] = [[] for _ in models]
    gc.collect()
    for number in range(0 if warm_up else 1, rounds + 1):
        order = range(len(models)) if number % 2 else reversed(range(len(models)))
        for index in order:
            took = workload(models[index])
            if number:
                seconds[index].append(took)
    return seconds


def random_ids(model: Any, settings: SpeedSettings, batch: int | None = None, length: int | None = None) -> Tensor:
    """Token ids ``(batch, length)`` on the model's device; ``settings`` give the sizes that are None."""
    size = (batch or settings.batch, length or settings.length)
    generator = torch.Generator().manual_seed(settings.seed)
    vocabulary = model.config.get_text_config().vocab_size
    return torch.randint(0, vocabulary, size, generator=generator).to(model.device)


def empty_cache(model: Any) -> dict[str, DynamicCache]:
    """A new key-value cache, as ``generate`` passes it, by the name that this version of transformers gives it."""
    known = inspect.signature(type(getattr(model, "_orig_mod", model)).forward).parameters
    return {"cache" if "cache" in known else "past_key_values": DynamicCache(config=model.config)}


def prefill(settings: SpeedSettings, batch: int | None = None, length: int | None = None) -> Workload:
    """A prefill that fills the cache and computes the last token's logits; ``settings`` give sizes that are None."""

    @torch.inference_mode()
    def workload(model: Any) -> float:
        ids = random_ids(model, settings, batch, length)
        return timed(model.device, lambda: model(input_ids=ids, logits_to_keep=1, use_cache=True, **empty_cache(model)))

    return workload


def decode(settings: SpeedSettings) -> Workload:
    """``new_tokens`` of one sequence, one at a time, after ``context`` tokens whose prefill is not timed."""

    @torch.inference_mode()
    def workload(model: Any) -> float:
        options = {**empty_cache(model), "logits_to_keep": 1}
        output = model(input_ids=random_ids(model, settings, 1, settings.context), use_cache=True, **options)

        def call() -> None:
            nonlocal output
            for _ in range(settings.new_tokens):  # greedy, without generate's own bookkeeping
                output = model(input_ids=output.logits[:, -1:].argmax(-1), use_cache=True, **options)

        return timed(model.device, call)

    return workload


class TrainingStep:
    """One step of AdamW with a learning rate of zero: all of the work, and the weights don't change.

    Args:
        settings: the sizes.
        models: the models.
        runs: what is called for each model: itself, or its compiled form.
    """

    def __init__(self, settings: SpeedSettings, models: Sequence[Any], runs: Sequence[Any]) -> None:
        self.settings = settings
        self.models = {id(run): model for run, model in zip(runs, models, strict=True)}
        self.optimizers = {
            id(run): torch.optim.AdamW(model.parameters(), lr=0.0, fused=True)
            for run, model in zip(runs, models, strict=True)
        }

    def __call__(self, run: Any) -> float:
        """Seconds of one step."""
        model, optimizer = self.models[id(run)], self.optimizers[id(run)]
        ids = random_ids(model, self.settings)

        def step() -> None:
            run(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()
            optimizer.zero_grad()

        model.train()
        try:
            return timed(model.device, step)
        finally:
            model.eval()
