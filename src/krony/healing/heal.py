"""Healing: train a compressed model on, with transformers' Trainer, until it is itself again.

The paper trains on OpenWebText for 3 epochs (section 4.1); with a good start and a teacher, far less will do. What is
krony's own: which parameters train and decay (``training``), the recipes (``recipes``), and the original as teacher
(``distillation``).
"""

from __future__ import annotations

import math
import os
import time
import warnings
import zlib
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import (
    EarlyStoppingCallback,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    default_data_collator,
)

from krony.data.rows import Rows
from krony.errors import KronyError, KronyWarning
from krony.healing.checkpoints import PRINTS, find_last, keep_plan, last_checkpoint, loggers, room_needed
from krony.healing.distillation import check_teacher, distil
from krony.healing.recipes import RECIPES, Recipe
from krony.healing.trainable import adamw, full_precision, trainable
from krony.models.loading import check_device, context_length
from krony.runtime import distributed
from krony.runtime.hardware import fast_dtype
from krony.runtime.progress import Progress, silent


@dataclass(frozen=True)
class HealReport:
    """What the training did. Losses are nats a token.

    ``curve`` holds tokens seen and the training loss up to there, ``validation`` tokens seen and the validation loss.
    """

    tokens: int
    seconds: float
    loss_before: float
    loss_after: float
    curve: list[tuple[int, float]] = field(default_factory=list)
    validation: list[tuple[int, float]] = field(default_factory=list)

    def to_json(self) -> dict:
        return {
            "tokens": self.tokens,
            "seconds": self.seconds,
            "perplexity_before": perplexity(self.loss_before),
            "perplexity_after": perplexity(self.loss_after),
            "curve": [list(point) for point in self.curve],
            "validation": [list(point) for point in self.validation],
        }


def heal(
    model: PreTrainedModel,
    train: Rows,
    validation: Rows,
    *,
    work: Path,
    tokenizer: PreTrainedTokenizerBase | None = None,
    recipe: Recipe = RECIPES["quick"],
    teacher: PreTrainedModel | None = None,
    freeze: str = "right",
    resume: bool = False,
    gradient_checkpointing: bool = False,
    compile: bool = False,
    device: str | None = None,
    seed: int = 0,
    progress: Progress = silent,
) -> HealReport:
    """Trains ``model`` in place, dense or compressed; it ends in its state of lowest validation loss.

    Weights are float32 meanwhile, with products in bfloat16 where that is fast, and have their own dtype again at the
    end.

    Args:
        train: rows to train on.
        validation: rows to stop by; their loss is the report's.
        work: folder for checkpoints and TensorBoard's log.
        tokenizer: is saved with every checkpoint, which is then a MODEL by itself.
        teacher: the original; the loss is then the divergence from its next-token distributions, and what else the
            recipe adds.
        freeze: what stays: ``right`` (``slim`` stays exact), ``inherited``, ``scalars``, ``embeddings``, several of
            them joined by commas, or ``none``; see ``krony.healing.trainable.trainable``.
        resume: go on from the last checkpoint in ``work``.
        device: ``cpu``, or ``cuda`` for the GPU of this process; None takes the GPU where there is one.

    Raises:
        KronyError: rows longer than the model takes, too few of them, an unknown ``freeze``, a teacher of another
            vocabulary, a batch that doesn't divide, another device, a loss that is not finite, nothing to resume or
            other options than before, a full disk. The last whole checkpoint stays in ``work``.
    """
    start = time.perf_counter()
    distributed.init(training_device(device))
    check(model, train, validation, recipe, teacher, freeze)
    tokens = train.length * recipe.sequences  # a step
    train, _ = train.split(len(train) % recipe.sequences)  # whole steps only
    with full_precision(model), trainable(model, freeze, checkpointing=gradient_checkpointing), room_needed(work):
        last = last_checkpoint(work) if resume else None
        keep_plan(work, _plan(model, recipe, train, freeze, teacher, seed), resume=resume)
        with loggers(work) as logs:
            trainer = HealingTrainer(
                recipe,
                teacher,
                model=model,
                args=_arguments(model, train, recipe, work, compile, device, resume, seed),
                data_collator=default_data_collator,
                train_dataset=train,
                eval_dataset=validation,
                processing_class=tokenizer,
                callbacks=[_Watch(progress, tokens), EarlyStoppingCallback(recipe.patience), *logs],
            )
            trainer.remove_callback(PrinterCallback)
            trainer.train(resume_from_checkpoint=last)
            after = trainer.evaluate()["eval_loss"]
        trainer.accelerator.unwrap_model(trainer.model_wrapped, keep_fp32_wrapper=False)  # leaves its autocast
    model.eval()
    history = trainer.state.log_history
    curve, losses = (
        [(int(entry["step"]) * tokens, float(entry[key])) for entry in history if key in entry]
        for key in ("loss", "eval_loss")
    )
    seconds = time.perf_counter() - start
    if after > losses[0][1] and distributed.is_first():
        warnings.warn(
            f"the validation loss went from {losses[0][1]:.3f} to {after:.3f}: train on text more like what it is "
            "validated on, on more of it, or at a lower learning rate",
            KronyWarning,
            stacklevel=2,
        )
    # the last entry is the best state's, whenever that was
    return HealReport(trainer.state.global_step * tokens, seconds, losses[0][1], after, curve, losses[:-1])


