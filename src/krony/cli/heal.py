"""``krony heal``: train a compressed model on."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from krony.cli.options import Dtype, Json, Model, Out, Seed
from krony.cli.output import Output, complain, quiet_libraries
from krony.errors import KronyError

if TYPE_CHECKING:
    from krony.data.rows import Rows
    from krony.healing.recipes import Recipe

VALIDATION_ROWS = 16  # of the text itself, at most, where --val names none
HOW, TAUGHT, MACHINE = "The recipe, changed", "With a teacher", "Memory and speed"


def run(
    model: Model,
    out: Out,
    data: Annotated[
        str, typer.Option(metavar="TEXT", help="A text or jsonl file, a .bin, python-docs, or a set on the hub.")
    ],
    val: Annotated[
        str | None, typer.Option(metavar="TEXT", help="What to stop by.", show_default="the last rows of --data")
    ] = None,
    recipe: Annotated[
        str, typer.Option(help="quick, or the paper's: paper, paper-small (4 epochs), paper-final.")
    ] = "quick",
    teacher: Annotated[
        str | None, typer.Option(metavar="MODEL", help="The original: learn to say what it says.")
    ] = None,
    control: Annotated[
        str | None, typer.Option(metavar="MODEL", help="The original: train it as long on the text, to compare with.")
    ] = None,
    freeze: Annotated[
        str | None,
        typer.Option(
            help="What stays: right, inherited, scalars, embeddings, several with commas, or none.",
            show_default="right; none for the paper's recipes",
        ),
    ] = None,
    max_tokens: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Take the first N tokens of --data.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the last checkpoint.")] = False,
    epochs: Annotated[float | None, typer.Option(help="Passes over the data.", rich_help_panel=HOW)] = None,
    sequences: Annotated[int | None, typer.Option(help="Rows a step.", rich_help_panel=HOW)] = None,
    length: Annotated[int | None, typer.Option(help="Tokens a row.", rich_help_panel=HOW)] = None,
    learning_rate: Annotated[float | None, typer.Option(help="The highest.", rich_help_panel=HOW)] = None,
    factor_learning_rate: Annotated[
        float | None, typer.Option(help="For factors and scalars alone.", rich_help_panel=HOW)
    ] = None,
    inherited_learning_rate: Annotated[
        float | None, typer.Option(help="For all else alone.", rich_help_panel=HOW)
    ] = None,
    warm_up: Annotated[int | None, typer.Option(help="Steps.", rich_help_panel=HOW)] = None,
    weight_decay: Annotated[float | None, typer.Option(help="Of the factors.", rich_help_panel=HOW)] = None,
    temperature: Annotated[
        float | None, typer.Option(help="Softens both distributions.", rich_help_panel=TAUGHT)
    ] = None,
    text: Annotated[
        float | None, typer.Option(help="Share of the loss that is the text's own, 0 to 1.", rich_help_panel=TAUGHT)
    ] = None,
    hidden: Annotated[
        float | None,
        typer.Option(help="Weight of the distance between the hidden states.", rich_help_panel=TAUGHT),
    ] = None,
    batch: Annotated[
        int | None,
        typer.Option(help="Rows at once on one device, at most.", rich_help_panel=MACHINE),
    ] = None,
    gradient_checkpointing: Annotated[
        bool, typer.Option(help="Less memory, more time.", rich_help_panel=MACHINE)
    ] = False,
    compile: Annotated[bool, typer.Option(help="torch.compile the model.", rich_help_panel=MACHINE)] = False,
    device: Annotated[
        str | None,
        typer.Option(help="cpu or cuda.", show_default="cuda where there is one", rich_help_panel=MACHINE),
    ] = None,
    dtype: Dtype = "auto",
    seed: Seed = 0,
    json_to: Json = None,
) -> None:
    """Train MODEL on, and write the state of lowest validation loss to OUT.

    Runs unchanged under torchrun and accelerate launch. Checkpoints and TensorBoard's log are in OUT.work meanwhile.
    """
    to = Output(json_to, out)
    from krony.compression.model_card import healed_card, healed_table
    from krony.data.rows import load_rows
    from krony.healing.checkpoints import find_last, keep_logs, last_checkpoint, room_needed
    from krony.healing.heal import check, heal, perplexity, training_device, validation_loss
    from krony.models.loading import context_length, load_model, load_tokenizer, save
    from krony.runtime import distributed
    from krony.storage.files import check_writable, fresh_folder

    quiet_libraries()
    changes = {
        "epochs": epochs,
        "sequences": sequences,
        "length": length,
        "learning_rate": learning_rate,
        "factor_rate": factor_learning_rate,
        "inherited_rate": inherited_learning_rate,
        "warm_up": warm_up,
        "weight_decay": weight_decay,
        "temperature": temperature,
        "text": text,
        "hidden": hidden,
        "batch": batch,
    }
    plan = _plan(recipe, changes)
    if teacher is None and (temperature is not None or text is not None or hidden is not None):
        raise KronyError("--temperature, --text and --hidden are of learning from a teacher: name it with --teacher")
    distributed.init(training_device(device))
    work = out.with_name(f"{out.name}.work")
    if distributed.is_first():
        check_writable(out)
        if work.exists() and not resume:
            raise KronyError(f"{work} is of a run that did not end: --resume goes on from it, or remove it")
    if resume and work.is_dir() and find_last(work) is None:
        to.say(f"{work} holds no checkpoint yet: from the beginning")
        resume = False
    elif resume:
        last_checkpoint(work)
    if control is not None:
        load_model(control, dtype=dtype)  # what is wrong with it is found now, not after the training
    loaded, tokenizer = load_model(model, dtype=dtype), load_tokenizer(model)
    plan = replace(plan, length=min(plan.length, length or context_length(loaded)))
    plan = replace(plan, batch=min(plan.batch, plan.sequences))
    known = loaded.get_input_embeddings().weight.shape[0]
    train = load_rows(data, tokenizer, length=plan.length, vocabulary=known, max_tokens=max_tokens)
    if val is None:
        train, validation = train.split(max(1, min(VALIDATION_ROWS, len(train) // 20)))
    else:
        validation = load_rows(val, tokenizer, length=plan.length, vocabulary=known)
    original = None if teacher is None else load_model(teacher, dtype=dtype)
    frozen = freeze or ("right" if recipe == "quick" else "none")
    check(loaded, train, validation, plan, original, frozen)
    to.say(f"{len(train) * plan.length:,} tokens to train on, {len(validation) * plan.length:,} to stop by")
    options: dict[str, Any] = {
        "recipe": plan,
        "tokenizer": tokenizer,
        "gradient_checkpointing": gradient_checkpointing,
        "compile": compile,
        "device": device,
        "seed": seed,
    }
    with to.progress() as progress, _resumable(work):
        options["progress"] = progress
        report = heal(loaded, train, validation, work=work, teacher=original, freeze=frozen, resume=resume, **options)
        figures = {"model": model, "teacher": teacher, "recipe": recipe, "freeze": frozen} | report.to_json()
        if control is not None:
            alike = _control(control, train, validation, work / "control", frozen, dtype, resume, options)
            figures |= {"perplexity_original": alike["perplexity_before"], "control": {"model": control} | alike}
        elif original is not None:
            figures["perplexity_original"] = perplexity(validation_loss(original, validation))
    if not distributed.is_first():
        return
    with room_needed(out), fresh_folder(out) as folder:
        save(loaded, folder, source=model)
        (folder / "README.md").write_text(healed_card(model, figures), encoding="utf-8")
        keep_logs(work, folder)
        if control is not None:
            keep_logs(work / "control", folder / "control")
    shutil.rmtree(work)
    table = healed_table(figures)
    to.table(table.columns, table.rows)
    to.say(f"{report.tokens:,} tokens in {report.seconds:,.0f} s -> {out}")
    to.json(figures)


@contextmanager
def _resumable(work: Path) -> Iterator[None]:
    """Says after Ctrl-C how to go on."""
    from krony.healing.checkpoints import find_last

    try:
        yield
    except KeyboardInterrupt:
        if find_last(work) is not None:
            complain(
                f"{work} holds the last checkpoint: the same command goes on from there with --resume", kind="stopped"
            )
        elif work.exists():
            complain(f"{work} holds no checkpoint yet: remove it, or start over with --resume", kind="stopped")
        raise


def _plan(name: str, changes: dict[str, Any]) -> Recipe:
    """The recipe of this name with the changes that are not None; the final rate follows the highest."""
    from krony.healing.recipes import RECIPES

    if name not in RECIPES:
        raise KronyError(f"recipe {name!r} is unknown: it is one of {', '.join(RECIPES)}")
    known, changes = RECIPES[name], {key: value for key, value in changes.items() if value is not None}
    if "learning_rate" in changes:
        changes["final_rate"] = known.final_rate / known.learning_rate * changes["learning_rate"]
    if "sequences" in changes:
        changes.setdefault("batch", min(known.batch, changes["sequences"]))
    return replace(known, **changes)


def _control(
    name: str, train: Rows, validation: Rows, work: Path, frozen: str, dtype: str, resume: bool, options: dict[str, Any]
) -> dict:
    """The figures of the dense original, trained alike on the text itself: it has nothing to learn from itself."""
    from krony.healing.checkpoints import find_last
    from krony.healing.heal import heal
    from krony.models.loading import load_model

    freeze = "embeddings" if "embeddings" in frozen.split(",") else "none"
    model = load_model(name, dtype=dtype)
    again = resume and find_last(work) is not None  # it may have been stopped before its first checkpoint
    report = heal(model, train, validation, work=work, freeze=freeze, resume=again, **options)
    return report.to_json()
