"""Compresses the model that comes with krony in several ways, heals one of them, and measures all."""

from __future__ import annotations

import copy
import statistics
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from krony.compression.compress import compress
from krony.compression.report import CompressionReport
from krony.config import KronyConfig
from krony.data.calibration_set import pack
from krony.data.python_docs import topics
from krony.data.rows import load_rows
from krony.evaluation.perplexity import evaluate
from krony.evaluation.settings import SpeedSettings
from krony.evaluation.workloads import Workload, alternate, decode, prefill
from krony.healing.options import HealOptions
from krony.healing.recipes import RECIPES
from krony.healing.report import HealReport
from krony.healing.training import train_on_rows
from krony.models.export import slim
from krony.models.loading import demo_model, load_tokenizer
from krony.models.surgery import count_parameters
from krony.runtime.progress import Progress, silent

ORIGINAL = "original"
SCHEME, INITS = "keep=0.5", ("neurons", "van-loan", "prune")
HEALED = INITS[0]  # is healed, and timed in its slim form
PROMPT = "The function returns"
HEAL_TOKENS = 65_536
LEARNING_RATE = 5e-4  # a small model takes larger steps than the recipe's
SPEED = SpeedSettings(new_tokens=16, rounds=9)
STEPS = 8  # of the progress bar

Models = dict[str, PreTrainedModel]


@dataclass(frozen=True, kw_only=True)
class DemoRow:
    """One model of the table. Ratios are to the original.

    Attributes:
        init: the initialisation, or ``original``.
        params: parameters; the tied head counts once.
        bytes: bytes of the parameters.
        perplexity: before healing.
        ratio: the same relative to the original's.
        perplexity_healed: after healing; None where nothing was trained.
        ratio_healed: the same relative to the untrained original's.
        prefill_tokens_per_s: speed of a prefill of 512 tokens.
        prefill_ratio: its speed relative to the original's.
        decode_ratio: the speed of decoding relative to the original's.
        sentence: what the model writes.
    """

    init: str
    params: int
    bytes: int
    perplexity: float
    ratio: float
    perplexity_healed: float | None
    ratio_healed: float | None
    prefill_tokens_per_s: float
    prefill_ratio: float
    decode_ratio: float
    sentence: str


@dataclass(frozen=True, kw_only=True)
class Demo:
    """What the demo measured, and the healed model.

    Attributes:
        rows: the table.
        reports: of the compressions, by init.
        healing: of the healed model, and of the original, which is trained as long for comparison.
        model: the healed model.
        seconds: wall time.
    """

    rows: list[DemoRow]
    reports: dict[str, CompressionReport]
    healing: dict[str, HealReport]
    model: PreTrainedModel
    seconds: float

    @property
    def tokens(self) -> int:
        """Tokens of healing."""
        return self.healing[HEALED].tokens

    def to_json(self) -> dict[str, Any]:
        """The figures for ``--json``."""
        return {"rows": [asdict(row) for row in self.rows], "seconds": self.seconds}


def run_demo(
    *, heal_tokens: int = HEAL_TOKENS, max_tokens: int | None = None, seed: int = 0, progress: Progress = silent
) -> Demo:
    """Removes half of the MLPs' parameters from the model that comes with krony, in three ways, and heals one.

    The ways are neuron selection and the paper's two starts. The text is Python's documentation: one part calibrates
    and heals, the other measures.

    Args:
        heal_tokens: tokens to heal on.
        max_tokens: measure perplexity on the first N tokens; None takes all.
        seed: seed of everything random.
        progress: called with the steps done, all steps, and what is being done.
    """
    start = time.perf_counter()
    tokenizer = load_tokenizer("demo")
    models, reports = _compress_all(tokenizer, seed, progress)
    progress(3, STEPS, "measuring")
    before = {name: _perplexity(model, tokenizer, max_tokens) for name, model in models.items()}
    healed, healing = _heal_both(models, tokenizer, heal_tokens, seed, progress)
    progress(6, STEPS, "measuring")
    after = {name: _perplexity(model, tokenizer, max_tokens) for name, model in healed.items()}
    progress(7, STEPS, "timing")
    fast = {name: slim(copy.deepcopy(model)).model if name == HEALED else model for name, model in models.items()}
    prefills, decodes = (_median_seconds(fast, workload(SPEED)) for workload in (prefill, decode))
    rows = [
        DemoRow(
            init=name,
            params=count_parameters(model),
            bytes=sum(p.numel() * p.element_size() for p in model.parameters()),
            perplexity=before[name],
            ratio=before[name] / before[ORIGINAL],
            perplexity_healed=after.get(name),
            ratio_healed=after[name] / before[ORIGINAL] if name in after else None,
            prefill_tokens_per_s=SPEED.length / prefills[name],
            prefill_ratio=prefills[ORIGINAL] / prefills[name],
            decode_ratio=decodes[ORIGINAL] / decodes[name],
            sentence=_sentence(healed.get(name, model), tokenizer),
        )
        for name, model in models.items()
    ]
    seconds = time.perf_counter() - start
    return Demo(rows=rows, reports=reports, healing=healing, model=healed[HEALED], seconds=seconds)


