"""``krony bench``: prefill and decode speed, training steps, memory and size of models side by side."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from krony.cli.options import Device, Dtype, Json, Seed
from krony.cli.output import Output, quiet_libraries
from krony.errors import KronyError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from transformers import PreTrainedModel

    from krony.evaluation.speed import ModelSpeed, Subject
    from krony.pages import Table
    from krony.runtime.progress import Progress


def run(
    models: Annotated[
        list[str],
        typer.Argument(
            metavar="MODEL…", help="Folders, hub names, or demo; ratios are to the first.", show_default=False
        ),
    ],
    schemes: Annotated[
        list[str] | None,
        typer.Option("--scheme", help="Add the first model compressed so in memory, by van-loan; can be repeated."),
    ] = None,
    random: Annotated[
        bool, typer.Option("--random", help="Build the first model from its config alone, with random weights.")
    ] = False,
    path: Annotated[str, typer.Option(help="Forward path of Kronecker layers: auto, left, right or dense.")] = "auto",
    batch: Annotated[int, typer.Option(help="Sequences of prefill and training.")] = 1,
    length: Annotated[int, typer.Option(help="Tokens a sequence, of prefill and training.")] = 512,
    context: Annotated[int, typer.Option(help="Tokens before those that are decoded.")] = 64,
    new_tokens: Annotated[int, typer.Option(help="Tokens that are decoded, one at a time.")] = 64,
    sweep_batches: Annotated[
        str | None, typer.Option(metavar="N,N,…", help="Measure prefill at these batch sizes too.")
    ] = None,
    sweep_lengths: Annotated[
        str | None, typer.Option(metavar="N,N,…", help="Measure prefill at these lengths too.")
    ] = None,
    rounds: Annotated[int, typer.Option(help="Turns of each model; figures are medians.")] = 9,
    train: Annotated[bool, typer.Option("--train/--no-train", help="Measure a training step too.")] = True,
    compiled: Annotated[bool, typer.Option("--compile", help="Run the models through torch.compile.")] = False,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads.", show_default="torch's choice")] = None,
    device: Device = "cpu",
    dtype: Dtype = "auto",
    seed: Seed = 0,
    plot: Annotated[Path | None, typer.Option(metavar="FILE.svg", help="A picture of the ratios.")] = None,
    report: Annotated[
        Path | None, typer.Option(metavar="FILE.html", help="A page with the table and the pictures.")
    ] = None,
    json_to: Json = None,
) -> None:
    """Measure models side by side in one process, turn by turn: tokens a second, memory, size, and ratios to the first.

    Prefill fills the cache and gives the last token's logits; decode adds one token at a time; a training step is
    forward, backward and AdamW.
    """
    to = Output(json_to)
    from krony.storage.files import check_file, write_text

    for file, end in ((plot, ".svg"), (report, ".html")):
        if file is not None:
            check_file(file, end)
    if device == "auto":
        raise KronyError("--device auto spreads a model over devices, and bench measures on one: name it, such as cuda")
    import torch

    from krony.evaluation.speed import Settings, bench, to_json
    from krony.kronecker.forward_path import check_path

    quiet_libraries()
    check_path(None if path == "auto" else path)
    settings = Settings(
        batch=batch, length=length, context=context, new_tokens=new_tokens,
        rounds=rounds, train=train, compiled=compiled, seed=seed,
        batches=_numbers("--sweep-batches", sweep_batches), lengths=_numbers("--sweep-lengths", sweep_lengths),
    )  # fmt: skip
    if threads is not None:
        torch.set_num_threads(threads)
    with to.progress() as progress:
        subjects = _subjects(
            models, schemes or [], random, None if path == "auto" else path, device, dtype, seed, progress
        )
        rows = bench(subjects, settings, progress=progress)
    figures = to_json(rows, settings, dtype=f"{subjects[0].model.dtype}".removeprefix("torch."), path=path)
    shown = table(rows)
    to.say(caption(figures))
    to.table(shown.columns, shown.rows)
    if plot is not None:
        write_text(plot, picture(rows))
    if report is not None:
        write_text(report, _page(rows, figures))
    to.json(figures)


def _subjects(
    models: list[str], schemes: list[str], random: bool, path: str | None, device: str, dtype: str, seed: int,
    progress: Progress,
) -> list[Subject]:  # fmt: skip
    import copy

    import torch

    from krony.compression.compress import compress
    from krony.config import KronyConfig
    from krony.evaluation.speed import random_model, store
    from krony.models.loading import load_model
    from krony.models.surgery import kronecker_layers

    made: list[tuple[str, PreTrainedModel, Path | None]] = []
    total = len(models) + len(schemes)
    for index, name in enumerate(models):
        progress(len(made), total, f"loading {name}")
        if index == 0 and random:
            model = random_model(name, dtype=dtype, device=device, seed=seed)
        else:
            model = load_model(name, dtype=dtype, device=device)
        folder = Path(name) if Path(name).is_dir() and not (index == 0 and random) else None
        made.append((name, model, folder))
    first = made[0]
    for scheme in schemes:
        progress(len(made), total, f"compressing to {scheme}")
        model = copy.deepcopy(first[1])
        compress(model, KronyConfig(scheme, init="van-loan", seed=seed))
        made.append((f"{first[0]} {scheme}", model, None))
    subjects = [store(*each, device=device) for each in made]
    for subject in subjects:
        for layer in kronecker_layers(subject.model).values():
            layer.path = path  # type: ignore[assignment]
    if torch.device(device).type == "cuda":
        torch.cuda.empty_cache()
    return subjects


def _numbers(option: str, text: str | None) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(",")) if text else ()
    except ValueError:
        raise KronyError(f"{option} {text}: it takes numbers such as 1,4,16") from None


def caption(figures: dict) -> str:
    """What the figures were measured on and how."""
    machine, settings = figures["machine"], figures["settings"]
    where = machine["accelerator"] if machine["accelerator"] != "none" else machine["processor"]
    way = "torch.compile" if settings["compiled"] else "eager"
    return (
        f"{where}, {machine['threads']} threads, {figures['dtype']}, {way}; prefill of {settings['batch']} x "
        f"{settings['length']} tokens, decode of {settings['new_tokens']} after {settings['context']}, "
        f"medians of {settings['rounds']} turns"
    )


def table(rows: Sequence[ModelSpeed]) -> Table:
    """A row a model: speeds in tokens a second, and times the first model's."""
    from krony.evaluation.speed import WORKS
    from krony.pages import Table

    works = [work for work in WORKS if work in rows[0].tokens_per_s]
    columns = ["model", "parameters", "MB"]
    for work in works:
        columns += [f"{work}, tok/s", "of first"]
    columns += ["peak, MB", "of first", "load, s"]
    shown = []
    for row in rows:
        cells = [row.name, f"{row.params:,}", f"{row.bytes / 1e6:,.1f}"]
        for work in works:
            cells += [f"{row.tokens_per_s[work]:,.1f}", f"{row.ratio[work]:.2f}x"]
        load = "" if row.load_seconds is None else f"{row.load_seconds:.2f}"
        shown.append([*cells, f"{row.peak_bytes / 1e6:,.1f}", f"{row.ratio['peak']:.2f}", load])
    return Table(columns, shown)


