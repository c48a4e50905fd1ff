"""Models side by side: speed of prefill, decode and training steps, time to load, memory and size.

All models are in one process and take turns. Speeds are medians; a ratio to the first model is the median of the turns'
ratios, and ``spread`` says how sure both are.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from krony.errors import KronyError
from krony.evaluation.memory import model_bytes, peak_bytes
from krony.evaluation.settings import SpeedSettings
from krony.evaluation.spread import Comparison, compare, spread
from krony.evaluation.workloads import TrainingStep, alternate, decode, prefill, random_ids
from krony.models.loading import context_length, load_model
from krony.models.source import LoadingErrors, ModelSource, check_runs, empty_model, parse_dtype
from krony.models.surgery import count_parameters
from krony.runtime.hardware import check_device, machine, memory
from krony.runtime.progress import Progress, silent

WORKLOADS = ("prefill", "decode", "train")


@dataclass(frozen=True, kw_only=True)
class Subject:
    """A model to be measured.

    Attributes:
        name: its name in tables.
        model: the model.
        bytes: its size on disk.
        load_seconds: the median time that loading takes; None if it can't be loaded from a folder.
    """

    name: str
    model: PreTrainedModel
    bytes: int
    load_seconds: float | None


@dataclass(kw_only=True)
class ModelSpeed:
    """The figures of one model.

    Attributes:
        name: its name in tables.
        params: parameters; a tied head counts once.
        bytes: size on disk.
        load_seconds: the median time that loading takes.
        peak_bytes: the most memory that tensors take during a prefill, weights included.
        tokens_per_s: median speed of each workload.
        seconds: what every turn of each workload took.
        ratio: each workload's speed relative to the first model's, where more is better, the median of the turns'
            ratios; and ``peak``, memory relative to the first model's.
        ratio_spread: the spread of each workload's ratio; None with too few turns.
        sweep: for each of the other batch sizes and lengths, the speed of prefill and the same figures.
    """

    name: str
    params: int
    bytes: int
    load_seconds: float | None
    peak_bytes: int
    tokens_per_s: dict[str, float] = field(default_factory=dict)
    seconds: dict[str, list[float]] = field(default_factory=dict)
    ratio: dict[str, float] = field(default_factory=dict)
    ratio_spread: dict[str, float | None] = field(default_factory=dict)
    sweep: list[dict[str, Any]] = field(default_factory=list)

    @property
    def spread(self) -> dict[str, float | None]:
        """The spread of each workload's turns."""
        return {workload: spread(seconds) for workload, seconds in self.seconds.items()}

    @property
    def against_first(self) -> dict[str, Comparison]:
        """Each workload's ratio with its spread; nothing for figures that were measured without one."""
        return {workload: Comparison(self.ratio[workload], value) for workload, value in self.ratio_spread.items()}

    def to_json(self) -> dict[str, Any]:
        """The figures for ``--json``."""
        speeds = {f"{workload}_tokens_per_s": self.tokens_per_s.get(workload) for workload in WORKLOADS}
        return {
            "name": self.name, "params": self.params, "bytes": self.bytes, **speeds,
            "peak_bytes": self.peak_bytes,
            "ratio": {workload: self.ratio.get(workload) for workload in (*WORKLOADS, "peak")},
            "ratio_spread": self.ratio_spread,
            "verdict": {workload: found.verdict for workload, found in self.against_first.items()},
            "load_seconds": self.load_seconds, "seconds": self.seconds, "spread": self.spread, "sweep": self.sweep,
        }  # fmt: skip

    @classmethod
    def from_json(cls, figures: dict[str, Any]) -> ModelSpeed:
        """The figures that ``to_json`` wrote."""
        speeds = {workload: figures[f"{workload}_tokens_per_s"] for workload in WORKLOADS}
        return cls(
            **{key: figures[key] for key in ("name", "params", "bytes", "load_seconds", "peak_bytes", "sweep")},
            tokens_per_s={key: value for key, value in speeds.items() if value is not None},
            seconds=figures.get("seconds", {}),  # results of earlier versions have no turns
            ratio={key: value for key, value in figures["ratio"].items() if value is not None},
            ratio_spread=figures.get("ratio_spread", {}),
        )


def bench(
    subjects: Sequence[Subject], settings: SpeedSettings | None = None, *, progress: Progress = silent
) -> list[ModelSpeed]:
    """Measures the models side by side; ratios are to the first.

    Args:
        subjects: the models, from ``make_subject``.
        settings: what is measured; None for the defaults.
        progress: called with the workloads done, all workloads, and the name of the current one.

    Raises:
        KronyError: a model whose context is too short for what is to be measured, a device other than cpu and cuda, or
            two models of one name.
    """
    settings = settings or SpeedSettings()
    for subject in subjects:
        _check(subject, settings)
    names = [subject.name for subject in subjects]
    if alike := [name for name in dict.fromkeys(names) if names.count(name) > 1]:
        raise KronyError(f"several models are called {alike[0]}: tables and pictures tell them apart by their names")
    if not settings.compiled:
        return _measure(subjects, settings, progress)
    # models of one class share a limit of 8 compilations, beyond which they would run uncompiled
    with torch._dynamo.config.patch(recompile_limit=64 * len(subjects)):
        return _measure(subjects, settings, progress)