class HealingTrainer(Trainer):
    """transformers' Trainer with krony's optimizer, and a teacher where there is one."""

    def __init__(self, recipe: Recipe, teacher: PreTrainedModel | None, **options: Any) -> None:
        super().__init__(**options)
        self.recipe = recipe
        self.teacher = None if teacher is None else teacher.eval().requires_grad_(False).to(self.args.device)
        # rows are of one length, so the mean over a step is the mean of its batches' means, for any loss
        self.model_accepts_loss_kwargs = False

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """AdamW as the recipe has it."""
        if self.optimizer is None:  # type: ignore[has-type]
            self.optimizer = adamw(model or self.model, self.recipe)
        return self.optimizer

    def compute_loss(self, model: nn.Module, inputs: dict[str, Tensor], **options: Any) -> Any:
        """The cross-entropy with the text, or in training the distance from the teacher."""
        if self.teacher is None or not model.training:
            return super().compute_loss(model, inputs, **options)
        asked = {"input_ids": inputs["input_ids"], "use_cache": False, "output_hidden_states": self.recipe.hidden > 0}
        with torch.no_grad(), self.accelerator.autocast():
            wanted = self.teacher(**asked)
        outputs = model(**asked)
        loss = distil(outputs, wanted, inputs["input_ids"], self.recipe)
        return (loss, outputs) if options.get("return_outputs") else loss


class _Watch(TrainerCallback):
    """Shows where the training is, and stops it when the loss is no number."""

    def __init__(self, progress: Progress, tokens: int) -> None:
        self.progress, self.tokens = progress, tokens  # tokens a step
        self.start, self.first, self.loss = time.perf_counter(), 0, ""

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.start, self.first = time.perf_counter(), state.global_step

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        pace = (state.global_step - self.first) * self.tokens / (time.perf_counter() - self.start)
        self.progress(state.global_step, state.max_steps, f"{self.loss}{pace:,.0f} tokens/s")

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **_: Any) -> None:
        for name in ("loss", "eval_loss"):
            value = (logs or {}).get(name)
            if value is not None and not math.isfinite(value):
                raise KronyError(_no_number(name, value, state.global_step, Path(args.output_dir)))
        if logs and "loss" in logs:
            self.loss = f"loss {logs['loss']:.3f}, "


def _no_number(name: str, value: float, step: int, work: Path) -> str:
    what = {"loss": "loss", "eval_loss": "validation loss"}[name]
    if step == 0:
        return f"the {what} is {value} before any training: this model is damaged"
    last = find_last(work)
    good = "there is no checkpoint yet" if last is None else f"{last}, the last checkpoint, is a model to start from"
    return f"the {what} is {value} at step {step}: lower the learning rate; {good}"


