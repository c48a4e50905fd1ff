"""``krony compress``: a model goes in, a smaller one comes out."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from krony.cli.expand import expand
from krony.cli.options import Device, Dtype, Json, Model, Out
from krony.cli.output import Output, quiet_libraries
from krony.cli.preview import in_bytes, preview
from krony.cli.promise import PromiseOptions, TextOptions, keep_promise
from krony.config import KronyConfig, with_effort
from krony.errors import KronyError

if TYPE_CHECKING:
    from torch import Tensor

    from krony.compression.report import CompressionReport
    from krony.models.source import ModelSource
    from krony.streaming.plan import Stream


@expand
def run(
    ctx: typer.Context,
    model: Model,
    out: Out,
    config: KronyConfig,
    text: TextOptions,
    promise: PromiseOptions,
    params: Annotated[
        str | None, typer.Option(metavar="N", help="Instead of a scheme: the largest model with at most N, say 82M.")
    ] = None,
    effort: Annotated[
        str | None,
        typer.Option(
            help="Options that belong together: start (--allocation global), tuned (also --tune 240 --tune-all) or "
            "best (--tune 720). What is given besides wins."
        ),
    ] = None,
    device: Device = "cpu",
    dtype: Dtype = "auto",
    stream: Annotated[
        bool | None,
        typer.Option(
            "--stream/--no-stream",
            help="Compress layer by layer from the files, without loading the model; the result is the same. Resumes "
            "after an interruption.",
            show_default="for a folder, if van-loan, prune or random read no text, or it exceeds half of memory",
        ),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what would be done and how much memory it takes; write nothing.")
    ] = False,
    json_to: Json = None,
) -> None:
    """Replace the MLP matrices of MODEL by sums of Kronecker products and write the model to OUT."""
    to = Output(json_to, out)
    if effort is not None:
        config = with_effort(config, effort, given=_given(ctx))
    _check_size(config, params, promise)
    _check_rescale(ctx, config)
    from krony.compression.plan import plan, within
    from krony.kronecker.schemes import parse_parameters
    from krony.models.source import ModelSource
    from krony.runtime import distributed
    from krony.runtime.signals import interruptible
    from krony.storage.files import check_writable
    from krony.streaming.plan import choose

    quiet_libraries()
    source = ModelSource.find(model)
    if promise.within is not None:
        _check_promise(config, text, stream=stream, dry_run=dry_run)
        keep_promise(to, source, out, _global_by_default(ctx, config), text, promise, device=device, dtype=dtype)
        return
    skeleton = source.skeleton
    if params is not None:
        config = within(skeleton, config, parse_parameters(params))
    settled = plan(skeleton, config)
    reads = text.calibration is not None or config.needs_text_for is not None
    way = choose(source, config, wanted=stream, dtype=dtype, device=device, reads=reads)
    if dry_run:
        preview(to, source, settled, way, tokens=text.calibration_tokens if reads else 0, dtype=dtype)
        return
    _check_text(config, text)
    check_writable(out)
    source.check_saves()
    job = _Job(to=to, source=source, out=out, config=config, text=text, dtype=dtype, device=distributed.init(device))
    with interruptible(job.how_to_resume):
        job.read_text(skeleton)
        report = job.in_memory() if way is None else job.layer_by_layer(way)
    if distributed.is_first():
        job.show(report)


def _check_size(config: KronyConfig, params: str | None, promise: PromiseOptions) -> None:
    """Raises KronyError unless exactly one option says the size."""
    if sum((bool(config.scheme), params is not None, promise.within is not None)) != 1:
        raise KronyError(
            "compress needs one size: --scheme (krony schemes MODEL lists them), --params, or --within with the share "
            "by which the perplexity may rise"
        )
    if promise.val is not None and promise.within is None:
        raise KronyError("--val works with --within, which measures on it: leave it out")


def _check_promise(config: KronyConfig, text: TextOptions, *, stream: bool | None, dry_run: bool) -> None:
    """Raises KronyError for what --within can't do."""
    if text.calibration is None:
        raise KronyError(
            "--within calibrates and measures on text similar to what the model will see in use: --calibration FILE "
            "(.jsonl, or .txt with --val), or python-docs"
        )
    for name, given in (("--stream", stream), ("--dry-run", dry_run), ("--reinit", config.reinit)):
        if given:
            raise KronyError(
                f"{name} doesn't work with --within, which compresses and measures in memory: leave it out"
            )


def _global_by_default(ctx: typer.Context, config: KronyConfig) -> KronyConfig:
    """The configuration with one budget for all layers, unless --allocation was given."""
    if "allocation" in _given(ctx) or not config.initialisation.takes_allocation:
        return config
    return replace(config, allocation="global")