def _compress_all(
    tokenizer: PreTrainedTokenizerBase, seed: int, progress: Progress
) -> tuple[Models, dict[str, CompressionReport]]:
    """The original, and one compressed model per init."""
    text = pack(topics("calibration"), tokenizer, seed=seed)
    models: Models = {ORIGINAL: demo_model()}
    reports: dict[str, CompressionReport] = {}
    with tempfile.TemporaryDirectory() as cache:  # the text is read once
        for number, init in enumerate(INITS):
            progress(number, STEPS, f"compressing by {init}")
            models[init], config = demo_model(), KronyConfig(SCHEME, init=init, seed=seed)
            reports[init] = compress(models[init], config, calibration=text, cache=Path(cache))
    return models, reports


def _heal_both(
    models: Models, tokenizer: PreTrainedTokenizerBase, tokens: int, seed: int, progress: Progress
) -> tuple[Models, dict[str, HealReport]]:
    """Trained copies: of the compressed model with the original as teacher, and of the original by itself."""
    healed: Models = {}
    healing: dict[str, HealReport] = {}
    for number, (name, teacher) in enumerate(((HEALED, models[ORIGINAL]), (ORIGINAL, None)), start=4):
        progress(number, STEPS, f"training {name}" if teacher else "training the original as long, for comparison")
        healed[name] = copy.deepcopy(models[name])
        healing[name] = _heal(healed[name], tokenizer, teacher, tokens, seed)
    return healed, healing


def _heal(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    teacher: PreTrainedModel | None,
    tokens: int,
    seed: int,
) -> HealReport:
    rows = load_rows("python-docs", tokenizer, length=512, vocabulary=len(tokenizer))
    train, validation = rows.split(8)
    recipe = replace(RECIPES["quick"], learning_rate=LEARNING_RATE, final_rate=LEARNING_RATE / 100)
    recipe = replace(recipe, epochs=tokens / (len(train) * train.length))
    # the original has seen this text: training can't improve it, and is to show what it does
    options = HealOptions(seed=seed, keep_anyway=teacher is None)
    with tempfile.TemporaryDirectory() as work:
        return train_on_rows(model, train, validation, work=Path(work), recipe=recipe, teacher=teacher, options=options)


def _perplexity(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, max_tokens: int | None) -> float:
    return evaluate(model, tokenizer, "python-docs", protocol="token", max_tokens=max_tokens).perplexity


@torch.inference_mode()
def _sentence(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> str:
    torch.manual_seed(0)
    inputs = tokenizer(PROMPT, return_tensors="pt")
    output = model.generate(
        **inputs, max_new_tokens=32, do_sample=True, temperature=0.7, top_p=0.9, pad_token_id=tokenizer.eos_token_id
    )
    return " ".join(str(tokenizer.decode(output[0], skip_special_tokens=True)).split())


def _median_seconds(models: Models, workload: Workload) -> dict[str, float]:
    """Median seconds of each model's turns."""
    times = alternate(list(models.values()), workload, SPEED.rounds)
    return {name: statistics.median(seconds) for name, seconds in zip(models, times, strict=True)}
