"""Trains and measures the models of Tables 5 to 9: one run per model, measured at several stages.

The training is the paper's (section 4.1): epochs of OpenWebText with a cosine, then one more at a small constant rate
from the best state. The quick budget keeps the order and shrinks everything: short epochs, small steps, higher rates.
"""

from __future__ import annotations

import copy
import math
import shutil
from dataclasses import asdict, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from krony._version import __version__
from krony.compression.compress import compress
from krony.data.rows import Rows, load_rows
from krony.data.sets import join_rows, load_texts
from krony.errors import KronyError
from krony.evaluation.perplexity import WINDOW, measure_perplexity
from krony.healing.checkpoints import find_last, step_of
from krony.healing.options import HealOptions
from krony.healing.training import train_on_rows
from krony.models.digests import model_digest
from krony.models.loading import context_length, load_tokenizer
from krony.models.modes import evaluating
from krony.models.surgery import count_parameters, count_untied
from krony.reproduce.budgets import BUDGETS
from krony.reproduce.digests import token_digest
from krony.reproduce.estimate import Work, measure_pace
from krony.reproduce.figures import SETS
from krony.reproduce.options import TableOptions
from krony.reproduce.runs import MARKS, STAGES, Run, Trained, last_stage, read_figures, run_folder, write_figures
from krony.runtime.timing import duration

OPENWEBTEXT = "Skylion007/openwebtext"
MIN_STEPS = 10  # of an epoch


class _LastStageReached(Exception):  # noqa: N818  (it is no error)
    """Ends a training at the last stage that was asked for."""


