"""``krony heal``: train a compressed model."""

from __future__ import annotations

import shutil
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from krony.cli.expand import Changes, expand
from krony.cli.options import Dtype, Json, Model, Out
from krony.cli.output import Output, quiet_libraries
from krony.errors import KronyError, PromiseError
from krony.healing.options import HealOptions
from krony.healing.recipes import Recipe, default_freeze, find_recipe

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from krony.data.rows import Rows
    from krony.healing.report import HealReport
    from krony.models.source import ModelSource


Data = Annotated[
    str, typer.Option(metavar="TEXT", help="A text or jsonl file, a .bin, python-docs, or a set on the hub.")
]
Validation = Annotated[
    str | None,
    typer.Option(
        metavar="TEXT",
        help="Text that chooses the best state; python-docs is its held-out part.",
        show_default="documents held out of --data; the held-out part of python-docs",
    ),
]
RecipeName = Annotated[str, typer.Option(help="quick, or the paper's: paper, paper-small (4 epochs), paper-final.")]
Then = Annotated[
    str | None,
    typer.Option(
        metavar="RECIPE",
        help="Then train by this recipe from the best state, as the paper does by paper-final; neither stops early. "
        "Changes of the recipe apply to the first, but --batch to both.",
    ),
]
RecipeChanges = Annotated[dict[str, Any], Changes(Recipe, leave_out=("final_rate", "evaluations", "patience"))]
Teacher = Annotated[str | None, typer.Option(metavar="MODEL", help="The original: learn to predict as it does.")]
Control = Annotated[
    str | None, typer.Option(metavar="MODEL", help="The original: train it too, on the same text, to compare with.")
]
MaxTokens = Annotated[
    int | None,
    typer.Option(min=1, metavar="N", help="Take the first N tokens of --data, and of --val at most a tenth."),
]
DryRun = Annotated[
    bool,
    typer.Option("--dry-run", help="Say tokens, steps and the memory that each process takes; no GPU, nothing loaded."),
]
WorldSize = Annotated[
    int | None, typer.Option(min=1, metavar="N", help="With --dry-run: in N processes.", show_default="1")
]


@expand
def run(
    model: Model,
    out: Out,
    *,
    data: Data,
    val: Validation = None,
    recipe: RecipeName = "quick",
    then: Then = None,
    teacher: Teacher = None,
    control: Control = None,
    max_tokens: MaxTokens = None,
    changes: RecipeChanges,
    options: HealOptions,
    dtype: Dtype = "auto",
    dry_run: DryRun = False,
    world_size: WorldSize = None,
    json_to: Json = None,
) -> None:
    """Train MODEL, and write its state of lowest validation loss to OUT.

    Runs unchanged under torchrun and accelerate launch. Meanwhile checkpoints and TensorBoard's log are in OUT.work.
    If no trained state is better than MODEL, OUT is not written and the exit code is 1. It is 1 too if only the control
    could not be trained.
    """
    to = Output(json_to, out)
    recipes = check(recipe, then, changes, teacher, control, dry_run=dry_run, world_size=world_size)
    if options.freeze is None:
        options = replace(options, freeze=default_freeze(recipe))
    job = _Job(
        to=to,
        model=model,
        out=out,
        data=data,
        val=val,
        teacher=teacher,
        control=control,
        dtype=dtype,
        recipe=recipe if then is None else f"{recipe}, then {then}",
        options=options,
    )
    from krony.healing.text import Reader, load_text
    from krony.healing.training import check_settings, training_device
    from krony.runtime import distributed
    from krony.runtime.signals import interruptible
    from krony.storage.locks import working_in

    quiet_libraries()
    if dry_run:
        job.preview(recipes, changes, max_tokens, world_size or 1)
        return
    distributed.init(training_device(options.device), shards=True)
    with interruptible(job.how_to_resume), working_in(out, is_mine=distributed.is_first()):
        job.resume_or_start()
        models = job.load_models()
        length = _length(recipes[0], models.model, changes)
        recipes = [replace(each, length=length) for each in recipes]
        for each in recipes:
            check_settings(models.model, length, recipe=each, teacher=models.teacher, options=job.options)
        reader = Reader.of(models.model, models.tokenizer, length)
        train, validation = load_text(data, val, reader, max_tokens=max_tokens)
        report, figures = job.train(models, train, validation, recipes)
        if not distributed.is_first():
            return
        job.show(figures)
        if not (report.improved or options.keep_anyway):
            raise PromiseError(job.not_kept(report, figures))
        job.write(models.model, figures)
    to.say(f"{report.tokens:,} tokens in {report.seconds:,.0f} s -> {out}")
    to.json(figures)
    if reason := figures.get("control", {}).get("error"):
        raise PromiseError(f"{out} is written, and the control {control} could not be trained: {reason}")


