"""Trains and measures the models of Tables 5 to 9: one run a model, with stops on the way.

As the paper does it (section 4.1): epochs of OpenWebText with a cosine, then one more at a small constant rate from the
best state. The quick budget keeps the order and shrinks everything: short epochs, small steps, higher rates.
"""

from __future__ import annotations

import copy
import json
import math
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from krony._version import __version__
from krony.compression.compress import compress
from krony.config import KronyConfig
from krony.data.rows import Rows, load_rows
from krony.data.sets import join_rows, load_texts
from krony.errors import KronyError
from krony.evaluation.perplexity import WINDOW, measure_perplexity
from krony.healing.heal import RECIPES, Recipe, heal, last_checkpoint
from krony.models.loading import context_length, load_tokenizer
from krony.models.surgery import count_parameters, count_untied
from krony.reproduce.figures import SETS
from krony.reproduce.lines import Options
from krony.storage.files import write_json

OPENWEBTEXT = "Skylion007/openwebtext"
FEWEST_STEPS = 10  # of an epoch
MARKS = (0.1, 0.2, 0.3, 0.4)  # of the first epoch, where Figure 1 takes the validation loss
STAGES = {"start": 0.0, "0.3": 0.3, "0.4": 0.4, "epoch": 1.0, "full": math.inf}  # where a run is measured: epochs


@dataclass(frozen=True)
class Budget:
    """How much is trained and measured.

    Attributes:
        test_tokens: of each test set, None for all.
        epoch_tokens: what counts as an epoch, None for all of the text.
        train: the recipe of the first epochs; ``final`` that of the last one.
        validation_rows: rows that the validation loss is of.
    """

    test_tokens: int | None
    epoch_tokens: int | None
    train: Recipe
    final: Recipe
    validation_rows: int


_QUICK = replace(RECIPES["quick"], sequences=4, batch=4, learning_rate=5e-4, final_rate=5e-6)
BUDGETS = {
    "quick": Budget(
        test_tokens=32_768,
        epoch_tokens=40_960,  # 20 steps: Figure 1's tenths are whole steps
        train=replace(_QUICK, epochs=3.0),
        final=replace(_QUICK, sequences=16, learning_rate=5e-5, final_rate=5e-5, warm_up=0, epochs=1.0),
        validation_rows=16,
    ),
    "full": Budget(None, None, RECIPES["paper"], RECIPES["paper-final"], validation_rows=240),
}


@dataclass(frozen=True)
class Run:
    """A model of the tables: how it starts, and whether the original teaches it."""

    name: str
    config: KronyConfig
    taught: bool = False


@dataclass
class Trained:
    """What a run gave: perplexities (in the order of SETS) by stage, and Figure 1's curve, nats a token."""

    params: int = 0
    untied: int = 0
    stages: dict[str, list[float]] = field(default_factory=dict)
    curve: dict[str, float] = field(default_factory=dict)


class _FarEnough(Exception):  # noqa: N818  (it is no error)
    """Ends a training that has reached the last stage that was asked for."""


