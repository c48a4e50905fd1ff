"""The work of ``krony compress``: reads, compresses in one of three ways, writes OUT, and says what came out."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from krony.cli.options import TextOptions
from krony.cli.output import Output
from krony.cli.preview import in_bytes
from krony.compression.compress import compress
from krony.compression.estimate import compression_pace
from krony.compression.model_card import model_card
from krony.compression.own_text import own_text
from krony.compression.plan import plan
from krony.compression.report import CompressionReport
from krony.config import EFFORTS, TUNE_TEXT, KronyConfig
from krony.data.calibration_set import LENGTH, OWN_TEXT, calibration_set
from krony.data.hub import read_as
from krony.models.export import padding_sentence
from krony.models.loading import context_length
from krony.models.source import ModelSource
from krony.models.surgery import find_groups
from krony.pages import Table
from krony.runtime import distributed
from krony.runtime.signals import interruptible
from krony.runtime.timing import duration
from krony.sizing.within import compress_within
from krony.storage.files import cache_folder, check_writable, fresh_folder
from krony.storage.journal import work_folder
from krony.storage.locks import working_in
from krony.streaming.plan import Stream
from krony.streaming.stream import run


@dataclass(kw_only=True)
class Job:
    """One call of the verb: what it was given, and its steps."""

    to: Output
    source: ModelSource
    out: Path
    config: KronyConfig
    text: TextOptions
    dtype: str
    device: str
    effort: str | None = None
    read: str = ""  # which text was read and why, in words

    def one_size(self, way: Stream | None) -> None:
        """Compresses to the size that the configuration names: ``way`` by layers, or in memory."""
        with self._working():
            ids = self._read_text()
            report = self._in_memory(ids) if way is None else self._layer_by_layer(way, ids)
        self._show(report, _table(report))

    def smallest_within(self, share: float, val: str | None) -> None:
        """Finds the smallest size whose perplexity rises by at most ``share``.

        Raises PromiseError if there is none; OUT is then not written.
        """
        with self._working():
            model, name = self.source.load(dtype=self.dtype, device=self.device), str(self.text.calibration)
            with self.to.progress() as progress:
                kept = compress_within(
                    model, share, name, tokenizer=self.source.tokenizer, val=val, config=self.config,
                    tokens=self.text.calibration_tokens, cache=self._cache(), progress=progress,
                )  # fmt: skip
            assert kept.report is not None
            self.read = f"calibrated on text of {name}; {kept.sentence()}"
            self._write(model, kept.report)
        self._show(kept.report, kept.table(), kept.sentence(), within=kept.to_json())

    @contextmanager
    def _working(self) -> Iterator[None]:
        """Around all that takes time: first what can be refused at once, and a sentence where it is interrupted."""
        check_writable(self.out)
        self.source.check_saves()
        self.device = distributed.init(self.device, patience=distributed.LAYER_PATIENCE)
        with interruptible(self._how_to_resume), working_in(self.out, is_mine=distributed.is_first()):
            yield

    def _read_text(self) -> Tensor | None:
        """The calibration text as token ids ``(sequences, length)``, if any is named."""
        name = self.text.calibration
        if name is None or name == OWN_TEXT:
            return None
        ids = calibration_set(name, self.source.tokenizer, **self._amount())
        self._say_read(ids, f"of {read_as(name)}")
        return ids

    def _own_text(self, model: PreTrainedModel) -> Tensor:
        """Text that the model writes, as token ids ``(sequences, length)``: in the first of several processes."""
        ids = None
        if distributed.is_first():
            with self.to.progress() as progress:
                ids = own_text(model, self.source.tokenizer, **self._amount(), progress=progress)
        ids = distributed.from_first(ids)
        assert ids is not None
        self._say_read(ids, "that the model wrote itself")
        return ids

    def _amount(self) -> dict[str, int]:
        """How much text, in sequences of which length, and its seed."""
        length = min(LENGTH, context_length(self.source.skeleton))
        return {"tokens": self.text.calibration_tokens, "length": length, "seed": self.config.seed}

    def _say_read(self, ids: Tensor, where: str) -> None:
        why = "calibrated on" if self.config.needs_text_for else "errors of outputs measured on"
        self.read = f"{why} {ids.numel():,} tokens {where}"
        self.to.say(self.read)

    def _in_memory(self, ids: Tensor | None) -> CompressionReport:
        """Loads the model, compresses it, and writes OUT."""
        model = self.source.load(dtype=self.dtype, device=self.device)
        if self.text.calibration == OWN_TEXT:
            ids = self._own_text(model)
        if self.effort is not None and ids is not None and distributed.count() == 1:
            self.to.say(self._time(model, ids, self.effort))
        with self.to.progress() as progress:
            report = compress(
                model, self.config, calibration=ids, cache=self._cache(), finish=partial(self._write, model),
                progress=progress,
            )  # fmt: skip
        if report.calibration is not None:
            self.to.say(report.calibration)
        return report

    def _time(self, model: PreTrainedModel, ids: Tensor, effort: str) -> str:
        """How long this command takes, and if it tunes how long it would with the other efforts, in a sentence."""
        self.to.say("measuring how long this takes here")
        config = self.config
        pace = compression_pace(model, plan(model, config), ids, cache=self._cache())
        said = f"this takes about {duration(pace.seconds(config, ids))} on this machine"
        if not config.tune:
            return said
        others = {name: options.get("tune", 0) for name, options in EFFORTS.items() if name != effort}
        plain = replace(config, tune=0, tune_all=False, tune_text=TUNE_TEXT)
        times = [
            f"{name} {duration(pace.seconds(replace(config, tune=steps) if steps else plain, ids))}"
            for name, steps in others.items()
        ]
        return f"{said} (with --effort {', '.join(times)})"

    def _layer_by_layer(self, way: Stream, ids: Tensor | None) -> CompressionReport:
        """Compresses from file to file; unfinished work stays in OUT.work."""

        def finish(folder: Path, report: CompressionReport) -> None:
            self.source.save_tokenizer(folder)
            self._write_card(folder, report)

        self.to.say(
            f"layer by layer, {in_bytes(way.write_bytes)} to write; unfinished work is in {work_folder(self.out)}"
        )
        with self.to.progress() as progress:
            return run(
                way, self.out, calibration=ids, device=self.device, finish=finish, progress=progress, say=self.to.say
            )

    def _write(self, model: PreTrainedModel, report: CompressionReport) -> None:
        """Writes OUT; of several processes one does."""
        if distributed.is_first():
            with fresh_folder(self.out) as folder:
                self.source.save(model, folder)
                self._write_card(folder, report)

    def _write_card(self, folder: Path, report: CompressionReport) -> None:
        (folder / "README.md").write_text(model_card(self.source.name, report, self.read), encoding="utf-8")

    def _cache(self) -> Path | None:
        return cache_folder() if self.text.cache else None

    def _how_to_resume(self) -> str:
        """What an interrupted run left, and how to continue."""
        work = work_folder(self.out)
        if (self.out / "config.json").exists():
            return f"{self.out} is complete; {work}, if it is there, can be removed"
        if work.exists():
            return f"{work} holds what is done: the same command resumes from there"
        if self.text.cache and self.text.calibration is not None:
            return f"{self.out} is not written; the same command finds what was complete of moments and layers"
        return f"{self.out} is not written: the same command starts again"

    def _can_be_slim(self, report: CompressionReport) -> bool:
        """Whether every layer keeps fewer neurons than it had, and drops the others completely."""
        config = self.config
        if not config.drops_neurons or (config.modules, config.layers) != ("mlp", "all"):
            return False
        return len(report.layers) == sum(len(group.sites) for group in find_groups(self.source.skeleton))

    def _show(self, report: CompressionReport, table: Table, *sentences: str, **figures: Any) -> None:
        """Prints a table and what came out, and writes the figures; of several processes one does."""
        if not distributed.is_first():
            return
        self.to.table(table.columns, table.rows)
        for sentence in (*report.sentences(), *sentences):
            self.to.say(sentence)
        if self._can_be_slim(report) and report.slim_padding:
            self.to.say(padding_sentence(report.kept_neurons, max(report.kept_neurons), report.slim_padding))
        self.to.say(f"{self.out} loads with AutoModelForCausalLM.from_pretrained once krony is imported")
        self.to.json(report.to_json() | figures)


def _table(report: CompressionReport) -> Table:
    """A row per layer, without the errors on text where none was read."""
    table = report.table()
    if any(layer.calibrated_error is not None for layer in report.layers):
        return table
    return Table(list(table.columns)[:-1], [list(row)[:-1] for row in table.rows])
