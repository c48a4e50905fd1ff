"""``krony bench``: prefill and decode speed, training steps, memory and size of models side by side."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from krony.cli.expand import Fields, expand
from krony.cli.options import Device, Dtype, Json
from krony.cli.output import Output, quiet_libraries
from krony.errors import KronyError
from krony.evaluation.settings import DraftOptions, SpeedSettings, numbers

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from krony.evaluation.drafting import Drafting
    from krony.evaluation.speed import Subject
    from krony.runtime.progress import Progress


Models = Annotated[
    list[str],
    typer.Argument(metavar="MODEL…", help="Folders, hub names, or demo; ratios are to the first.", show_default=False),
]
Schemes = Annotated[
    list[str] | None,
    typer.Option("--scheme", help="Also measure the first model compressed to this scheme; can be repeated."),
]
Random = Annotated[
    bool, typer.Option("--random", help="Build the first model from its config alone, with random weights.")
]
ForwardPath = Annotated[str, typer.Option(help="Forward path of Kronecker layers: auto, left, right or dense.")]
Settings = Annotated[SpeedSettings, Fields(leave_out=("batches", "lengths"))]
Batches = Annotated[str | None, typer.Option(metavar="N,N,…", help="Measure prefill at these batch sizes too.")]
Lengths = Annotated[str | None, typer.Option(metavar="N,N,…", help="Measure prefill at these lengths too.")]
Threads = Annotated[int | None, typer.Option(min=1, help="CPU threads.", show_default="torch's choice")]
Plot = Annotated[Path | None, typer.Option(metavar="FILE.svg", help="A picture of the ratios.")]
Report = Annotated[Path | None, typer.Option(metavar="FILE.html", help="A page with the table and the pictures.")]


@expand
def run(
    models: Models,
    schemes: Schemes = None,
    random: Random = False,
    path: ForwardPath = "auto",
    *,
    settings: Settings,
    sweep_batches: Batches = None,
    sweep_lengths: Lengths = None,
    drafts: DraftOptions,
    threads: Threads = None,
    device: Device = "cpu",
    dtype: Dtype = "auto",
    plot: Plot = None,
    report: Report = None,
    json_to: Json = None,
) -> None:
    """Measure models side by side: tokens per second, memory, size, and ratios to the first model.

    The models are in one process and take turns. Prefill fills the cache and computes the last token's logits; decode
    adds one token at a time; a training step is forward, backward and AdamW. A verdict is given where the difference to
    the first model is larger than the spread, the width of the 90% interval of the median.
    """
    to = Output(json_to)
    _check_files(plot, report)
    if random and drafts.draft is not None:
        raise KronyError("--random makes weights that no draft agrees with: leave out --random or --draft")
    if device == "auto":
        raise KronyError("--device auto spreads a model over devices, and bench measures on one: name it, such as cuda")
    settings = replace(
        settings,
        batches=numbers("--sweep-batches", sweep_batches),
        lengths=numbers("--sweep-lengths", sweep_lengths),
    )
    import torch

    from krony.evaluation.drafting import drafting_table
    from krony.evaluation.speed import bench, to_json
    from krony.evaluation.speed_tables import bench_page, caption, ratio_picture, sweep_table, table, verdicts
    from krony.kronecker.forward_path import check_path
    from krony.storage.files import write_text

    quiet_libraries()
    forced = None if path == "auto" else path
    check_path(forced)
    if threads is not None:
        torch.set_num_threads(threads)
    asked = _Asked(models=models, schemes=schemes or [], random=random, path=forced, seed=settings.seed)
    with to.progress() as progress:
        prompts = _prompts(models[0], drafts, settings)  # what is wrong with them is found before all is measured
        subjects = _subjects(asked, device, dtype, progress)
        rows = bench(subjects, settings, progress=progress)
        drafted = _drafts(subjects[0].model, asked, prompts, drafts, settings, dtype, progress)
    kinds = [f"{subject.model.dtype}".removeprefix("torch.") for subject in subjects]
    kind, sentences = " and ".join(dict.fromkeys(kinds)), verdicts(rows)
    if len(set(kinds)) > 1:
        named = ", ".join(f"{subject.name} {each}" for subject, each in zip(subjects, kinds, strict=True))
        sentences.append(f"the dtypes differ ({named}), and so do sizes and speeds for that alone: --dtype sets one")
    sentences += [f"drafts: {each.sentence(str(drafts.draft))}" for each in drafted]
    figures = to_json(rows, settings, dtype=kind, device=device, path=path, verdicts=sentences)
    figures["drafts"] = [each.to_json() for each in drafted]
    to.say(caption(figures))
    for shown in (table(rows), sweep_table(rows), drafting_table(drafted)):
        if shown.rows:
            to.table(shown.columns, shown.rows)
    for sentence in sentences:
        to.say(sentence)
    if plot is not None:
        write_text(plot, ratio_picture(rows))
    if report is not None:
        write_text(report, bench_page(rows, figures))
    to.json(figures)


@dataclass(frozen=True, kw_only=True)
class _Asked:
    """Which models are measured: those named, and the first one compressed to each scheme."""

    models: list[str]
    schemes: list[str]
    random: bool
    path: str | None
    seed: int


def _subjects(asked: _Asked, device: str, dtype: str, progress: Progress) -> list[Subject]:
    """Loads, builds and compresses the models, and forces their forward path."""
    import copy

    import torch

    from krony.compression.compress import compress
    from krony.config import KronyConfig
    from krony.evaluation.speed import make_subject, random_model
    from krony.models.loading import load_model
    from krony.models.source import ModelSource

    made: list[tuple[PreTrainedModel, Path | None]] = []
    total = len(asked.models) + len(asked.schemes)
    for index, name in enumerate(asked.models):
        progress(len(made), total, f"loading {name}")
        if index == 0 and asked.random:
            made.append((random_model(name, dtype=dtype, device=device, seed=asked.seed), None))
        else:
            source = ModelSource.find(name)
            as_saved = source.dtype(dtype) == "auto"  # else its files have another size
            folder = source.folder if as_saved else None
            made.append((load_model(name, dtype=dtype, device=device), folder))
    first, _ = made[0]
    for scheme in asked.schemes:
        progress(len(made), total, f"compressing to {scheme}")
        model = copy.deepcopy(first)
        compress(model, KronyConfig(scheme, init="van-loan", seed=asked.seed))
        made.append((model, None))
    labels = _labels(asked.models, asked.schemes)
    subjects = [make_subject(label, *each, device=device) for label, each in zip(labels, made, strict=True)]
    for subject in subjects:
        _force(subject.model, asked.path)
    if torch.device(device).type == "cuda":
        torch.cuda.empty_cache()
    return subjects


def _force(model: PreTrainedModel, path: str | None) -> None:
    """Sets the forward path of a model's Kronecker layers; None chooses by shape and tokens."""
    from krony.models.surgery import kronecker_layers

    for layer in kronecker_layers(model).values():
        layer.path = path  # type: ignore[assignment]