class TableTrainer:
    """The base model with its text: trains runs and measures them. Figures of a run are kept in ``work``, if any.

    Raises KronyError, before anything is trained, where the text can't be had.
    """

    def __init__(self, options: Options, base: PreTrainedModel, target: str) -> None:
        self.options, self.base, self.budget = options, base, BUDGETS[options.budget]
        self.tokenizer: PreTrainedTokenizerBase = load_tokenizer(options.model)
        context = context_length(base)
        self.recipes = [replace(r, length=min(r.length, context)) for r in (self.budget.train, self.budget.final)]
        self.train, self.validation = self._text(target)
        self.tests = [self._test(name) for name in SETS]

    def base_perplexities(self) -> list[float]:
        """Of the original on each of SETS."""
        return self.perplexities(self.base)

    def perplexities(self, model: PreTrainedModel) -> list[float]:
        """By the paper's protocol on each of SETS; ``model`` is left in eval mode."""
        window = min(context_length(model), WINDOW)
        model.eval()
        return [measure_perplexity(model, ids, protocol="paper", window=window, stride=window)[0] for ids in self.tests]

    def plan(self, runs: dict[Run, set[str]]) -> list[str]:
        """How many tokens will be trained on and measured, and about how long that takes here."""
        epoch = len(self.train) * self.train.length
        trained = {run: self._share(_last(stages)) * epoch for run, stages in runs.items()}
        measured = sum(len(ids) for ids in self.tests)
        pace = self._seconds_a_token()
        stops = sum(len(stages - {"0.4"}) for stages in runs.values()) + 1
        passes = sum(tokens * (4 / 3 if run.taught else 1) for run, tokens in trained.items())
        seconds = pace * (passes + measured * stops / 3)  # a step is three forward passes
        words = "; ".join(f"{run.name} {tokens:,.0f}" for run, tokens in trained.items())
        return [
            f"Budget {self.options.budget}: an epoch is {epoch:,} tokens, and each test set "
            f"{'whole' if self.budget.test_tokens is None else f'the first {self.budget.test_tokens:,} tokens'}.",
            f"Tokens to train on: {words}. About {_duration(seconds)} on this machine ({self.options.device}).",
        ]

    def run(self, run: Run, stages: set[str]) -> Trained:
        """Trains up to the last of ``stages``, one or more of STAGES, and measures at each; with ``work``, at all."""
        with self._folder(run) as (folder, known):
            if stages <= {*known.stages, *known.curve}:
                return known
            until = _last(stages)
            if self.options.work is not None:
                stages = {stage for stage in STAGES if STAGES[stage] <= STAGES[until]}
            model = copy.deepcopy(self.base)
            compress(model, run.config)
            known.params, known.untied = count_parameters(model), count_untied(model)
            known.curve["0"] = self.validation_loss(model)
            if "start" in stages:
                known.stages["start"] = self.perplexities(model)
            self._keep(folder, run, known)
            if until != "start":
                self._train(run, model, stages, folder, known)
            return known

    def _train(self, run: Run, model: PreTrainedModel, stages: set[str], folder: Path, known: Trained) -> None:
        copied = copy.deepcopy(model)
        steps = len(self.train) // self.recipes[0].sequences  # an epoch
        marks = {max(1, round(share * steps)): share for share in (*MARKS, 1.0)}
        until = _last(stages)
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
                self._keep(folder, run, known)
            if done >= last:
                raise _FarEnough

        teacher = copy.deepcopy(self.base) if run.taught else None
        for number, recipe in enumerate(self.recipes if until == "full" else self.recipes[:1]):
            work = folder / f"training-{number}"
            try:
                heal(
                    model,
                    self.train,
                    self.validation,
                    work=work,
                    recipe=recipe,
                    teacher=teacher,
                    freeze="none",
                    resume=_has_checkpoint(work),
                    device="cpu" if self.options.device == "cpu" else None,
                    seed=self.options.seed,
                    progress=watch if number == 0 else self.options.progress,
                )
            except _FarEnough:
                return
        known.stages["full"] = self.perplexities(model.to(self.options.device))
        self._keep(folder, run, known)
        for number in range(len(self.recipes)):  # checkpoints are large, and nothing goes on from them any more
            shutil.rmtree(folder / f"training-{number}", ignore_errors=True)

    @torch.inference_mode()
    def validation_loss(self, model: PreTrainedModel) -> float:
        """Nats a token on the validation rows."""
        model.eval()
        rows = [self.validation[i]["input_ids"] for i in range(len(self.validation))]
        losses = [model(input_ids=r[None].to(model.device), labels=r[None].to(model.device)).loss.item() for r in rows]
        return sum(losses) / len(losses)

    def _text(self, target: str) -> tuple[Rows, Rows]:
        """Rows to train on and rows to validate on. Raises KronyError."""
        budget, folder = self.budget, self.options.data_dir
        length = self.recipes[0].length
        known = self.base.get_input_embeddings().weight.shape[0]
        wanted = None if budget.epoch_tokens is None else budget.epoch_tokens // length * length
        source, held_out = self.options.data, None
        if source is None and folder is not None:
            names = ["train.bin"] if wanted is None else ["train.bin", "train.jsonl"]
            places = [folder / "openwebtext" / name for name in names]
            if wanted is None and not places[0].is_file():
                raise KronyError(
                    f"{target} with the full budget needs all of OpenWebText, as nanoGPT writes it, in {places[0]}; "
                    "or name other text with --data"
                )
            source = str(next((p for p in places if p.is_file()), places[-1]))
            held = [folder / "openwebtext" / name for name in ("val.bin", "val.jsonl")]
            held_out = next((p for p in held if p.is_file()), None)
        if source is None and wanted is None:
            raise KronyError(
                f"{target} with the full budget needs all of OpenWebText on disk: --data-dir DIR with "
                "openwebtext/train.bin, as nanoGPT writes it, or other text with --data"
            )
        more = budget.validation_rows * length
        try:
            rows = load_rows(
                source or OPENWEBTEXT,
                self.tokenizer,
                length=length,
                vocabulary=known,
                max_tokens=None if wanted is None else wanted + (0 if held_out else more),
            )
        except KronyError as error:
            if source is not None:
                raise
            raise KronyError(f"{target} needs OpenWebText to train on: --data-dir DIR, or the hub ({error})") from None
        if held_out is None:
            rows, held_rows = rows.split(min(budget.validation_rows, max(1, len(rows) // 20)))
        else:
            held_rows = load_rows(str(held_out), self.tokenizer, length=length, vocabulary=known, max_tokens=more)
        if len(rows) < FEWEST_STEPS * self.recipes[0].sequences:
            least = FEWEST_STEPS * self.recipes[0].sequences * length
            raise KronyError(
                f"{source or OPENWEBTEXT} gives {len(rows) * length:,} tokens to train on: {least:,} are the least, "
                "so that the tenths of an epoch can be told apart"
            )
        return rows, held_rows

    def _test(self, name: str) -> Tensor:
        return join_rows(load_texts(name, self.options.data_dir), self.tokenizer)[: self.budget.test_tokens]

    def _share(self, stage: str) -> float:
        """Epochs that are trained up to a stage."""
        return STAGES[stage] if stage != "full" else self.recipes[0].epochs + self.recipes[1].epochs

    def _seconds_a_token(self) -> float:
        """Of a training step, measured on one row of a copy."""
        model, row = copy.deepcopy(self.base).train(), self.train[0]["input_ids"][None].to(self.base.device)
        times = []
        for _ in range(2):  # the first is a warm-up
            start = time.perf_counter()
            model(input_ids=row, labels=row, use_cache=False).loss.backward()
            times.append(time.perf_counter() - start)
        return times[-1] / row.numel()

    @contextmanager
    def _folder(self, run: Run) -> Iterator[tuple[Path, Trained]]:
        """The run's folder, which goes again unless ``work`` keeps it, and what it holds."""
        kept = self.options.work
        place = tempfile.TemporaryDirectory() if kept is None else nullcontext(str(kept / _slug(run.name)))
        with place as name:
            folder = Path(name)
            yield folder, self._known(folder, run)

    def _known(self, folder: Path, run: Run) -> Trained:
        file = folder / "figures.json"
        if not file.exists():
            return Trained()
        try:
            held = json.loads(file.read_text(encoding="utf-8"))
            made, figures = held["made"], Trained(**held["figures"])
        except (ValueError, KeyError, TypeError, OSError):
            raise KronyError(f"{file} is damaged: remove {folder}, and the run starts anew") from None
        if made != self._made(run):
            raise KronyError(f"{folder} is of another model, text, budget or version: name another folder with --work")
        return figures

    def _made(self, run: Run) -> dict:
        """What a run's figures depend on."""
        return {
            "krony": __version__,
            "model": self.options.model,
            "params": count_parameters(self.base),
            "config": {k: v for k, v in vars(run.config).items() if v is not None},
            "taught": run.taught,
            "budget": self.options.budget,
            "tokens": [len(rows) * rows.length for rows in (self.train, self.validation)],
            "tests": [len(ids) for ids in self.tests],
            "seed": self.options.seed,
        }

    def _keep(self, folder: Path, run: Run, figures: Trained) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / "figures.json", {"made": self._made(run), "figures": vars(figures)})


def _last(stages: set[str]) -> str:
    return max(stages, key=lambda stage: STAGES[stage])


def _has_checkpoint(work: Path) -> bool:
    try:
        last_checkpoint(work)
    except KronyError:
        return False
    return True


def _slug(name: str) -> str:
    return "".join(c if c.isalnum() or c in "-." else "-" for c in name)


def _duration(seconds: float) -> str:
    for size, unit in ((86_400, "days"), (3_600, "hours"), (60, "minutes")):
        if seconds >= 2 * size:
            return f"{seconds / size:,.0f} {unit}"
    return f"{max(1, round(seconds)):,} seconds"