def _arguments(
    model: PreTrainedModel,
    train: Rows,
    recipe: Recipe,
    work: Path,
    compile: bool,
    device: str | None,
    resume: bool,
    seed: int,
) -> TrainingArguments:
    share = recipe.sequences // distributed.count()  # this process' rows of a step
    batch = max(size for size in range(1, min(recipe.batch, share) + 1) if share % size == 0)
    steps = math.ceil(len(train) // recipe.sequences * recipe.epochs)
    log = max(1, min(10, steps // 50))
    every = max(1, steps // recipe.evaluations // log) * log  # a resumed run then logs what the whole one would
    constant = recipe.final_rate == recipe.learning_rate
    on_cpu = device == "cpu" or not torch.cuda.is_available()
    half = fast_dtype("cpu" if on_cpu else "cuda") == torch.bfloat16 and model.dtype == torch.float32
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
        bf16=half,
        use_cpu=on_cpu,
        torch_compile=compile,
        eval_on_start=not resume,  # not by evaluate() beforehand: accelerate would take the model as prepared, unshared
        restore_callback_states_from_checkpoint=True,  # patience goes on too
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
        dataloader_pin_memory=not on_cpu,
        ddp_find_unused_parameters=False,
        disable_tqdm=True,
        log_level="error",
        report_to=[],  # ``loggers`` knows where to
        seed=seed,
        data_seed=seed,
    )
    if arguments.n_gpu > 1:  # asked for, as it is what finds the devices
        arguments._n_gpu = 1  # else Trainer spreads a lone process over all GPUs, and a step is so many times larger
    return arguments


def training_device(device: str | None) -> str:
    """``cpu`` or ``cuda``: what healing runs on. Raises KronyError for another, or where there is no GPU."""
    if device not in (None, "cpu", "cuda"):
        raise KronyError(f"device is {device!r}: healing takes cpu or cuda, and torchrun a GPU for every process")
    if device == "cuda":
        check_device(device)
    return device or ("cuda" if torch.cuda.is_available() else "cpu")


def _plan(
    model: PreTrainedModel, recipe: Recipe, train: Rows, freeze: str, teacher: PreTrainedModel | None, seed: int
) -> dict[str, Any]:
    """What a resumed run has to share with the one that it goes on with; how rows are spread over devices is free."""
    plan = {name: value for name, value in asdict(recipe).items() if name != "batch"}
    prints = {
        "model": _fingerprint(model),
        "teacher": None if teacher is None else _fingerprint(teacher),
        "training text": zlib.crc32(np.ascontiguousarray(train.tokens[: 1 << 20]).tobytes()),
    }
    return plan | {"freeze": freeze, "seed": seed, "rows": len(train), PRINTS: prints}


def _fingerprint(model: PreTrainedModel) -> int:
    """Of the names, shapes and first values of all parameters."""
    made = 0
    for name, parameter in model.named_parameters():
        made = zlib.crc32(f"{name} {tuple(parameter.shape)}".encode(), made)
        made = zlib.crc32(parameter.detach().flatten()[:256].float().cpu().numpy().tobytes(), made)
    return made


def check(
    model: PreTrainedModel,
    train: Rows,
    validation: Rows,
    recipe: Recipe,
    teacher: PreTrainedModel | None,
    freeze: str,
) -> None:
    """Raises KronyError where ``heal`` would, as far as that can be told before it begins."""
    with trainable(model, freeze):
        pass
    if train.length > context_length(model):
        raise KronyError(f"rows of {train.length} tokens: the model takes {context_length(model)}")
    if len(train) < recipe.sequences:
        raise KronyError(f"{len(train)} rows to train on: one step of this recipe takes {recipe.sequences}")
    if recipe.sequences % distributed.count():
        raise KronyError(
            f"{recipe.sequences} sequences a step can't be shared by {distributed.count()} processes: take a multiple"
        )
    if os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true":
        raise KronyError("healing shares rows among processes, not weights: launch without FSDP")
    if not len(validation):
        raise KronyError("there is no row to validate on: give more text")
    if teacher is not None:
        check_teacher(model, teacher, recipe)


@torch.inference_mode()
def validation_loss(model: PreTrainedModel, rows: Rows) -> float:
    """The mean loss of ``model`` on ``rows``, nats a token, computed as the trainer does."""
    dtype = fast_dtype(model.device)
    with torch.autocast(model.device.type, dtype, enabled=dtype == torch.bfloat16 and model.dtype == torch.float32):
        batches = (rows[index]["input_ids"][None].to(model.device) for index in range(len(rows)))
        losses = [model(input_ids=ids, labels=ids, use_cache=False).loss.item() for ids in batches]
    return sum(losses) / len(losses)


def perplexity(loss: float) -> float:
    """Of a loss in nats a token; finite, however bad it is."""
    return math.exp(min(loss, 700.0))