def _prompts(name: str, options: DraftOptions, settings: SpeedSettings) -> Tensor | None:
    """Token ids ``(prompts, length)`` of ``--draft-text``; None without ``--draft``.

    Raises KronyError for too little text, and for a draft that is not found, has another tokenizer or vocabulary, or
    takes fewer tokens.
    """
    if options.draft is None:
        return None
    from krony.data.calibration_set import documents_in, pack
    from krony.evaluation.drafting import PROMPTS, check_draft
    from krony.models.source import ModelSource

    source, measured = ModelSource.find(options.draft), ModelSource.find(name)
    tokenizer = measured.tokenizer
    if source.tokenizer.get_vocab() != tokenizer.get_vocab():
        raise KronyError(f"{options.draft} has another tokenizer than {name}: a draft writes the same tokens")
    check_draft(measured.skeleton, source.skeleton, settings.context + settings.new_tokens)
    size = PROMPTS * settings.context
    documents = documents_in(options.draft_text, size, "held-out")
    return pack(
        documents, tokenizer, tokens=size, length=settings.context, least=PROMPTS, what=f"text {options.draft_text}"
    )


def _drafts(
    model: PreTrainedModel, asked: _Asked, prompts: Tensor | None, options: DraftOptions, settings: SpeedSettings,
    dtype: str, progress: Progress,
) -> list[Drafting]:  # fmt: skip
    """The figures of ``--draft``; none without it. Raises KronyError."""
    if prompts is None:
        return []
    from krony.evaluation.drafting import measure_drafts
    from krony.models.loading import load_model

    draft = load_model(str(options.draft), dtype=dtype, device=str(model.device))
    _force(draft, asked.path)
    return measure_drafts(
        model, draft, prompts, lengths=options.lengths, new_tokens=settings.new_tokens, rounds=settings.rounds,
        progress=progress,
    )  # fmt: skip


def _labels(models: list[str], schemes: list[str]) -> list[str]:
    """A name for every model: a folder's last name, and a number behind it where another model has the same."""
    short = [_last_name(Path(name)) if Path(name).is_dir() else name for name in models]
    made: list[str] = []
    for label in (*short, *(f"{short[0]} {scheme}" for scheme in schemes)):
        unique, number = label, 1
        while unique in made:
            number += 1
            unique = f"{label} ({number})"
        made.append(unique)
    return made


def _last_name(folder: Path) -> str:
    """Of a link its own name, not that of the folder it leads to; ``.`` and ``..`` have none."""
    return folder.name if folder.name not in ("", "..") else folder.resolve().name or str(folder)


def _check_files(plot: Path | None, report: Path | None) -> None:
    from krony.storage.files import check_file

    for file, end in ((plot, ".svg"), (report, ".html")):
        if file is not None:
            check_file(file, end)
