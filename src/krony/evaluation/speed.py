"""How fast models are beside one another: prefill, decode, a training step, loading, memory.

All models live in one process and take turns, so that a busy moment of the machine hits all alike; the order of the
turns is reversed every round. Figures are medians, ratios are ratios of medians to the first model's.
"""

from __future__ import annotations

import gc
import inspect
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedModel

from krony.errors import KronyError
from krony.models.loading import check_device, context_length, load_config, load_model, parse_dtype
from krony.models.surgery import count_parameters
from krony.runtime.hardware import machine
from krony.runtime.progress import Progress, silent

Work = Callable[[Any], float]  # does one turn with a model, and says how many seconds it took


@dataclass(frozen=True)
class Settings:
    """What is measured.

    Attributes:
        batch, length: of prefill and of the training step; prefill fills the cache and gives the last token's logits.
        context, new_tokens: decode adds ``new_tokens``, one at a time, after ``context``; one sequence.
        rounds: turns of each model; one more comes before them, to warm up.
        train: also measure a training step: forward, backward, AdamW.
        batches, lengths: prefill is also measured at each of these beside ``batch`` and ``length``.
        compiled: the models run through ``torch.compile``.
    """

    batch: int = 1
    length: int = 512
    context: int = 64
    new_tokens: int = 64
    rounds: int = 9
    train: bool = True
    batches: tuple[int, ...] = ()
    lengths: tuple[int, ...] = ()
    compiled: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("batch", "length", "context", "new_tokens", "rounds"):
            if getattr(self, name) < 1:
                raise KronyError(f"{name} is {getattr(self, name)}: it takes a number from 1")
        if min((1, *self.batches, *self.lengths)) < 1:
            raise KronyError("batches and lengths of the sweep are numbers from 1")


@dataclass(frozen=True)
class Subject:
    """A model to be measured, with its bytes on disk and the median seconds that loading it takes."""

    name: str
    model: PreTrainedModel
    bytes: int
    load_seconds: float | None


@dataclass
class ModelSpeed:
    """The figures of one model; ``seconds`` holds every turn of each work, ``sweep`` tokens/s by batch and length."""

    name: str
    params: int
    bytes: int
    load_seconds: float | None
    peak_bytes: int
    tokens_per_s: dict[str, float] = field(default_factory=dict)
    spread: dict[str, tuple[float, float]] = field(default_factory=dict)
    ratio: dict[str, float] = field(default_factory=dict)
    sweep: list[dict[str, float]] = field(default_factory=list)

    def to_json(self) -> dict:
        speeds = {f"{work}_tokens_per_s": self.tokens_per_s.get(work) for work in WORKS}
        return {
            "name": self.name, "params": self.params, "bytes": self.bytes, **speeds,
            "peak_bytes": self.peak_bytes,
            "ratio": {work: self.ratio.get(work) for work in (*WORKS, "peak")},
            "load_seconds": self.load_seconds, "spread": self.spread, "sweep": self.sweep,
        }  # fmt: skip


WORKS = ("prefill", "decode", "train")


def bench(
    subjects: Sequence[Subject], settings: Settings | None = None, *, progress: Progress = silent
) -> list[ModelSpeed]:
    """Measures the models side by side; the first is the one that ratios are to.

    Ratios are of speed, higher is better, but for ``peak``, which is of memory. ``spread`` holds the quartiles of
    tokens/s.

    Raises:
        KronyError: a model whose context is too short for what is to be measured, or a device that isn't cpu or cuda.
    """
    settings = settings or Settings()
    for subject in subjects:
        _check(subject, settings)
    if not settings.compiled:
        return _measure(subjects, settings, progress)
    # models of one class share a limit of 8, beyond which they would run uncompiled
    with torch._dynamo.config.patch(recompile_limit=64 * len(subjects)):
        return _measure(subjects, settings, progress)