class TableTrainer:
    """The base model with its text: trains runs and measures them. ``work`` keeps the figures of a run, if given.

    Raises:
        KronyError: text that this machine can't get; before anything is trained.
    """

    def __init__(self, options: TableOptions, base: PreTrainedModel, target: str) -> None:
        self.options, self.base, self.budget = options, base, BUDGETS[options.budget]
        self.tokenizer: PreTrainedTokenizerBase = load_tokenizer(options.model)
        context = context_length(base)
        self.recipes = [replace(r, length=min(r.length, context)) for r in (self.budget.train, self.budget.final)]
        self.train, self.validation = self._load_text(target)
        self.tests = [self._load_test(name) for name in SETS]

    def base_perplexities(self) -> list[float]:
        """Perplexities of the original on each of SETS."""
        return self.perplexities(self.base)

    def perplexities(self, model: PreTrainedModel) -> list[float]:
        """Perplexities of ``model`` on each of SETS, by the paper's protocol."""
        window = min(context_length(model), WINDOW)
        with evaluating(model):
            return [
                measure_perplexity(model, ids, protocol="paper", window=window, stride=window)[0] for ids in self.tests
            ]

    @torch.inference_mode()
    def validation_loss(self, model: PreTrainedModel) -> float:
        """Mean loss on the validation rows, in nats per token."""
        losses = []
        with evaluating(model):
            for index in range(len(self.validation)):
                ids = self.validation[index]["input_ids"][None].to(model.device)  # (1, length)
                losses.append(model(input_ids=ids, labels=ids).loss.item())
        return sum(losses) / len(losses)

    def plan(self, runs: dict[Run, set[str]]) -> list[str]:
        """Sentences that say how many tokens the runs train on and measure, and about how long that takes here."""
        epoch, tests = len(self.train) * self.train.length, self.budget.test_tokens
        left = {run: self._work_left(run, stages) for run, stages in runs.items()}
        seconds = 0.0
        for run, work in left.items():
            if work.tokens or work.tested:
                seconds += measure_pace(self.base, run, self.train, self.recipes[0]).seconds(work)
        words = "; ".join(f"{run.name} {work.tokens:,.0f}" for run, work in left.items())
        words += " (what --work holds is not repeated)" if self.options.work is not None else ""
        return [
            f"Budget {self.options.budget}: an epoch is {epoch:,} tokens, and each test set is "
            f"{'complete' if tests is None else f'its first {tests:,} tokens'}.",
            *self._changes_of_budget(),
            f"Tokens to train on: {words}. About {duration(seconds)} on this machine ({self.options.device}) if nothing"
            " else runs on it.",
        ]

    def _changes_of_budget(self) -> list[str]:
        """What the text makes of the budget's numbers of tokens, where they are others."""
        length, tokens = self.train.length, self.budget.epoch_tokens
        epoch, rows = len(self.train) * length, len(self.validation)
        wanted, needed = epoch if tokens is None else tokens // length * length, self.budget.validation_rows
        if (epoch, rows) == (wanted, needed):
            return []
        here = f"{rows} row validates" if rows == 1 else f"{rows} rows validate"
        return [
            f"The text is too short for this budget, which has epochs of {wanted:,} tokens and {needed} rows of "
            f"{length} tokens to validate on: here an epoch is {epoch:,} tokens, and {here}."
        ]

    def _work_left(self, run: Run, stages: set[str]) -> Work:
        """What a run still has to do, after what ``work`` keeps of it."""
        epoch, epochs = len(self.train) * self.train.length, [recipe.epochs for recipe in self.recipes]
        done = 0.0  # epochs
        with run_folder(self.options.work, run, self._made_with(run)) as folder:
            known = read_figures(folder)
            if stages <= {*known.stages, *known.curve}:
                return Work()
            for number, recipe in enumerate(self.recipes):
                if last := find_last(folder / f"training-{number}"):
                    steps = step_of(last)
                    done = sum(epochs[:number]) + steps * recipe.sequences * self.train.length / epoch
        until = last_stage(stages)
        end = STAGES[until] if until != "full" else sum(epochs)
        if self.options.work is not None:
            stages = {stage for stage in STAGES if STAGES[stage] <= STAGES[until]}
        measured = [stage for stage in stages - {"0.4"} if stage not in known.stages]
        first = max(0.0, min(end, epochs[0]) - done)
        rest = max(0.0, end - max(done, epochs[0]))
        evaluations = sum(
            e / n * r.evaluations + 2 for e, n, r in zip((first, rest), epochs, self.recipes, strict=True) if e
        )
        validation = len(self.validation) * self.train.length
        curve = 1 + sum(done < share <= end for share in MARKS)
        return Work(
            tokens=(first + rest) * epoch,
            steps=sum(e * epoch / r.sequences for e, r in zip((first, rest), self.recipes, strict=True))
            / self.train.length,
            validated=evaluations * validation,
            tested=len(measured) * sum(map(len, self.tests)) + curve * validation,
        )

    def run(self, run: Run, stages: set[str]) -> Trained:
        """Trains up to the last of ``stages`` (keys of STAGES) and measures at each; with ``work``, at every stage."""
        with run_folder(self.options.work, run, self._made_with(run)) as folder:
            known = read_figures(folder)
            if stages <= {*known.stages, *known.curve}:
                return known
            until = last_stage(stages)
            if self.options.work is not None:
                stages = {stage for stage in STAGES if STAGES[stage] <= STAGES[until]}
            model = copy.deepcopy(self.base)
            compress(model, run.config)
            known.params, known.untied = count_parameters(model), count_untied(model)
            known.curve["0"] = self.validation_loss(model)
            if "start" in stages:
                known.stages["start"] = self.perplexities(model)
            write_figures(folder, self._made_with(run), known)
            if until != "start":
                self._train(run, model, stages, folder, known)
            return known

    def _train(self, run: Run, model: PreTrainedModel, stages: set[str], folder: Path, known: Trained) -> None:
        copied = copy.deepcopy(model)  # what is measured, while ``model`` stays in training
        steps = len(self.train) // self.recipes[0].sequences  # of an epoch
        marks = {max(1, round(share * steps)): share for share in (*MARKS, 1.0)}
        until = last_stage(stages)
        last = max(1, round(STAGES[until] * steps)) if until != "full" else math.inf

        def watch(done: int, total: int, what: str) -> None:
            self.options.progress(done, total, f"{run.name}: {what}")
            share = marks.get(done)
            if share is not None and share <= STAGES[until]:
                copied.load_state_dict(model.state_dict())
                if share in MARKS:
                    known.curve[f"{share:g}"] = self.validation_loss(copied)
                stage = {0.3: "0.3", 1.0: "epoch"}.get(share)
                if stage in stages:
                    known.stages[stage] = self.perplexities(copied)
                write_figures(folder, self._made_with(run), known)
            if done >= last:
                raise _LastStageReached

        teacher = copy.deepcopy(self.base) if run.taught else None
        for number, recipe in enumerate(self.recipes if until == "full" else self.recipes[:1]):
            work = folder / f"training-{number}"
            try:
                train_on_rows(
                    model,
                    self.train,
                    self.validation,
                    work=work,
                    recipe=recipe,
                    teacher=teacher,
                    options=self._heal_options(work),
                    progress=watch if number == 0 else self.options.progress,
                )
            except _LastStageReached:
                return
        known.stages["full"] = self.perplexities(model.to(self.options.device))
        write_figures(folder, self._made_with(run), known)
        for number in range(len(self.recipes)):  # checkpoints are large, and nothing resumes from them any more
            shutil.rmtree(folder / f"training-{number}", ignore_errors=True)

    def _heal_options(self, work: Path) -> HealOptions:
        return HealOptions(
            freeze="none",
            resume=find_last(work) is not None,
            keep_anyway=True,  # the table shows what the paper's training does
            device="cpu" if self.options.device == "cpu" else None,
            seed=self.options.seed,
        )

    def _load_text(self, target: str) -> tuple[Rows, Rows]:
        """Rows to train on and rows to validate on. Raises KronyError."""
        length = self.recipes[0].length
        tokens = self.budget.epoch_tokens
        wanted = None if tokens is None else tokens // length * length
        source, held_out = self._text_files(target, wanted is None)
        more = self.budget.validation_rows * length
        limit = None if wanted is None else wanted + (0 if held_out else more)
        try:
            rows = self._rows(source or OPENWEBTEXT, limit)
        except KronyError as error:
            if source is not None:
                raise
            raise KronyError(f"{target} needs OpenWebText to train on: --data-dir DIR, or the hub ({error})") from None
        if held_out is None:
            enough = limit is not None and len(rows) * length >= limit
            held_rows = self.budget.validation_rows
            rows, validation = rows.split(held_rows if enough else min(held_rows, max(1, len(rows) // 20)))
        else:
            validation = self._rows(held_out, more)
        needed = MIN_STEPS * self.recipes[0].sequences
        if len(rows) < needed:
            raise KronyError(
                f"{source or OPENWEBTEXT} gives {len(rows) * length:,} tokens to train on: at least "
                f"{needed * length:,} are needed, so that an epoch has {MIN_STEPS} steps"
            )
        return rows, validation

    def _text_files(self, target: str, complete: bool) -> tuple[str | None, str | None]:
        """The file to train on, None for the hub's, and that to validate on, None to hold out a part.

        Args:
            target: the table, for messages.
            complete: whether the budget takes all of OpenWebText.
        """
        source, folder = self.options.data, self.options.data_dir
        if source is None and folder is not None:
            names = ["train.bin"] if complete else ["train.bin", "train.jsonl"]
            places = [folder / "openwebtext" / name for name in names]
            if complete and not places[0].is_file():
                raise KronyError(
                    f"{target} with the full budget needs all of OpenWebText, as nanoGPT writes it, in {places[0]}; "
                    "or name other text with --data"
                )
            held = [folder / "openwebtext" / name for name in ("val.bin", "val.jsonl")]
            held_out = next((str(p) for p in held if p.is_file()), None)
            return str(next((p for p in places if p.is_file()), places[-1])), held_out
        if source is None and complete:
            raise KronyError(
                f"{target} with the full budget needs all of OpenWebText on disk: --data-dir DIR with "
                "openwebtext/train.bin, as nanoGPT writes it, or other text with --data"
            )
        return source, None

    def _rows(self, source: str, max_tokens: int | None) -> Rows:
        vocabulary = self.base.get_input_embeddings().weight.shape[0]
        return load_rows(
            source, self.tokenizer, length=self.recipes[0].length, vocabulary=vocabulary, max_tokens=max_tokens
        )

    def _load_test(self, name: str) -> Tensor:
        return join_rows(load_texts(name, self.options.data_dir), self.tokenizer, self.budget.test_tokens)

    def _made_with(self, run: Run) -> dict[str, Any]:
        """What a run's figures depend on."""
        return self._contents | {
            "config": {k: v for k, v in vars(run.config).items() if v is not None},
            "taught": run.taught,
            "seed": self.options.seed,
        }

    @cached_property
    def _contents(self) -> dict[str, Any]:
        """What the figures of all runs depend on: contents by their digests."""
        return {
            "krony": __version__,
            "model": model_digest(self.base),
            "recipes": [asdict(recipe) for recipe in self.recipes],
            "train": token_digest(self.train.tokens),
            "validation": token_digest(self.validation.tokens),
            "tests": [token_digest(ids.numpy()) for ids in self.tests],
        }