def _given(ctx: typer.Context) -> set[str]:
    """The names of the options that the command line sets."""
    sources = {name: ctx.get_parameter_source(name) for name in ctx.params}
    return {name for name, source in sources.items() if source is not None and source.name == "COMMANDLINE"}


def _check_rescale(ctx: typer.Context, config: KronyConfig) -> None:
    """Raises KronyError for --rescale or --no-rescale with an initialisation that does not rescale."""
    from krony.init.registry import INITIALISATIONS

    if "rescale" in _given(ctx) and not config.initialisation.rescales:
        takers = " and ".join(name for name, init in INITIALISATIONS.items() if init.rescales)
        raise KronyError(f"--rescale works with init {takers}, and the init is {config.init}: leave it out")


def _check_text(config: KronyConfig, text: TextOptions) -> None:
    """Raises KronyError where text is needed and none is named."""
    if text.calibration is None and config.needs_text_for:
        asker = config.needs_text_for if config.initialisation.needs_text else f"--{config.needs_text_for}"
        raise KronyError(
            f"{asker} needs text similar to what the model will see in use: --calibration FILE (.txt or .jsonl), or "
            "python-docs"
        )


@dataclass(kw_only=True)
class _Job:
    """One call of the verb: what it was given, and its steps."""

    to: Output
    source: ModelSource
    out: Path
    config: KronyConfig
    text: TextOptions
    dtype: str
    device: str
    ids: Tensor | None = None
    read: str = ""  # which text was read and why, in words

    def read_text(self, skeleton: Any) -> None:
        """Reads the calibration text, if any is named."""
        from krony.data.calibration_set import LENGTH, calibration_set
        from krony.models.loading import context_length

        name = self.text.calibration
        if name is None:
            return
        self.ids = calibration_set(
            name,
            self.source.tokenizer,
            tokens=self.text.calibration_tokens,
            length=min(LENGTH, context_length(skeleton)),
            seed=self.config.seed,
        )
        self.read = "calibrated on" if self.config.needs_text_for else "errors of outputs measured on"
        self.read += f" {self.ids.numel():,} tokens of {name}"
        self.to.say(self.read)

    def in_memory(self) -> CompressionReport:
        """Loads the model, compresses it, and writes OUT."""
        from krony.compression.compress import compress
        from krony.compression.model_card import model_card
        from krony.runtime import distributed
        from krony.storage.files import cache_folder, fresh_folder

        model = self.source.load(dtype=self.dtype, device=self.device)
        with self.to.progress() as progress:
            cache = cache_folder() if self.text.cache else None
            report = compress(model, self.config, calibration=self.ids, cache=cache, progress=progress)
        if not distributed.is_first():
            return report
        if report.calibration is not None:
            self.to.say(report.calibration)
        with fresh_folder(self.out) as folder:
            self.source.save(model, folder)
            (folder / "README.md").write_text(model_card(self.source.name, report, self.read), encoding="utf-8")
        return report

    def layer_by_layer(self, way: Stream) -> CompressionReport:
        """Compresses from file to file; unfinished work stays in OUT.work."""
        from krony.compression.model_card import model_card
        from krony.storage.journal import work_folder
        from krony.streaming.stream import run

        def finish(folder: Path, report: CompressionReport) -> None:
            self.source.save_tokenizer(folder)
            (folder / "README.md").write_text(model_card(self.source.name, report, self.read), encoding="utf-8")

        self.to.say(
            f"layer by layer, {in_bytes(way.write_bytes)} to write; unfinished work is in {work_folder(self.out)}"
        )
        with self.to.progress() as progress:
            return run(
                way,
                self.out,
                calibration=self.ids,
                device=self.device,
                finish=finish,
                progress=progress,
                say=self.to.say,
            )

    def how_to_resume(self) -> str:
        """What an interrupted run left, and how to continue."""
        from krony.storage.journal import work_folder

        work = work_folder(self.out)
        if work.exists():
            return f"{work} holds what is done: the same command resumes from there"
        if self.text.cache and self.ids is not None:
            return f"{self.out} is not written; the same command finds the second moments that were complete"
        return f"{self.out} is not written: the same command starts again"

    def show(self, report: CompressionReport) -> None:
        """Prints the table and the summary, and writes the figures."""
        table = report.table()
        columns, rows = list(table.columns), [list(row) for row in table.rows]
        if all(layer.calibrated_error is None for layer in report.layers):
            columns, rows = columns[:-1], [row[:-1] for row in rows]
        self.to.table(columns, rows)
        if report.tuned is not None:
            self.to.say(
                f"trained for {report.tuned.steps} steps: {report.tuned.before:.3f} -> "
                f"{report.tuned.after:.3f} nats per token from the original's predictions, on sequences held back"
            )
        self.to.say(report.summary())
        self.to.say(f"{self.out} loads with AutoModelForCausalLM.from_pretrained once krony is imported")
        self.to.json(report.to_json())
