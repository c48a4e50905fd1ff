"""``krony compress``: a model goes in, a smaller one comes out."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Annotated

import typer

from krony.cli.expand import Given, expand
from krony.cli.options import Device, Dtype, Json, Model, Out, TextOptions
from krony.cli.output import Output, quiet_libraries
from krony.cli.preview import preview
from krony.config import KronyConfig, options_of
from krony.errors import KronyError
from krony.options import option
from krony.sizing.defaults import GLOBAL_ALLOCATION


@dataclass(frozen=True, kw_only=True)
class PromiseOptions:
    """By how much the perplexity may rise, and on which text that is measured."""

    within: str | None = option(
        None,
        "Instead of a scheme: the smallest model whose perplexity rises by at most this share, measured on text held "
        "back from --calibration.",
        metavar="5%",
    )
    val: str | None = option(
        None, "With --within: measure on this text.", metavar="TEXT", show_default="what was held back"
    )


@expand
def run(
    model: Model,
    out: Out,
    given: Given[KronyConfig],
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
            help="Compress layer by layer from the files, without loading the model. The result is the same. "
            "Resumes after an interruption.",
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
    config = check(given, text, promise, params=params, effort=effort, stream=stream, dry_run=dry_run)
    from krony.cli.compress_job import Job
    from krony.compression.plan import plan, within
    from krony.data.calibration_set import OWN_TEXT
    from krony.kronecker.schemes import parse_parameters
    from krony.models.source import ModelSource
    from krony.models.surgery import check_measurable
    from krony.sizing.within import parse_within
    from krony.streaming.plan import choose

    quiet_libraries()
    source = ModelSource.find(model)
    job = Job(to=to, source=source, out=out, config=config, text=text, dtype=dtype, device=device, effort=effort)
    if promise.within is not None:
        job.smallest_within(parse_within(promise.within), promise.val)
        return
    skeleton = source.skeleton
    if params is not None:
        config = within(skeleton, config, parse_parameters(params))
    settled = plan(skeleton, config)
    reads = text.calibration is not None or config.needs_text_for is not None
    for group in settled.groups if reads else ():
        check_measurable(group)
    way = choose(source, config, wanted=stream, dtype=dtype, device=device, reads=reads)
    if text.calibration == OWN_TEXT and way is not None:
        raise KronyError(
            "--calibration self takes the model in memory to write the text: name a text, or load the model with "
            "--no-stream"
        )
    if dry_run:
        preview(to, source, settled, way, tokens=text.calibration_tokens if reads else 0, dtype=dtype)
        return
    replace(job, config=config).one_size(way)


def check(
    given: Given[KronyConfig],
    text: TextOptions,
    promise: PromiseOptions,
    *,
    params: str | None,
    effort: str | None,
    stream: bool | None,
    dry_run: bool,
) -> KronyConfig:
    """The configuration that the options make. Raises KronyError for options that don't fit together."""
    defaults = {} if promise.within is None else GLOBAL_ALLOCATION
    asked = {} if effort is None else options_of(effort)
    if "tune" in given.named and not given.values["tune"]:
        asked = {name: value for name, value in asked.items() if name != "tune_all"}  # which says what tune trains
    config = given.over(**defaults | asked)
    _check_size(config, params, promise)
    if "rescale" in given.named:
        _check_rescale(config)
    if promise.within is not None:
        _check_promise(config, text, stream=stream, dry_run=dry_run)
    elif not dry_run:
        _check_text(config, text)
    return config


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
    from krony.data.calibration_set import OWN_TEXT

    if text.needed_by("--within") == OWN_TEXT:
        raise KronyError("--within measures on text that is held back, and the model's own can't be: name a text")
    for name, given in (("--stream", stream), ("--dry-run", dry_run), ("--reinit", config.reinit)):
        if given:
            raise KronyError(
                f"{name} doesn't work with --within, which compresses and measures in memory: leave it out"
            )


def _check_rescale(config: KronyConfig) -> None:
    """Raises KronyError for an initialisation that does not rescale."""
    from krony.init.registry import INITIALISATIONS

    if not config.initialisation.rescales:
        takers = " and ".join(name for name, init in INITIALISATIONS.items() if init.rescales)
        raise KronyError(f"--rescale works with init {takers}, and the init is {config.init}: leave it out")


def _check_text(config: KronyConfig, text: TextOptions) -> None:
    """Raises KronyError where text is needed and none is named, and for options of text where none is read."""
    if config.needs_text_for:
        text.needed_by(config.needs_text_for if config.initialisation.needs_text else f"--{config.needs_text_for}")
    if text.calibration is not None:
        return
    tokens = text.calibration_tokens != TextOptions().calibration_tokens
    for name, given in (("--calibration-tokens", tokens), ("--no-token-weighting", not config.token_weighting)):
        if given:
            raise KronyError(f"{name} works with --calibration, and no text is named: name one, or leave it out")
