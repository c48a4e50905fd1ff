"""One training run on rows, with transformers' Trainer: checked, resumable, and no worse at its end than before.

The paper trains on OpenWebText for 3 epochs (section 4.1); with a good start and a teacher far fewer tokens suffice.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import (
    EarlyStoppingCallback,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PrinterCallback,
    TrainerState,
    TrainingArguments,
)

from krony.data.rows import Rows
from krony.errors import KronyError
from krony.healing.callbacks import Clock, FindBest, SaveAtSignal, ShowProgress, StopAtBadLoss
from krony.healing.checkpoints import (
    FINGERPRINTS,
    explain_lost_processes,
    explain_write_errors,
    hold_to_settings,
    lacks_evaluation,
    last_checkpoint,
    loggers,
    restore_start,
    save_start,
)
from krony.healing.distillation import check_teacher
from krony.healing.options import DEFAULTS, HealOptions
from krony.healing.recipes import RECIPES, Recipe
from krony.healing.report import HealReport
from krony.healing.scalars import trajectories
from krony.healing.sharded_trainer import ShardedTrainer
from krony.healing.sharding import check_sharding, is_sharding
from krony.healing.trainable import trainable
from krony.healing.trainer import HealingTrainer
from krony.models.fast_training import fast_training
from krony.models.loading import context_length
from krony.models.precision import full_precision, product_dtype, round_weights
from krony.runtime import distributed
from krony.runtime.hardware import check_device
from krony.runtime.progress import Progress, silent
from krony.runtime.signals import deferred


def train_on_rows(
    model: PreTrainedModel,
    train: Rows,
    validation: Rows,
    *,
    work: Path,
    recipe: Recipe = RECIPES["quick"],
    teacher: PreTrainedModel | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    options: HealOptions = DEFAULTS,
    progress: Progress = silent,
) -> HealReport:
    """Trains ``model`` in place, dense or compressed, and leaves it in eval mode and in its best state.

    The best state is the one of lowest validation loss. If no trained state is better than the one before, the model
    gets its own weights back (unless ``options.keep_anyway``). Weights are float32 during training, with matrix
    products in bfloat16 where that is fast, and have their own dtype again at the end. SIGINT, SIGTERM and SIGHUP end
    the run after a checkpoint of the current step.

    Args:
        train: rows to train on.
        validation: rows that choose the best state; their loss is the report's.
        work: folder for checkpoints and TensorBoard's log.
        teacher: the original; the loss is then the divergence from its predictions, and whatever the recipe adds.
        tokenizer: saved with every checkpoint, which can then be loaded as a model by itself.

    Raises:
        KronyError: rows, teacher, recipe or options that don't fit, a loss that is not finite, nothing to resume or
            other settings than before, a full disk. The last complete checkpoint stays in ``work``.
        krony.healing.checkpoints.LostProcessError: another process of the run has ended.
        krony.runtime.signals.Interrupt: a signal asked for the end.
    """
    distributed.init(training_device(options.device), shards=True)
    check_run(model, train, validation, recipe=recipe, teacher=teacher, options=options)
    train = complete_steps(train, recipe)
    freezing = trainable(model, options.frozen, checkpointing=options.gradient_checkpointing)
    with explain_write_errors(work), explain_lost_processes(work), freezing:
        settings = settings_of(model, train, validation, recipe=recipe, teacher=teacher, options=options)
        last = last_checkpoint(work) if options.resume else None
        hold_to_settings(work, settings, resume=options.resume)
        save_start(model, work)
        try:
            device = training_device(options.device)
            fast = fast_training(model, teacher, device=device, length=train.length)
            with full_precision(model) as dtypes, _nothing_left_on(model), fast:
                arguments = _arguments(model, train, recipe, work, options)
                data = {"train_dataset": train, "eval_dataset": validation, "processing_class": tokenizer}
                if is_sharding(options):
                    trainer = ShardedTrainer(recipe, teacher, whole=model, args=arguments, **data)
                else:
                    trainer = HealingTrainer(recipe, teacher, model=model, args=arguments, **data)
                loss = _run(trainer, last, work, progress, dtypes)
                trainer.finish()
        except KronyError:  # a loss that is not finite
            restore_start(model, work)
            raise
        report = _report(trainer.state, recipe.sequences * train.length, loss, trainer.seconds)
        if not (report.improved or options.keep_anyway):
            restore_start(model, work)
            report = replace(report, loss_after=report.loss_before)
    model.eval()
    return report


def training_device(device: str | None) -> str:
    """``cpu`` or ``cuda``: what training runs on. Raises KronyError where there is no GPU."""
    if device == "cuda":
        check_device(device)
    return device or ("cuda" if torch.cuda.is_available() else "cpu")


def check_run(
    model: PreTrainedModel,
    train: Rows,
    validation: Rows,
    *,
    recipe: Recipe,
    teacher: PreTrainedModel | None,
    options: HealOptions,
    processes: int | None = None,
) -> None:
    """Raises KronyError where ``train_on_rows`` would, as far as that can be told before it starts.

    ``processes``: how many will share a step; None for those that are running.
    """
    check_settings(model, train.length, recipe=recipe, teacher=teacher, options=options, processes=processes)
    if len(train) < recipe.sequences:
        raise KronyError(f"{len(train)} rows to train on: one step of this recipe takes {recipe.sequences}")
    if not len(validation):
        raise KronyError("there is no row to validate on: give more text")


def check_settings(
    model: PreTrainedModel,
    length: int,
    *,
    recipe: Recipe,
    teacher: PreTrainedModel | None,
    options: HealOptions,
    processes: int | None = None,
) -> None:
    """Raises KronyError where rows of ``length`` tokens, recipe, teacher or options don't fit the model or machine."""
    processes = distributed.count() if processes is None else processes
    with trainable(model, options.frozen):
        pass
    if length > context_length(model):
        raise KronyError(f"rows of {length} tokens: the model takes {context_length(model)}")
    if recipe.sequences % processes:
        raise KronyError(
            f"{recipe.sequences} sequences per step can't be shared by {processes} processes: take a multiple"
        )
    if teacher is not None:
        check_teacher(model, teacher, recipe)
    check_sharding(model, teacher, options, processes)


