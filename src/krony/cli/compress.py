"""``krony compress``: a model goes in, a smaller one comes out."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from krony.cli.options import Device, Dtype, Json, Model, Out, Seed
from krony.cli.output import Output, complain, quiet_libraries
from krony.cli.preview import in_bytes, preview
from krony.errors import KronyError

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from krony.compression.compress import CompressionReport
    from krony.streaming.stream import Stream


def run(
    model: Model,
    out: Out,
    scheme: Annotated[
        str | None, typer.Option(help="81M, 96M (GPT-2 124M), 1536x768, 1024x256:4, keep=0.5: see krony schemes.")
    ] = None,
    params: Annotated[
        str | None, typer.Option(metavar="N", help="Instead of a scheme: the largest model within N, say 82M.")
    ] = None,
    init: Annotated[
        str, typer.Option(help="How factors start: neurons, als, van-loan, permuted, prune, svd, random.")
    ] = "neurons",
    calibration: Annotated[
        str | None,
        typer.Option(metavar="TEXT", help="What neurons, als and svd read: a text or jsonl file, or python-docs."),
    ] = None,
    calibration_tokens: Annotated[int, typer.Option(metavar="N", help="How much of it is read, at most.")] = 49_152,
    allocation: Annotated[
        str, typer.Option(help="uniform: every layer alike; global: one budget, spent where it tells.")
    ] = "uniform",
    max_width: Annotated[
        int | None, typer.Option(metavar="N", help="global: the most neurons that a layer keeps.")
    ] = None,
    multiple_of: Annotated[
        int | None, typer.Option(metavar="N", help="global: layers keep multiples of N neurons, such as 64.")
    ] = None,
    token_weighting: Annotated[
        bool, typer.Option(help="Weigh tokens by 1/|hidden state|², so that a few huge ones don't decide.")
    ] = True,
    reconstruct: Annotated[
        int, typer.Option(metavar="STEPS", help="Then train each MLP by itself on that text, for so many steps.")
    ] = 0,
    tune: Annotated[
        int,
        typer.Option(
            metavar="STEPS", help="Then train all together to predict as MODEL does on it, a sequence a step."
        ),
    ] = 0,
    layers: Annotated[str, typer.Option(help="all, odd, even, or a zero-based inclusive range such as 2-28.")] = "all",
    modules: Annotated[str, typer.Option(help="mlp, or a regular expression over names of linear layers.")] = "mlp",
    rescale: Annotated[
        bool | None,
        typer.Option("--rescale/--no-rescale", help="Adaptive normalisation of van-loan, permuted.", show_default="on"),
    ] = None,
    scalars: Annotated[
        bool | None,
        typer.Option("--scalars/--no-scalars", help="A scalar a factor.", show_default="if more than one"),
    ] = None,
    scalar_init: Annotated[float | None, typer.Option(help="Value the scalars start at; the matrix stays.")] = None,
    epsilon: Annotated[
        float | None, typer.Option(help="What stands in for dropped neurons in the right factor (prune: 0.1).")
    ] = None,
    embedding: Annotated[
        int | None,
        typer.Option(metavar="N", help="Factorise the input embedding too, right factor 1xN (KnGPT2: 2)."),
    ] = None,
    reinit: Annotated[str | None, typer.Option(help="all: draw every other weight anew too.")] = None,
    seed: Seed = 0,
    device: Device = "cpu",
    dtype: Dtype = "auto",
    cache: Annotated[bool, typer.Option(help="Keep what was read of the text, and use what was kept.")] = True,
    stream: Annotated[
        bool | None,
        typer.Option(
            "--stream/--no-stream",
            help="Layer by layer from the files, without holding the model; the result is the same. Goes on after an "
            "interruption.",
            show_default="for a folder, if van-loan, prune or random read no text, or it is over half of memory",
        ),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what would be done, with what memory, and write nothing.")
    ] = False,
    json_to: Json = None,
) -> None:
    """Replace the MLP matrices of MODEL by sums of Kronecker products and write the model to OUT."""
    to = Output(json_to, out)
    if (scheme is None) == (params is None):
        raise KronyError("compress needs a size: either --scheme (krony schemes MODEL lists them) or --params")
    from krony.compression.compress import compress, plan
    from krony.compression.plan import within
    from krony.config import KronyConfig
    from krony.data.calibration_set import LENGTH, calibration_set
    from krony.init.registry import find_initialisation
    from krony.kronecker.schemes import parse_parameters
    from krony.models.loading import context_length, load_model, load_tokenizer, skeleton
    from krony.runtime import distributed
    from krony.storage.files import cache_folder, check_writable, fresh_folder
    from krony.streaming.stream import choose

    if rescale is not None and not find_initialisation(init).rescales:
        raise KronyError(f"--rescale is of init van-loan and permuted, and the init is {init}: leave it out")
    quiet_libraries()
    empty = skeleton(model)
    config = KronyConfig(
        scheme=scheme or "",
        init=init,
        allocation=allocation,
        layers=layers,
        modules=modules,
        rescale=rescale is not False,
        scalars=scalars,
        scalar_init=scalar_init,
        epsilon=epsilon,
        token_weighting=token_weighting,
        max_width=max_width,
        multiple_of=multiple_of,
        reconstruct=reconstruct,
        tune=tune,
        embedding=embedding,
        reinit=reinit,
        seed=seed,
    )
    if params is not None:
        config = within(empty, config, parse_parameters(params))
    groups = plan(empty, config)
    reads = calibration is not None or config.needs_text_for is not None
    way = choose(model, config, wanted=stream, dtype=dtype, device=device, reads=reads)
    if dry_run:
        tokens = calibration_tokens if reads else 0
        preview(to, model, empty, groups, config, way, tokens=tokens, dtype=dtype)
        return
    if calibration is None and config.needs_text_for:
        reader = config.needs_text_for if config.initialisation.needs_text else f"--{config.needs_text_for}"
        raise KronyError(
            f"{reader} needs text like that the model is for: --calibration FILE (.txt or .jsonl), or python-docs"
        )
    check_writable(out)
    device = distributed.init(device)
    ids: Tensor | None = None
    text = ""  # in words
    if calibration is not None:
        length = min(LENGTH, context_length(empty))
        ids = calibration_set(calibration, load_tokenizer(model), tokens=calibration_tokens, length=length, seed=seed)
        text = "calibrated on" if config.needs_text_for else "errors of outputs measured on"
        text += f" {ids.numel():,} tokens of {calibration}"
        to.say(text)
    if way is not None:
        report = _stream(to, way, model, out, ids, text, device)
        _print(to, report, out)
        to.json(report.to_json())
        return
    original = load_model(model, dtype=dtype, device=device)
    with to.progress() as progress:
        kept = cache_folder() if cache else None
        report = compress(original, config, calibration=ids, cache=kept, progress=progress)
    if not distributed.is_first():
        return
    if report.calibration is not None:
        to.say(report.calibration)
    with fresh_folder(out) as folder:
        _save(original, model, folder, report, text)
    _print(to, report, out)
    to.json(report.to_json())


def _stream(
    to: Output, way: Stream, model: str, out: Path, ids: Tensor | None, text: str, device: str
) -> CompressionReport:
    from krony.storage.journal import work_folder
    from krony.streaming.stream import run

    def finish(folder: Path, report: CompressionReport) -> None:
        from krony.compression.model_card import model_card
        from krony.models.loading import save_tokenizer

        save_tokenizer(folder, source=model)
        (folder / "README.md").write_text(model_card(model, report, text), encoding="utf-8")

    work = work_folder(out)
    to.say(f"layer by layer, {in_bytes(way.write_bytes)} to write; until it is whole it is in {work}")
    with to.progress() as progress:
        try:
            return run(way, out, calibration=ids, device=device, finish=finish, progress=progress, say=to.say)
        except KeyboardInterrupt:
            if work.exists():
                complain(f"{work} holds what is done: the same command goes on from there", kind="stopped")
            raise


def _save(model: PreTrainedModel, source: str, folder: Path, report: CompressionReport, text: str) -> None:
    from krony.compression.model_card import model_card
    from krony.models.loading import save

    save(model, folder, source=source)
    (folder / "README.md").write_text(model_card(source, report, text), encoding="utf-8")


def _print(to: Output, report: CompressionReport, out: Path) -> None:
    columns = ["layer", "left", "right", "factors", "error"]
    rows = [
        [layer.name, f"{layer.shape.m1}x{layer.shape.n1}", f"{layer.shape.m2}x{layer.shape.n2}"]
        + [str(layer.shape.factors), f"{layer.error:.3f}"]
        for layer in report.layers
    ]
    if all(layer.calibrated_error is not None for layer in report.layers):
        columns.append("of outputs")
        outputs = ["" if e is None else f"{e:.3f}" for e in (layer.calibrated_error for layer in report.layers)]
        rows = [[*row, error] for row, error in zip(rows, outputs, strict=True)]
    to.table(columns, rows)
    if report.tuned is not None:
        to.say(
            f"trained together for {report.tuned.steps} steps: {report.tuned.before:.3f} -> {report.tuned.after:.3f} "
            "nats a token from the original's predictions, on sequences held back"
        )
    share = report.params_after / report.params_before
    to.say(f"{report.params_before:,} -> {report.params_after:,} parameters ({share:.1%}) in {report.seconds:.1f} s")
    to.say(f"{out} loads with AutoModelForCausalLM.from_pretrained once krony is imported")