def _measure(subjects: Sequence[Subject], settings: Settings, progress: Progress) -> list[ModelSpeed]:
    rows = [
        ModelSpeed(
            s.name, count_parameters(s.model), s.bytes, s.load_seconds, peak_bytes(s.model, _ids(s.model, settings))
        )
        for s in subjects
    ]
    models: list[Any] = [s.model.eval() for s in subjects]
    runs = [torch.compile(model) for model in models] if settings.compiled else models
    steps = 2 + settings.train + len(_sweep(settings))
    progress(0, steps, "prefill")
    _note(rows, "prefill", alternate(runs, prefill(settings), settings.rounds), settings.batch * settings.length)
    progress(1, steps, "decode")
    _note(rows, "decode", alternate(runs, decode(settings), settings.rounds), settings.new_tokens)
    for done, (batch, length) in enumerate(_sweep(settings), start=2):
        progress(done, steps, f"prefill of {batch}x{length}")
        times = alternate(runs, prefill(settings, batch, length), settings.rounds)
        for row, seconds in zip(rows, times, strict=True):
            speed = batch * length / statistics.median(seconds)
            row.sweep.append({"batch": batch, "length": length, "tokens_per_s": speed})
    if settings.train:
        progress(steps - 1, steps, "training steps")
        times = alternate(runs, _Training(settings, models, runs), settings.rounds)
        _note(rows, "train", times, settings.batch * settings.length)
    first = rows[0]
    for row in rows:
        for work in WORKS:
            if work in row.tokens_per_s:
                row.ratio[work] = row.tokens_per_s[work] / first.tokens_per_s[work]
        row.ratio["peak"] = row.peak_bytes / first.peak_bytes
    progress(steps, steps, "done")
    return rows


def to_json(rows: Sequence[ModelSpeed], settings: Settings, **more: Any) -> dict:
    """What ``krony bench --json`` writes."""
    return {
        "machine": machine(), "models": [row.to_json() for row in rows],
        "settings": {name: getattr(settings, name) for name in settings.__dataclass_fields__}, **more,
    }  # fmt: skip


def store(
    name: str, model: PreTrainedModel, folder: Path | None = None, *, device: str = "cpu", loads: int = 3
) -> Subject:
    """A subject of ``model``: its bytes on disk, and how long loading takes.

    Args:
        folder: where it lies already; None writes it to a temporary folder, in the dtype that it has.
        loads: of which the median is taken; 0 for a model that can't be loaded, whose bytes are its tensors'.
    """
    if loads == 0:
        return Subject(name, model, _weights(model), None)
    with tempfile.TemporaryDirectory() as temporary, nullcontext(folder or Path(temporary)) as where:
        if folder is None:
            model.save_pretrained(where)
        size = sum(file.stat().st_size for file in where.glob("*.safetensors"))
        seconds = []
        for _ in range(loads):
            start = time.perf_counter()
            load_model(str(where), dtype=model.dtype, device=device)
            seconds.append(time.perf_counter() - start)
    return Subject(name, model, size, statistics.median(seconds))


def random_model(
    name: str, *, dtype: str | torch.dtype = "auto", device: str = "cpu", seed: int = 0
) -> PreTrainedModel:
    """A model with the config of ``name`` and random weights; ``auto`` is float32. Raises KronyError."""
    config, kind = load_config(name), parse_dtype(dtype)
    kind = torch.float32 if isinstance(kind, str) else kind
    if hasattr(config, "quantization_config"):
        raise KronyError(f"{name} is a compressed model: --random builds the original, and --scheme compresses it")
    check_device(device)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return AutoModelForCausalLM.from_config(config, dtype=kind).to(device).eval()


def alternate(models: Sequence[Any], work: Work, rounds: int) -> list[list[float]]:
    """Seconds of every turn of each model; the models take turns, forwards and backwards. One round is a warm-up."""
    seconds: list[list[float]] = [[] for _ in models]
    gc.collect()
    for number in range(rounds + 1):
        order = range(len(models)) if number % 2 else reversed(range(len(models)))
        for index in order:
            took = work(models[index])
            if number:
                seconds[index].append(took)
    return seconds


@torch.inference_mode()
def peak_bytes(model: PreTrainedModel, ids: Tensor) -> int:
    """The most memory that tensors take in a prefill in eval mode: weights, what layers keep, and what passes by."""
    model.eval()  # which makes layers forget what they keep
    return _weights(model) + peak_of(lambda: model(input_ids=ids, logits_to_keep=1, use_cache=True), model.device)