@dataclass(frozen=True)
class _Models:
    """What is loaded: the model to train, its tokenizer if it has one, and the teacher."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase | None
    teacher: PreTrainedModel | None


@dataclass(kw_only=True)
class _Job:
    """One call of the verb: the names it was given, and its steps."""

    to: Output
    model: str
    out: Path
    data: str
    val: str | None
    teacher: str | None
    control: str | None
    dtype: str
    recipe: str
    options: HealOptions

    @cached_property
    def source(self) -> ModelSource:
        """The model that is trained."""
        from krony.models.source import ModelSource

        return ModelSource.find(self.model)

    @property
    def work(self) -> Path:
        """The folder for checkpoints and logs."""
        return self.out.with_name(f"{self.out.name}.work")

    def preview(self, recipes: list[Recipe], changes: dict[str, Any], max_tokens: int | None, processes: int) -> None:
        """Says what a run in ``processes`` processes would take."""
        from krony.cli.heal_preview import preview

        length = _length(recipes[0], self.source.skeleton, changes)
        recipes = [replace(each, length=length) for each in recipes]
        text = (self.data, self.val, max_tokens)
        asked: dict[str, Any] = {"text": text, "processes": processes, "dtype": self.dtype}
        preview(self.to, self.source, self.teacher, recipes, self.options, **asked)

    def resume_or_start(self) -> None:
        """Finds out where to continue. Raises KronyError where OUT can't be written or belongs to another run."""
        from krony.healing.checkpoints import find_last, last_checkpoint
        from krony.runtime import distributed
        from krony.storage.files import check_writable

        if distributed.is_first():
            check_writable(self.out)
            if self.work.exists() and not self.options.resume:
                raise KronyError(f"{self.work} belongs to an unfinished run: --resume continues it, or remove it")
        if self.options.resume and self.work.is_dir() and find_last(self.work) is None:
            self.to.say(f"{self.work} holds no checkpoint yet: starting from the beginning")
            self.options = replace(self.options, resume=False)
        elif self.options.resume:
            last_checkpoint(self.work)

    def load_models(self) -> _Models:
        """Loads what is trained and what teaches it; the control only to see whether it loads. Raises KronyError."""
        from krony.healing.text import tokenizer_for
        from krony.models.source import ModelSource

        self.source.check_saves()
        if self.control is not None:
            self.load(ModelSource.find(self.control))
        teacher = None if self.teacher is None else self.load(ModelSource.find(self.teacher))
        return _Models(self.load(self.source), tokenizer_for(self.source, self.data, self.val), teacher)

    def load(self, source: ModelSource) -> PreTrainedModel:
        """The model in ``--dtype``; of a sharded run only the first process has its values."""
        from krony.healing.sharding import is_sharding, load_once

        return load_once(source, self.dtype) if is_sharding(self.options) else source.load(dtype=self.dtype)

    def train(
        self, models: _Models, train: Rows, validation: Rows, recipes: list[Recipe]
    ) -> tuple[HealReport, dict[str, Any]]:
        """Trains the model and the control, and gives the model's report and the figures of all."""
        from krony.data.hub import read_as
        from krony.healing.chain import train_in_turn
        from krony.healing.control import train_control
        from krony.healing.report import perplexity
        from krony.healing.sharding import as_it_runs
        from krony.healing.validation import validation_loss
        from krony.models.source import ModelSource
        from krony.runtime.hardware import is_out_of_memory

        tokens = [f"{len(rows) * rows.length:,}" for rows in (train, validation)]
        self.to.say(f"{tokens[0]} tokens of {read_as(self.data)} to train on, {tokens[1]} to validate on")
        common: dict[str, Any] = {"tokenizer": models.tokenizer, "options": self.options}
        with self.to.progress() as progress:
            common["progress"] = progress
            report = train_in_turn(
                models.model, train, validation, work=self.work, recipes=recipes, teacher=models.teacher, **common
            )
            names = {"model": self.model, "teacher": self.teacher, "recipe": self.recipe, "freeze": self.options.freeze}
            figures = names | report.to_json()
            if self.control is not None:
                try:
                    dense = self.load(ModelSource.find(self.control))
                    compared = train_control(
                        dense, train, validation, work=self.work / "control", recipe=recipes[0], **common
                    ).to_json()
                    figures["perplexity_original"] = compared["perplexity_before"]
                except (KronyError, MemoryError, RuntimeError) as error:  # the model is trained all the same
                    if not (isinstance(error, KronyError) or is_out_of_memory(error)):
                        raise
                    compared = {"error": "there is not enough memory" if is_out_of_memory(error) else str(error)}
                figures["control"] = {"model": self.control} | compared
            elif models.teacher is not None:
                teacher = as_it_runs(models.teacher, self.options)
                figures["perplexity_original"] = perplexity(validation_loss(teacher, validation))
        return report, figures

    def show(self, figures: dict[str, Any]) -> None:
        """Prints the perplexities."""
        from krony.compression.model_card import healed_table

        table = healed_table(figures | {"perplexity_after": figures["perplexity_trained"]})
        self.to.table(table.columns, table.rows)

    def not_kept(self, report: HealReport, figures: dict[str, Any]) -> str:
        """Writes the figures, and says why OUT is not written and how it could be."""
        from krony.storage.files import write_json

        file = Path(self.to.json_to or "-")
        if file.parent.resolve() == self.out.resolve():
            write_json(self.work / file.name, figures)  # the folder that they were to go to isn't written
        else:
            self.to.json(figures)
        return (
            f"{report.no_gain('the model')}. {self.out} was not written; {self.work} holds the checkpoints: remove it "
            "to train again, or run the same command with --resume --keep-anyway to write OUT all the same"
        )

    def write(self, model: PreTrainedModel, figures: dict[str, Any]) -> None:
        """Writes OUT with its card and logs, and removes the work folder."""
        from krony.compression.model_card import healed_card
        from krony.healing.chain import THEN
        from krony.healing.checkpoints import explain_write_errors, keep_logs
        from krony.healing.trajectory import write_trajectories
        from krony.models.quantizer import recorded_options
        from krony.storage.files import fresh_folder

        with explain_write_errors(self.out), fresh_folder(self.out) as folder:
            self.source.save(model, folder)
            (folder / "README.md").write_text(
                healed_card(self.model, figures, recorded_options(model.config)), encoding="utf-8"
            )
            if figures["scalars"]:
                write_trajectories(folder, figures["scalars"])
            keep_logs(self.work, folder)
            keep_logs(self.work / THEN, folder / THEN)
            if self.control is not None:
                keep_logs(self.work / "control", folder / "control")
        shutil.rmtree(self.work)

    def how_to_resume(self) -> str:
        """What is left after an interruption, and how to continue."""
        from krony.healing.chain import THEN
        from krony.healing.checkpoints import find_last

        if (self.out / "config.json").exists():
            return f"{self.out} is complete; {self.work}, if it is there, can be removed"
        if not self.work.exists():
            return "nothing was written"
        last = find_last(self.work / THEN) or find_last(self.work)
        if last is None:
            return f"{self.work} holds no checkpoint yet: remove it, or start over with --resume"
        return f"{last} is the last checkpoint: the same command with --resume continues from there"


