"""Compresses a model that does not fit in memory, from safetensors to safetensors, layer by layer.

Initialisations that work on one matrix at a time (``Initialisation.per_matrix``) hold one matrix in memory. With
calibration text, one transformer layer and its second moments are in memory, and the layer's inputs are on disk. All
other tensors are copied piece by piece. The tensors are those of ``krony.compress``.

What the allocation of a budget and ``reconstruct`` need is measured first (``measuring``). Then the layout of OUT is
known, so the files are created in ``OUT.work`` and filled layer by layer. After an interruption the same call resumes
after the last finished unit. At the end the folder becomes OUT.
"""

from __future__ import annotations

import hashlib
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig

from krony._version import __version__
from krony.compression.compress import made_with
from krony.compression.moments import check_ids
from krony.compression.reconstruction import Examples, reconstruct_group
from krony.compression.replacement import replacements
from krony.compression.report import CompressionReport, LayerReport
from krony.config import KronyConfig
from krony.errors import KronyError, WriteError
from krony.init.base import Moments
from krony.kronecker.linear import KroneckerLinear
from krony.models import quantizer
from krony.models.digests import config_digest
from krony.models.surgery import Group, count_parameters
from krony.runtime.hardware import trim_memory
from krony.runtime.progress import Progress, silent
from krony.storage.journal import Journal
from krony.storage.shards import SHARD_SIZE, Shards
from krony.storage.tensor_files import Entry
from krony.streaming.blockwise import fill, release
from krony.streaming.measuring import Measurements
from krony.streaming.plan import FACTORS, Stream, Unit


def run(
    stream: Stream,
    out: Path,
    *,
    calibration: Tensor | None = None,
    device: str = "cpu",
    shard_size: int = SHARD_SIZE,
    finish: Callable[[Path, CompressionReport], None] = lambda folder, report: None,
    progress: Progress = silent,
    say: Callable[[str], None] = lambda sentence: None,
) -> CompressionReport:
    """Compresses the model and writes it to ``out``.

    Args:
        calibration: token ids ``(sequences, length)`` if ``stream.reads``, else None.
        device: where layers run and factors are computed.
        shard_size: about how many bytes of tensors each file holds.
        finish: called with the folder and the report; writes tokenizer and card before the folder becomes OUT.
        progress: called with the unit, the number of units, and the unit's name.
        say: called with a sentence if an interrupted run resumes, or stops for want of memory or disk space.

    Raises:
        KronyError: bad input, which leaves nothing on disk.
        WriteError: files can't be written.
        KeyboardInterrupt: interrupted.

    Where it stops for anything but bad input, such as a full disk or too little memory, it leaves ``OUT.work`` as a
    killed process does, and the same call resumes.
    """
    start = time.perf_counter()
    _check_text(stream, calibration)
    journal = Journal(out, _key(stream, calibration, shard_size))
    journal.open()
    try:
        work = _Work(stream, journal, calibration, device, shard_size)
        stream = work.complete(progress, say)
        report = _report(stream, journal, calibration, start)
        _describe(stream, work.folder)
        finish(work.folder, report)
        journal.publish(work.folder)
        return report
    except BaseException as error:
        mistake = isinstance(error, KronyError) and not isinstance(error, WriteError)  # the same call would fail again
        if mistake or not journal.done:
            journal.remove()
            raise
        journal.close()
        if not isinstance(error, KeyboardInterrupt):  # whoever interrupts a run is told by the command line
            say(f"{journal.folder} holds what is done: the same call resumes from there")
        raise