def _weights(model: PreTrainedModel) -> int:
    """Bytes of the parameters and buffers."""
    tensors = [*model.parameters(), *model.buffers()]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def peak_of(call: Callable[[], Any], device: torch.device | str = "cpu") -> int:
    """The most bytes that tensors made in ``call`` take at a time."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with _silenced(), torch.autograd.profiler.profile(profile_memory=True) as profile:
        call()
    results = profile.kineto_results
    assert results is not None
    events = sorted((e for e in results.events() if e.name() == "[memory]"), key=lambda event: event.start_ns())
    now = peak = 0
    for event in events:
        now += event.nbytes()
        peak = max(peak, now)
    return peak


@contextmanager
def _silenced() -> Iterator[None]:
    """Nothing reaches stderr, not from C++ either: torch's profiler greets whoever starts it."""
    sys.stderr.flush()
    kept = os.dup(2)
    with Path(os.devnull).open("w") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def _check(subject: Subject, settings: Settings) -> None:
    kind = subject.model.device.type
    if kind not in ("cpu", "cuda"):
        raise KronyError(f"bench measures on cpu and cuda, and {subject.name} is on {kind}")
    most = context_length(subject.model)
    longest = max(settings.length, settings.context + settings.new_tokens, *settings.lengths, 0)
    if longest > most:
        raise KronyError(f"{subject.name} takes {most} tokens at most, and {longest} are to be measured: ask for fewer")


def _sweep(settings: Settings) -> list[tuple[int, int]]:
    if not (settings.batches or settings.lengths):
        return []
    batches, lengths = settings.batches or (settings.batch,), settings.lengths or (settings.length,)
    return [(batch, length) for batch in batches for length in lengths]


def _ids(model: Any, settings: Settings, batch: int | None = None, length: int | None = None) -> Tensor:
    size = (batch or settings.batch, length or settings.length)
    generator = torch.Generator().manual_seed(settings.seed)
    vocabulary = model.config.get_text_config().vocab_size
    return torch.randint(0, vocabulary, size, generator=generator).to(model.device)


def _timed(model: Any, call: Callable[[], Any]) -> float:
    """Seconds that ``call`` takes, its work on the GPU included."""
    wait = torch.cuda.synchronize if model.device.type == "cuda" else lambda: None
    wait()
    start = time.perf_counter()
    call()
    wait()
    return time.perf_counter() - start


def prefill(settings: Settings, batch: int | None = None, length: int | None = None) -> Work:
    """A prefill that fills the cache and gives the last token's logits; ``settings`` say of what, where None does."""

    @torch.inference_mode()
    def work(model: Any) -> float:
        ids = _ids(model, settings, batch, length)
        return _timed(model, lambda: model(input_ids=ids, logits_to_keep=1, use_cache=True))

    return work


def decode(settings: Settings) -> Work:
    """``new_tokens`` of one sequence, one at a time, after ``context``, whose prefill is not timed."""

    @torch.inference_mode()
    def work(model: Any) -> float:
        options = {_cache_argument(model): DynamicCache(config=model.config), "logits_to_keep": 1}
        output = model(input_ids=_ids(model, settings, 1, settings.context), use_cache=True, **options)

        def call() -> None:
            nonlocal output
            for _ in range(settings.new_tokens):  # greedy, without generate's own bookkeeping
                output = model(input_ids=output.logits[:, -1:].argmax(-1), use_cache=True, **options)

        return _timed(model, call)

    return work


def _cache_argument(model: Any) -> str:
    """What this version of transformers calls the cache."""
    known = inspect.signature(type(getattr(model, "_orig_mod", model)).forward).parameters
    return "cache" if "cache" in known else "past_key_values"


class _Training:
    """One step of AdamW at a learning rate of zero: all of the work, and the model stays as it is."""

    def __init__(self, settings: Settings, models: Sequence[Any], runs: Sequence[Any]) -> None:
        self.settings = settings
        self.models = {id(run): model for run, model in zip(runs, models, strict=True)}
        self.optimizers = {
            id(run): torch.optim.AdamW(model.parameters(), lr=0.0, fused=True)
            for run, model in zip(runs, models, strict=True)
        }

    def __call__(self, run: Any) -> float:
        model, optimizer = self.models[id(run)], self.optimizers[id(run)]
        ids = _ids(model, self.settings)

        def step() -> None:
            run(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()
            optimizer.zero_grad()

        model.train()
        try:
            return _timed(model, step)
        finally:
            model.eval()


def _note(rows: Sequence[ModelSpeed], work: str, times: Sequence[Sequence[float]], tokens: int) -> None:
    for row, seconds in zip(rows, times, strict=True):
        row.tokens_per_s[work] = tokens / statistics.median(seconds)
        low, _, high = statistics.quantiles(seconds, n=4, method="inclusive") if len(seconds) > 1 else (seconds[0],) * 3
        row.spread[work] = tokens / high, tokens / low
