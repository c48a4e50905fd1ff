"""The whole story on the model that comes with krony, offline: compress it in every way, heal one, measure all."""

from __future__ import annotations

import copy
import statistics
import tempfile
import time
import warnings
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from krony.compression.compress import CompressionReport, compress
from krony.config import KronyConfig
from krony.data.calibration_set import pack
from krony.data.python_docs import topics
from krony.data.rows import load_rows
from krony.errors import KronyWarning
from krony.evaluation import speed
from krony.evaluation.perplexity import evaluate
from krony.evaluation.speed import Settings, Work, alternate
from krony.healing.options import HealOptions
from krony.healing.recipes import RECIPES
from krony.healing.report import HealReport
from krony.healing.training import train_on_rows
from krony.models.export import slim
from krony.models.loading import demo_model, load_tokenizer
from krony.models.surgery import count_parameters
from krony.runtime.progress import Progress, silent

SCHEME, INITS = "keep=0.5", ("neurons", "van-loan", "prune")
PROMPT = "The function returns"
HEAL_TOKENS = 65_536
RATE = 5e-4  # a small model takes larger steps than the recipe's
ROUNDS = 9  # of each timing


@dataclass(frozen=True)
class DemoRow:
    """One model of the table. ``ratio``s are to the original; healed figures are None where nothing was trained."""

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

    def to_json(self) -> dict:
        return asdict(self)


@dataclass(frozen=True)
class Demo:
    """What the demo found, and the healed model."""

    rows: list[DemoRow]
    reports: dict[str, CompressionReport]
    healing: dict[str, HealReport]  # of the compressed model and of the original, its control
    model: PreTrainedModel
    seconds: float

    def to_json(self) -> dict:
        return {"rows": [row.to_json() for row in self.rows], "seconds": self.seconds}


def run_demo(
    *, heal_tokens: int = HEAL_TOKENS, max_tokens: int | None = None, seed: int = 0, progress: Progress = silent
) -> Demo:
    """Compresses the shipped model to half of its MLPs' parameters by the paper's inits and by neuron selection.

    The text is Python's documentation: one part to calibrate and to heal on, the other to measure with.

    Args:
        heal_tokens: how much text the healing takes.
        max_tokens: measure perplexity on so many tokens at most.
    """
    start = time.perf_counter()
    tokenizer, original = load_tokenizer("demo"), demo_model()
    text = pack(topics("calibration"), tokenizer, seed=seed)
    models: dict[str, PreTrainedModel] = {"original": original}
    reports: dict[str, CompressionReport] = {}
    with tempfile.TemporaryDirectory() as cache:  # the text is read once
        for number, init in enumerate(INITS):
            progress(number, 8, f"compressing by {init}")
            models[init], config = demo_model(), KronyConfig(SCHEME, init=init, seed=seed)
            reports[init] = compress(models[init], config, calibration=text, cache=Path(cache))
    progress(3, 8, "measuring")
    before = {name: _perplexity(model, tokenizer, max_tokens) for name, model in models.items()}
    healed: dict[str, PreTrainedModel] = {}
    healing: dict[str, HealReport] = {}
    for number, (name, teacher) in enumerate((("neurons", original), ("original", None)), start=4):
        progress(number, 8, f"training {name}" if teacher else "training the original as long, for comparison")
        healed[name] = copy.deepcopy(models[name])
        healing[name] = _heal(healed[name], tokenizer, teacher, heal_tokens, seed)
    progress(6, 8, "measuring")
    after = {name: _perplexity(model, tokenizer, max_tokens) for name, model in healed.items()}
    progress(7, 8, "timing")
    fast = {name: slim(copy.deepcopy(model)).model if name == "neurons" else model for name, model in models.items()}
    settings = Settings(new_tokens=16, rounds=ROUNDS)
    prefill, decode = (_medians(fast, work(settings)) for work in (speed.prefill, speed.decode))
    rows = [
        DemoRow(
            init=name,
            params=count_parameters(model),
            bytes=sum(p.numel() * p.element_size() for p in model.parameters()),
            perplexity=before[name],
            ratio=before[name] / before["original"],
            perplexity_healed=after.get(name),
            ratio_healed=after[name] / before["original"] if name in after else None,
            prefill_tokens_per_s=512 / prefill[name],
            prefill_ratio=prefill["original"] / prefill[name],
            decode_ratio=decode["original"] / decode[name],
            sentence=_sentence(healed.get(name, model), tokenizer),
        )
        for name, model in models.items()
    ]
    return Demo(rows, reports, healing, healed["neurons"], time.perf_counter() - start)


def _perplexity(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, max_tokens: int | None) -> float:
    return evaluate(model, tokenizer, "python-docs", protocol="token", max_tokens=max_tokens).perplexity


def _heal(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    teacher: PreTrainedModel | None,
    tokens: int,
    seed: int,
) -> HealReport:
    rows = load_rows("python-docs", tokenizer, length=512, vocabulary=len(tokenizer))
    train, validation = rows.split(8)
    recipe = replace(RECIPES["quick"], learning_rate=RATE, final_rate=RATE / 100)
    recipe = replace(recipe, epochs=tokens / (len(train) * train.length))
    with tempfile.TemporaryDirectory() as work, warnings.catch_warnings():
        warnings.simplefilter("ignore", KronyWarning)  # the original has seen this text: more training can't better it
        options = HealOptions(seed=seed, keep_anyway=True)
        return train_on_rows(model, train, validation, work=Path(work), recipe=recipe, teacher=teacher, options=options)


@torch.inference_mode()
def _sentence(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> str:
    torch.manual_seed(0)
    inputs = tokenizer(PROMPT, return_tensors="pt")
    output = model.generate(  # type: ignore[operator]
        **inputs, max_new_tokens=32, do_sample=True, temperature=0.7, top_p=0.9, pad_token_id=tokenizer.eos_token_id
    )
    return " ".join(str(tokenizer.decode(output[0], skip_special_tokens=True)).split())


def _medians(models: dict[str, PreTrainedModel], work: Work) -> dict[str, float]:
    """Median seconds of each model's turn."""
    times = alternate(list(models.values()), work, ROUNDS)
    return {name: statistics.median(seconds) for name, seconds in zip(models, times, strict=True)}