class _Work:
    """The units of one run: what is measured on the text, then the new layers."""

    def __init__(self, stream: Stream, journal: Journal, ids: Tensor | None, device: str, shard_size: int) -> None:
        self.stream, self.journal, self.device, self.shard_size = stream, journal, device, shard_size
        self.folder = journal.folder / "model"
        self.units = stream.units()
        self.read = _reader(stream)
        self.text = None if ids is None else Measurements(stream, journal.folder, ids, self.read, device=device)
        self.folder.mkdir(exist_ok=True)  # the journal takes a folder without folders for work that is published
        if [line["unit"] for line in journal.done] != [unit.name for unit in self.units[: len(journal.done)]]:
            journal.restart()  # of another version
        if self.text is not None and journal.done:
            self.text.blocks.returns = journal.done[-1]["returns"]

    def complete(self, progress: Progress, say: Callable[[str], None]) -> Stream:
        """Does every unit that is left; the plan with the shapes of the layers that are written."""
        measuring = [unit for unit in self.units if unit.task != FACTORS]
        if len(self.journal.done) > len(measuring) and not self._shards(self._settled()).exist():
            self.journal.restart()
        if done := len(self.journal.done):
            say(f"resuming after {self.journal.done[-1]['unit']}, unit {done} of {len(self.units)}")
        for unit in measuring[done:]:
            progress(len(self.journal.done), len(self.units), unit.name)
            assert self.text is not None
            self.text.measure(unit)
            self._note(unit, [])
        stream = self._settled()
        shards = self._shards(stream)
        if len(self.journal.done) == len(measuring):
            shutil.rmtree(self.folder, ignore_errors=True)
            self.folder.mkdir()
            shards.create()
        for unit in self.units[len(self.journal.done) :]:
            progress(len(self.journal.done), len(self.units), unit.name)
            layers = self._write(stream, unit, shards)
            shards.sync()
            self._note(unit, layers)
        return stream

    def _settled(self) -> Stream:
        """The plan after the allocation, if there is one."""
        if self.text is None or not self.stream.allocates:
            return self.stream
        return self.stream.with_allocation(self.text.allocation())

    def _shards(self, stream: Stream) -> Shards:
        layout = {stream.names[name]: one for name, one in stream.layout.items()}
        return Shards(self.folder, layout, self.shard_size)

    def _note(self, unit: Unit, layers: list[LayerReport]) -> None:
        """Records a unit as complete, and deletes what no other needs."""
        returns = 0 if self.text is None else self.text.blocks.returns
        reports = [layer.to_json() for layer in layers]
        self.journal.note({"unit": unit.name, "layers": reports, "returns": returns})
        for file in [] if self.text is None else self.text.spent(unit):
            file.unlink(missing_ok=True)
        trim_memory()  # otherwise what earlier layers leave adds up

    def _write(self, stream: Stream, unit: Unit, shards: Shards) -> list[LayerReport]:
        """Writes the tensors of a unit, and gives the reports of its new layers."""
        number, text = unit.layer, self.text
        reports: list[LayerReport] = []
        if text is not None and number is not None and text.visits(number):
            known, inputs = text.layer(number, stream.shapes)
            for group, moments in known:
                reports += _replace(stream, group, moments, inputs, shards)
            text.blocks.release(number)
        else:
            for group in stream.groups_of(number):
                for part in _parts(group, stream.config):
                    for site in part.sites:
                        fill(stream.source, site.name, self.read, self.device)
                    reports += _replace(stream, part, None, iter(()), shards)
                    for site in part.sites:
                        release(stream.source, site.name)
        for name in stream.layout:
            if stream.layer_of(name) == number and name in stream.entries and not _is_replaced(name, stream):
                _copy(stream, name, shards)
        return reports


def _check_text(stream: Stream, calibration: Tensor | None) -> None:
    """Raises KronyError unless text is given if and only if the plan reads it, and its ids fit the model."""
    if stream.reads and calibration is None:
        raise KronyError(f"{stream.config.needs_text_for or 'the plan'} needs calibration text: pass calibration=")
    if calibration is not None and not stream.reads:
        raise KronyError("calibration text is given, and the plan was made without it: use prepare(…, reads=True)")
    if calibration is not None:
        check_ids(calibration, stream.source)


def _report(stream: Stream, journal: Journal, calibration: Tensor | None, start: float) -> CompressionReport:
    """The report of all units, in the order of the model; also attaches the quantizer to the target."""
    layers = [LayerReport.from_json(one) for line in journal.done for one in line["layers"]]
    order = {site.name: n for n, site in enumerate(s for g in stream.settled.groups for s in g.sites)}
    layers.sort(key=lambda layer: order[layer.name])
    vars(stream.target.config).pop("quantization_config", None)  # from an earlier run of this plan
    quantizer.attach_quantizer(stream.target, made_with(stream.config, calibration))
    return CompressionReport(
        scheme=str(stream.config.scheme),
        init=stream.config.init,
        params_before=stream.settled.params_before,
        params_after=count_parameters(stream.target),
        seconds=time.perf_counter() - start,
        layers=layers,
        made_with=stream.target.config.quantization_config.made_with,
    )