def _run(
    trainer: HealingTrainer, last: str | None, work: Path, progress: Progress, dtypes: dict[str, torch.dtype]
) -> float:
    """Trains from the start or from the checkpoint ``last``, loads the best trained state, and returns its loss.

    ``dtypes``: what the weights are rounded to afterwards, by name. The loss is that of the rounded ones.
    """
    tokens_per_step = trainer.recipe.sequences * trainer.train_dataset.length
    trainer.remove_callback(PrinterCallback)
    if trainer.recipe.patience is not None:
        trainer.add_callback(EarlyStoppingCallback(trainer.recipe.patience))
    with loggers(work) as logs, deferred() as stop:
        own = (Clock(), FindBest(), ShowProgress(progress, tokens_per_step), StopAtBadLoss(), SaveAtSignal(stop))
        for callback in (*own, *logs):
            trainer.add_callback(callback)
        trainer.unevaluated = last if last is not None and lacks_evaluation(Path(last)) else None
        trainer.train(resume_from_checkpoint=last)
        round_weights(trainer.model, dtypes)
        return float(trainer.evaluate()["eval_loss"])


@contextmanager
def _nothing_left_on(model: PreTrainedModel) -> Iterator[None]:
    """Removes what Trainer and accelerate leave on a model: the forward with autocast, the mark that the model is
    prepared (a second run would take it for wrapped), and a config without cache and with a checkpoint's dtype.
    """
    names = ("forward", "_original_forward", "_is_accelerate_prepared")
    before = {name: vars(model)[name] for name in names if name in vars(model)}
    said = {name: getattr(model.config, name) for name in ("use_cache", "dtype") if hasattr(model.config, name)}
    try:
        yield
    finally:
        for name in names:
            vars(model).pop(name, None)
        vars(model).update(before)
        for name, value in said.items():
            setattr(model.config, name, value)


def _report(state: TrainerState, tokens_per_step: int, loss: float, seconds: float) -> HealReport:
    """The report of a run that ended; ``loss`` is the validation loss of its best trained state."""
    curve, losses = (
        [(int(entry["step"]) * tokens_per_step, float(entry[key])) for entry in state.log_history if key in entry]
        for key in ("loss", "eval_loss")
    )
    return HealReport(
        tokens=state.global_step * tokens_per_step,
        seconds=seconds,
        loss_before=losses[0][1],
        loss_trained=loss,
        loss_after=loss,
        curve=curve,
        validation=losses[:-1],  # the last entry is the best state's, whenever that was
        scalars=trajectories(state.log_history, tokens_per_step),
    )