def check(
    recipe: str,
    then: str | None,
    changes: dict[str, Any],
    teacher: str | None,
    control: str | None,
    *,
    dry_run: bool = False,
    world_size: int | None = None,
) -> list[Recipe]:
    """The recipes that are trained by, the first with the changes of the command line. Raises KronyError."""
    taught = [f"--{key}" for key in ("temperature", "text", "hidden") if key in changes]
    if teacher is None and taught:
        raise KronyError(f"{', '.join(taught)} works with a teacher: name it with --teacher")
    if then is not None and control is not None:
        raise KronyError("--control trains by one recipe, and --then adds another: leave one of them out")
    if world_size is not None and not dry_run:
        raise KronyError("--world-size goes with --dry-run: torchrun and accelerate launch start several processes")
    if dry_run and control is not None:
        raise KronyError("--dry-run says what training MODEL takes: leave --control out, or name it as MODEL")
    later = {key: value for key, value in changes.items() if key == "batch"}
    return [find_recipe(recipe).changed(**changes), *([] if then is None else [find_recipe(then).changed(**later)])]


def _length(recipe: Recipe, model: PreTrainedModel, changes: dict[str, Any]) -> int:
    """The length of rows: as given, or as the recipe says and the model can take."""
    from krony.models.loading import context_length

    return recipe.length if "length" in changes else min(recipe.length, context_length(model))
