"""``krony heal``: train a compressed model on."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from krony.cli.options import Dtype, Json, Model, Out, Seed
from krony.cli.output import Output, quiet_libraries
from krony.errors import KronyError

VALIDATION_ROWS = 16  # of the text itself, at most, where --val names none


def run(
    model: Model,
    out: Out,
    data: Annotated[
        str, typer.Option(metavar="TEXT", help="A text or jsonl file, a .bin, python-docs, or a set on the hub.")
    ],
    val: Annotated[
        str | None, typer.Option(metavar="TEXT", help="What to stop by.  [default: the last rows of --data]")
    ] = None,
    recipe: Annotated[str, typer.Option(help="quick, or the paper's: paper, paper-final.")] = "quick",
    teacher: Annotated[
        str | None, typer.Option(metavar="MODEL", help="The original: learn to say what it says.")
    ] = None,
    freeze: Annotated[
        str | None, typer.Option(help="right, inherited or none.  [default: right; none for the paper's recipes]")
    ] = None,
    max_tokens: Annotated[int | None, typer.Option(metavar="N", help="Take the first N tokens of --data.")] = None,
    epochs: Annotated[float | None, typer.Option(help="Passes over the data, instead of the recipe's.")] = None,
    learning_rate: Annotated[float | None, typer.Option(help="Instead of the recipe's.")] = None,
    factor_learning_rate: Annotated[float | None, typer.Option(help="For the factors alone.")] = None,
    batch: Annotated[int | None, typer.Option(help="Rows at once on one device; the rest is accumulated.")] = None,
    length: Annotated[int | None, typer.Option(help="Tokens a row, instead of the recipe's.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the last checkpoint.")] = False,
    gradient_checkpointing: Annotated[bool, typer.Option(help="Less memory, more time.")] = False,
    compile: Annotated[bool, typer.Option(help="torch.compile the model.")] = False,
    device: Annotated[str | None, typer.Option(help="cpu keeps it off an accelerator.")] = None,
    dtype: Dtype = "auto",
    seed: Seed = 0,
    json_to: Json = None,
) -> None:
    """Train MODEL on, and write the state of lowest validation loss to OUT.

    Runs unchanged under torchrun and accelerate launch. Checkpoints and TensorBoard's log are in OUT.work meanwhile.
    """
    to = Output(json_to)
    import torch

    from krony import ranks
    from krony.card import healed_card
    from krony.files import check_writable, fresh_folder
    from krony.healing import RECIPES, heal, last_checkpoint
    from krony.models import context_length, load_model, load_tokenizer, save
    from krony.rows import load_rows

    quiet_libraries()
    if recipe not in RECIPES:
        raise KronyError(f"recipe {recipe!r} is unknown: it is one of {', '.join(RECIPES)}")
    ranks.join("cpu" if device == "cpu" or not torch.cuda.is_available() else "cuda")
    work = out.with_name(f"{out.name}.work")
    if ranks.is_first():
        check_writable(out)
        if work.exists() and not resume:
            raise KronyError(f"{work} is of a run that did not end: --resume goes on from it, or remove it")
    if resume:
        last_checkpoint(work)
    loaded, tokenizer = load_model(model, dtype=dtype), load_tokenizer(model)
    plan = RECIPES[recipe]
    changes = {"epochs": epochs, "learning_rate": learning_rate, "batch": batch, "length": length}
    plan = replace(plan, **{name: value for name, value in changes.items() if value is not None})  # type: ignore[arg-type]
    plan = replace(plan, length=min(plan.length, context_length(loaded)), batch=min(plan.batch, plan.sequences))
    known = loaded.get_input_embeddings().weight.shape[0]
    train = load_rows(data, tokenizer, length=plan.length, vocabulary=known, max_tokens=max_tokens)
    if val is None:
        train, validation = train.split(max(1, min(VALIDATION_ROWS, len(train) // 20)))
    else:
        validation = load_rows(val, tokenizer, length=plan.length, vocabulary=known)
    to.say(f"{len(train) * plan.length:,} tokens to train on, {len(validation) * plan.length:,} to stop by")
    with to.progress() as progress:
        report = heal(
            loaded,
            train,
            validation,
            work=work,
            recipe=plan,
            teacher=None if teacher is None else load_model(teacher, dtype=dtype),
            freeze=freeze or ("right" if recipe == "quick" else "none"),
            resume=resume,
            factor_rate=factor_learning_rate,
            gradient_checkpointing=gradient_checkpointing,
            compile=compile,
            device=device,
            seed=seed,
            progress=progress,
        )
    if not ranks.is_first():
        return
    figures = {"model": model, "teacher": teacher, "recipe": recipe} | report.to_json()
    with fresh_folder(out) as folder:
        save(loaded, folder, source=model)
        (folder / "README.md").write_text(healed_card(model, figures), encoding="utf-8")
        _keep_log(work, folder)
    shutil.rmtree(work)
    to.table(
        ["", "validation perplexity"],
        [["before", f"{figures['perplexity_before']:,.2f}"], ["after", f"{figures['perplexity_after']:,.2f}"]],
    )
    to.say(f"{report.tokens:,} tokens in {report.seconds:,.0f} s -> {out}")
    to.json(figures)


def _keep_log(work: Path, folder: Path) -> None:
    """TensorBoard's log goes with the model."""
    if (work / "runs").is_dir():
        shutil.copytree(work / "runs", folder / "runs")