def _arguments(
    model: PreTrainedModel, train: Rows, recipe: Recipe, work: Path, options: HealOptions
) -> TrainingArguments:
    """What transformers' Trainer is told; ``train`` holds complete steps only."""
    share = recipe.sequences // distributed.count()  # this process' rows of a step
    batch = max(size for size in range(1, min(recipe.batch, share) + 1) if share % size == 0)
    steps = math.ceil(len(train) // recipe.sequences * recipe.epochs)
    log = max(1, min(10, steps // 50))
    every = math.ceil(steps / recipe.evaluations / log) * log  # a resumed run then logs at the same steps
    constant = recipe.final_rate == recipe.learning_rate
    device = training_device(options.device)
    arguments = TrainingArguments(
        output_dir=str(work),
        per_device_train_batch_size=batch,
        per_device_eval_batch_size=batch,
        gradient_accumulation_steps=share // batch,
        max_steps=steps,
        learning_rate=recipe.learning_rate,
        lr_scheduler_type="constant_with_warmup" if constant else "cosine_with_min_lr",
        lr_scheduler_kwargs={} if constant else {"min_lr": recipe.final_rate},
        warmup_steps=min(recipe.warm_up, steps // 5),
        max_grad_norm=1.0,
        bf16=product_dtype(model, device) == torch.bfloat16,
        use_cpu=device == "cpu",
        torch_compile=options.compile,
        # accelerate would take a model evaluated earlier for a prepared one
        eval_on_start=not options.resume or lacks_evaluation(Path(last_checkpoint(work))),
        restore_callback_states_from_checkpoint=True,  # patience too
        eval_strategy="steps",
        eval_steps=every,
        save_steps=every,
        save_total_limit=2,
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
        greater_is_better=False,
        logging_steps=log,
        logging_nan_inf_filter=False,
        prediction_loss_only=True,
        dataloader_pin_memory=device != "cpu",
        ddp_find_unused_parameters=False,
        disable_tqdm=True,
        log_level="error",
        log_level_replica="error",
        report_to=[],  # ``loggers`` are added as callbacks
        seed=options.seed,
        data_seed=options.seed,
    )
    if arguments.n_gpu > 1:  # reading it finds the devices
        arguments._n_gpu = 1  # else Trainer spreads a single process over all GPUs, and each step takes more rows
    return arguments


def complete_steps(train: Rows, recipe: Recipe) -> Rows:
    """The rows that make complete steps."""
    return train.split(len(train) % recipe.sequences)[0]


def settings_of(
    model: PreTrainedModel,
    train: Rows,
    validation: Rows,
    *,
    recipe: Recipe,
    teacher: PreTrainedModel | None,
    options: HealOptions,
) -> dict[str, Any]:
    """What a resumed run has to share with the one it continues; how rows are spread over devices is free.

    ``train`` holds complete steps only. Every process has to call this: weights are those of the first.
    """
    settings = {name: value for name, value in asdict(recipe).items() if name != "batch"}
    weights: dict[str, int | None] = {}
    if distributed.is_first():
        weights = {"model": _fingerprint(model), "teacher": None if teacher is None else _fingerprint(teacher)}
    fingerprints = distributed.from_first(weights) | {
        "training text": _text_fingerprint(train),
        "validation text": _text_fingerprint(validation),
    }
    own = {"freeze": sorted(options.frozen), "seed": options.seed, "rows": len(train)}
    return settings | own | {FINGERPRINTS: fingerprints}


def _text_fingerprint(rows: Rows) -> int:
    """A checksum of all tokens."""
    return zlib.crc32(np.ascontiguousarray(rows.tokens).data)  # a file of tokens is mapped, and passes through


def _fingerprint(model: PreTrainedModel) -> int:
    """A checksum of the names, shapes and first values of all parameters."""
    checksum = 0
    for name, parameter in model.named_parameters():
        checksum = zlib.crc32(f"{name} {tuple(parameter.shape)}".encode(), checksum)
        checksum = zlib.crc32(parameter.detach().flatten()[:256].float().cpu().numpy().tobytes(), checksum)
    return checksum