def picture(rows: Sequence[ModelSpeed]) -> str:
    """Speed of each model against the first one's, as SVG."""
    from krony.evaluation.speed import WORKS
    from krony.pages import bars

    works = [work for work in WORKS if work in rows[0].tokens_per_s]
    heights = {work: {row.name: row.ratio[work] for row in rows} for work in works}
    return bars(heights, "times the first model's speed", level=1.0)


def _page(rows: Sequence[ModelSpeed], figures: dict) -> str:
    from krony.pages import bars, lines, page, paragraphs

    sizes = {
        "bytes on disk": {row.name: row.bytes / 1e6 for row in rows},
        "peak memory of a prefill": {row.name: row.peak_bytes / 1e6 for row in rows},
    }
    parts = [
        ("Figures", table(rows).html() + paragraphs(caption(figures))),
        ("Speed", picture(rows)),
        ("Size, MB", bars(sizes, "MB")),
    ]
    for batch in sorted({point["batch"] for point in rows[0].sweep}):
        series = {
            row.name: [(p["length"], p["tokens_per_s"]) for p in row.sweep if p["batch"] == batch] for row in rows
        }
        parts.append((f"Prefill of {batch:g} at a time", lines(series, "tokens a sequence", "tokens a second")))
    return page("krony bench", parts)