def _measure(subjects: Sequence[Subject], settings: SpeedSettings, progress: Progress) -> list[ModelSpeed]:
    rows = [
        ModelSpeed(
            name=subject.name,
            params=count_parameters(subject.model),
            bytes=subject.bytes,
            load_seconds=subject.load_seconds,
            peak_bytes=peak_bytes(subject.model, random_ids(subject.model, settings)),
        )
        for subject in subjects
    ]
    models: list[Any] = [subject.model.eval() for subject in subjects]
    runs = [torch.compile(model) for model in models] if settings.compiled else models
    tokens = settings.batch * settings.length
    steps = 2 + settings.train + len(settings.sweep)
    progress(0, steps, "prefill")
    _record(rows, "prefill", alternate(runs, prefill(settings), settings.rounds), tokens)
    progress(1, steps, "decode")
    _record(rows, "decode", alternate(runs, decode(settings), settings.rounds), settings.new_tokens)
    for done, (batch, length) in enumerate(settings.sweep, start=2):
        progress(done, steps, f"prefill of {batch}x{length}")
        times = alternate(runs, prefill(settings, batch, length), settings.rounds)
        _record_point(rows, times, batch, length)
    if settings.train:
        progress(steps - 1, steps, "training steps")
        _record(rows, "train", alternate(runs, TrainingStep(settings, models, runs), settings.rounds), tokens)
    for row in rows:
        row.ratio["peak"] = row.peak_bytes / rows[0].peak_bytes
    progress(steps, steps, "done")
    return rows


def _record(rows: Sequence[ModelSpeed], workload: str, times: Sequence[list[float]], tokens: int) -> None:
    """Writes a workload's turns, its median speed, and the ratio to the first model into the rows."""
    for row, seconds in zip(rows, times, strict=True):
        row.seconds[workload] = seconds
        row.tokens_per_s[workload] = tokens / statistics.median(seconds)
        row.ratio[workload], row.ratio_spread[workload] = compare(times[0], seconds)


def _record_point(rows: Sequence[ModelSpeed], times: Sequence[list[float]], batch: int, length: int) -> None:
    """The same for a prefill of the sweep."""
    for row, seconds in zip(rows, times, strict=True):
        found, speed = compare(times[0], seconds), batch * length / statistics.median(seconds)
        point = {"batch": batch, "length": length, "tokens_per_s": speed, "seconds": seconds, "spread": spread(seconds)}
        row.sweep.append(point | {"ratio": found.ratio, "ratio_spread": found.spread, "verdict": found.verdict})


def to_json(rows: Sequence[ModelSpeed], settings: SpeedSettings, **more: Any) -> dict[str, Any]:
    """The figures for ``krony bench --json``; ``spread`` is the largest of the models' turns and of the ratios."""
    measured = [value for row in rows for value in (*row.spread.values(), *row.ratio_spread.values())]
    measured += [point[key] for row in rows for point in row.sweep for key in ("spread", "ratio_spread")]
    known = [value for value in measured if value is not None]
    return {
        "machine": machine(), "spread": max(known, default=None), "models": [row.to_json() for row in rows],
        "settings": {name: getattr(settings, name) for name in settings.__dataclass_fields__}, **more,
    }  # fmt: skip


def make_subject(
    name: str, model: PreTrainedModel, folder: Path | None = None, *, device: str = "cpu", loads: int = 3
) -> Subject:
    """Measures a model's size on disk and the time that loading takes.

    Args:
        name: its name in tables.
        model: the model.
        folder: where its files are; None writes them to a temporary folder, in the model's dtype.
        device: where it is loaded to.
        loads: how often it is loaded, of which the median is taken. 0 for a model that can't be loaded: its size is
            then that of its tensors.
    """
    if loads == 0:
        return Subject(name=name, model=model, bytes=model_bytes(model), load_seconds=None)
    with tempfile.TemporaryDirectory() as temporary, nullcontext(folder or Path(temporary)) as where:
        if folder is None:
            model.save_pretrained(where)
        size = sum(file.stat().st_size for file in where.glob("*.safetensors"))
        seconds = []
        for _ in range(loads):
            start = time.perf_counter()
            load_model(str(where), dtype=model.dtype, device=device)
            seconds.append(time.perf_counter() - start)
    return Subject(name=name, model=model, bytes=size, load_seconds=statistics.median(seconds))


def random_model(
    name: str, *, dtype: str | torch.dtype = "auto", device: str = "cpu", seed: int = 0
) -> PreTrainedModel:
    """A model with the config of ``name`` and random weights; ``auto`` is float32. Raises KronyError."""
    config, kind = ModelSource.find(name).config, parse_dtype(dtype)
    kind = torch.float32 if isinstance(kind, str) else kind
    if hasattr(config, "quantization_config"):
        raise KronyError(f"{name} is a compressed model: --random builds the original, and --scheme compresses it")
    check_device(device)
    needed, room = empty_model(config).num_parameters() * kind.itemsize, memory()
    if needed > room:
        raise KronyError(
            f"{name}: its weights would take {needed / 1e9:,.0f} GB, and the memory has {room / 1e9:,.0f} GB"
        )
    config.return_dict = True  # outputs are read by name
    with torch.random.fork_rng(devices=[]), LoadingErrors(name):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=kind).to(device).eval()
    check_runs(model, name)
    return model


def _check(subject: Subject, settings: SpeedSettings) -> None:
    kind = subject.model.device.type
    if kind not in ("cpu", "cuda"):
        raise KronyError(f"bench measures on cpu and cuda, and {subject.name} is on {kind}")
    most = context_length(subject.model)
    if settings.longest > most:
        raise KronyError(
            f"{subject.name} takes at most {most} tokens, and {settings.longest} are to be measured: ask for fewer"
        )