def _parts(group: Group, config: KronyConfig) -> list[Group]:
    """The group, divided into single matrices if the initialisation works on one at a time."""
    return [Group((site,)) for site in group.sites] if config.initialisation.per_matrix else [group]


def _replace(
    stream: Stream, group: Group, moments: Moments | None, texts: Iterator[Examples], shards: Shards
) -> list[LayerReport]:
    """Writes the new layers of a group; the weights of the old ones are in memory."""
    config, reports = stream.config, []

    def train(layers: dict[str, KroneckerLinear]) -> None:
        reconstruct_group(stream.source, group, next(texts), moments, config, layers)

    with torch.no_grad():
        made = replacements(
            stream.source, group, stream.shapes, config, moments,
            kept=stream.kept.get(group.sites[0].name), train=train if config.reconstruct else None,
        )  # fmt: skip
        for name, new in made.items():
            for key, value in new.layer.state_dict().items():
                shards.put(stream.names[f"{name}.{key}"], value)
            reports.append(new.report)
    return reports


def _copy(stream: Stream, name: str, shards: Shards) -> None:
    """Copies a tensor that is not replaced, piece by piece."""
    entry, dtype = stream.entries[name], stream.layout[name][0]
    at = 0
    for piece in entry.pieces():
        piece = piece.to(dtype)
        _check_finite(entry, piece)
        shards.put(stream.names[name], piece, at=at)
        at += len(piece)


def _reader(stream: Stream) -> Callable[[str], Tensor]:
    """A function that reads the source's tensors in the model's dtype; it raises KronyError for infinite values."""
    wanted = stream.source.state_dict()

    def read(name: str) -> Tensor:
        entry = stream.entries[name]
        value = entry.read().to(wanted[name].dtype)
        _check_finite(entry, value)
        return value

    return read


def _check_finite(entry: Entry, values: Tensor) -> None:
    """Raises KronyError, naming file and tensor, for values that are not finite."""
    if values.is_floating_point() and not torch.isfinite(values).all():
        why = "" if values.dtype == entry.dtype else f" in {str(values.dtype).removeprefix('torch.')}"
        raise KronyError(f"{entry.file}: {entry.name} has values that are not finite{why}")


def _is_replaced(name: str, stream: Stream) -> bool:
    """Whether a tensor belongs to a layer that is replaced."""
    return name.rpartition(".")[0] in stream.shapes


def _describe(stream: Stream, folder: Path) -> None:
    """Writes config.json and generation_config.json as ``save_pretrained`` does."""
    config = stream.target.config
    config.dtype = str(stream.target.dtype).removeprefix("torch.")
    config.architectures = [type(stream.target).__name__]
    config.save_pretrained(folder)
    generation = stream.target.generation_config
    if (stream.folder / "generation_config.json").is_file():
        generation = GenerationConfig.from_pretrained(stream.folder)
    generation.save_pretrained(folder)


def _key(stream: Stream, ids: Tensor | None, shard_size: int) -> dict[str, Any]:
    """Identifies a job, so that only the same resumes: config, files (by size and time), options, text and version."""
    files = sorted({entry.file for entry in stream.entries.values()})
    stamps = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    text = None if ids is None else hashlib.blake2b(ids.numpy().tobytes(), digest_size=16).hexdigest()
    return {
        "source": str(stream.folder.resolve()),
        "config": config_digest(stream.source.config),
        "files": hashlib.blake2b(repr(stamps).encode(), digest_size=16).hexdigest(),
        **asdict(stream.config),
        "scheme": stream.config.non_default_options()["scheme"],  # without the lines of its file
        "dtype": str(stream.source.dtype),
        "calibration": text,
        "shard_size": shard_size,
        "krony": __version__,
    }
