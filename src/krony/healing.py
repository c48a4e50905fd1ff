"""Healing: train a compressed model on, with transformers' Trainer, until it is itself again.

The paper trains on OpenWebText for 3 epochs (section 4.2); with a good start and a teacher, far less will do. What is
krony's own here: which parameters train and decay, the recipes, and the original as teacher.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    EarlyStoppingCallback,
    PreTrainedModel,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)
from transformers.trainer_utils import get_last_checkpoint

from krony import ranks
from krony.errors import KronyError
from krony.hardware import fast_dtype
from krony.models import context_length
from krony.progress import Progress, silent
from krony.rows import Rows
from krony.surgery import kronecker_layers

FREEZE = ("none", "right", "inherited")
EVALUATIONS = 10  # of the validation loss, spread over a run; a checkpoint goes with each


@dataclass(frozen=True)
class Recipe:
    """How to train.

    Attributes:
        sequences: rows a step, over all processes and accumulation steps.
        batch: rows at once on one device; the rest is accumulated.
        length: tokens a row.
        learning_rate: the highest; a cosine leads to ``final_rate``, or it is constant if they are equal.
        warm_up: steps, at most a fifth of all.
        epochs: passes over the data.
        patience: evaluations without a gain before it stops. A short run needs its last, small steps, so that it has
            as much patience as there are evaluations; the best state is kept in any case.
        weight_decay: of the factors; nothing else decays (section 4.2).
    """

    sequences: int
    batch: int
    length: int
    learning_rate: float
    final_rate: float
    warm_up: int
    epochs: float
    patience: int = 3
    weight_decay: float = 0.1


RECIPES = {
    "quick": Recipe(4, 4, 512, 5e-4, 5e-6, 50, 1.0, patience=EVALUATIONS),
    "paper": Recipe(120, 24, 1024, 6e-5, 6e-6, 500, 3.0),  # 5 accumulation steps of 24 sequences
    "paper-final": Recipe(320, 20, 1024, 6e-6, 6e-6, 0, 1.0),  # from the best checkpoint of ``paper``
}


@dataclass(frozen=True)
class HealReport:
    """What the training did. Losses are nats a token; ``curve`` holds tokens seen and the training loss up to there."""

    tokens: int
    seconds: float
    loss_before: float
    loss_after: float
    curve: list[tuple[int, float]] = field(default_factory=list)

    def to_json(self) -> dict:
        return {
            "tokens": self.tokens,
            "seconds": self.seconds,
            "perplexity_before": math.exp(min(self.loss_before, 700.0)),
            "perplexity_after": math.exp(min(self.loss_after, 700.0)),
            "curve": [list(point) for point in self.curve],
        }


def heal(
    model: PreTrainedModel,
    train: Rows,
    validation: Rows,
    *,
    work: Path,
    recipe: Recipe = RECIPES["quick"],
    teacher: PreTrainedModel | None = None,
    freeze: str = "right",
    resume: bool = False,
    factor_rate: float | None = None,
    gradient_checkpointing: bool = False,
    compile: bool = False,
    device: str | None = None,
    seed: int = 0,
    progress: Progress = silent,
) -> HealReport:
    """Trains ``model`` in place, dense or compressed; it ends in its state of lowest validation loss.

    Args:
        train: rows to train on.
        validation: rows to stop by; their loss is the report's.
        work: folder for checkpoints and TensorBoard's log.
        teacher: the original; the loss is then the divergence from its next-token distributions.
        freeze: ``right`` keeps right factors (``slim`` stays exact), ``inherited`` all but the factors, ``none``
            nothing.
        resume: go on from the last checkpoint in ``work``.
        factor_rate: the factors' own learning rate; the recipe's by default.
        device: ``cpu`` keeps it off an accelerator; None takes what Trainer finds.

    Raises:
        KronyError: rows longer than the model takes, too few of them, an unknown ``freeze``, a teacher of another
            vocabulary, a batch that doesn't divide, a loss that is not finite, nothing to resume.
    """
    start = time.perf_counter()
    ranks.join(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    _check(model, train, validation, recipe, teacher, freeze)
    tokens = train.length * recipe.sequences  # a step
    train, _ = train.split(len(train) % recipe.sequences)  # whole steps only
    with _trainable(model, freeze, gradient_checkpointing):
        trainer = HealingTrainer(
            model=model,
            args=_arguments(model, train, recipe, work, compile, device, resume, seed),
            train_dataset=train,
            eval_dataset=validation,
            optimizers=(_optimizer(model, recipe, factor_rate), None),
            callbacks=[_Watch(progress, tokens), EarlyStoppingCallback(recipe.patience)],
        )
        trainer.remove_callback(PrinterCallback)
        trainer.teacher = None if teacher is None else teacher.eval().requires_grad_(False).to(trainer.args.device)
        trainer.train(resume_from_checkpoint=last_checkpoint(work) if resume else None)
        after = trainer.evaluate()["eval_loss"]
        trainer.accelerator.unwrap_model(trainer.model_wrapped, keep_fp32_wrapper=False)  # leaves its autocast
    model.eval()
    history = trainer.state.log_history
    before = next(entry["eval_loss"] for entry in history if "eval_loss" in entry)
    curve = [(int(entry["step"]) * tokens, float(entry["loss"])) for entry in history if "loss" in entry]
    return HealReport(trainer.state.global_step * tokens, time.perf_counter() - start, before, after, curve)


class HealingTrainer(Trainer):
    """transformers' Trainer, with a teacher where there is one."""

    teacher: PreTrainedModel | None = None

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        # rows are of one length, so the mean over a step is the mean of its batches' means, for any loss
        self.model_accepts_loss_kwargs = False

    def compute_loss(self, model: nn.Module, inputs: dict[str, Tensor], **options: Any) -> Any:
        """The cross-entropy with the text, or in training the divergence from the teacher."""
        if self.teacher is None or not model.training:
            return super().compute_loss(model, inputs, **options)
        with torch.no_grad():
            wanted = self.teacher(input_ids=inputs["input_ids"], use_cache=False).logits
        outputs = model(input_ids=inputs["input_ids"], use_cache=False)
        loss = divergence(outputs.logits, wanted)
        return (loss, outputs) if options.get("return_outputs") else loss


def divergence(logits: Tensor, wanted: Tensor) -> Tensor:
    """Mean over tokens of KL(teacher ‖ student), nats; both ``(..., vocabulary)`` in any dtype."""
    student, teacher = (x.flatten(0, -2).float().log_softmax(-1) for x in (logits, wanted))
    return F.kl_div(student, teacher, reduction="batchmean", log_target=True)


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
        loss = (logs or {}).get("loss")
        if loss is None:
            return
        if not math.isfinite(loss):
            raise KronyError(
                f"the loss is {loss} at step {state.global_step}: lower the learning rate; "
                f"the last good checkpoint is in {args.output_dir}"
            )
        self.loss = f"loss {loss:.3f}, "


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
    batch = min(recipe.batch, recipe.sequences)
    together = batch * ranks.count()
    if recipe.sequences % together:
        raise KronyError(f"{recipe.sequences} sequences a step can't be shared by {together} at once: lower the batch")
    steps = math.ceil(len(train) // recipe.sequences * recipe.epochs)
    log = max(1, min(10, steps // 50))
    every = max(1, steps // EVALUATIONS // log) * log  # a resumed run then logs what the whole one would
    constant = recipe.final_rate == recipe.learning_rate
    on_cpu = device == "cpu" or not torch.cuda.is_available()
    half = fast_dtype("cpu" if on_cpu else "cuda") == torch.bfloat16 and model.dtype == torch.float32
    return TrainingArguments(
        output_dir=str(work),
        per_device_train_batch_size=batch,
        per_device_eval_batch_size=batch,
        gradient_accumulation_steps=recipe.sequences // together,
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
        report_to=_loggers(),
        seed=seed,
        data_seed=seed,
    )


def _loggers() -> list[str]:
    """TensorBoard always, Weights & Biases where it is installed."""
    from transformers.integrations import is_wandb_available

    return ["tensorboard", *(["wandb"] if is_wandb_available() else [])]


def _optimizer(model: PreTrainedModel, recipe: Recipe, factor_rate: float | None) -> torch.optim.Optimizer:
    """AdamW; factors decay and may have a rate of their own, what was inherited and scalars don't decay."""
    layers = kronecker_layers(model).values()
    factors = {id(p) for layer in layers for p in (layer.weight, layer.right)}
    training = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {
            "params": [p for p in training if id(p) in factors],
            "weight_decay": recipe.weight_decay,
            "lr": factor_rate or recipe.learning_rate,
        },
        {"params": [p for p in training if id(p) not in factors], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW([g for g in groups if g["params"]], lr=recipe.learning_rate, betas=(0.9, 0.95))


@contextmanager
def _trainable(model: PreTrainedModel, freeze: str, checkpointing: bool) -> Iterator[None]:
    """Freezes what stays, and leaves dropout out: there is too little text to waste."""
    layers = kronecker_layers(model).values()
    factors = {id(p) for layer in layers for p in (layer.weight, layer.right, layer.scalars)}
    rights = {id(layer.right) for layer in layers}
    before = [(p, p.requires_grad) for p in model.parameters()]
    rates = [(m, m.p) for m in model.modules() if isinstance(m, nn.Dropout)]
    for parameter, _ in before:
        frozen = id(parameter) in rights if freeze == "right" else id(parameter) not in factors
        parameter.requires_grad_(freeze == "none" or not frozen)
    for module, _ in rates:
        module.p = 0.0
    if checkpointing:
        model.gradient_checkpointing_enable()
    logger = logging.getLogger("transformers.trainer")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
        if checkpointing:
            model.gradient_checkpointing_disable()
        for parameter, required in before:
            parameter.requires_grad_(required)
        for module, rate in rates:
            module.p = rate


def _check(
    model: PreTrainedModel,
    train: Rows,
    validation: Rows,
    recipe: Recipe,
    teacher: PreTrainedModel | None,
    freeze: str,
) -> None:
    if freeze not in FREEZE:
        raise KronyError(f"freeze {freeze!r} is unknown: it is one of {', '.join(FREEZE)}")
    if freeze == "inherited" and not kronecker_layers(model):
        raise KronyError("freeze inherited leaves a dense model nothing to train: take none")
    if train.length > context_length(model):
        raise KronyError(f"rows of {train.length} tokens: the model takes {context_length(model)}")
    if len(train) < recipe.sequences:
        raise KronyError(f"{len(train)} rows to train on: one step of this recipe takes {recipe.sequences}")
    if not len(validation):
        raise KronyError("there is no row to validate on: give more text")
    if teacher is not None and teacher.config.vocab_size != model.config.vocab_size:
        ours, theirs = model.config.vocab_size, teacher.config.vocab_size
        raise KronyError(f"the teacher knows {theirs} tokens and the model {ours}: it is no model of the same kind")


def last_checkpoint(work: Path) -> str:
    """The folder of the last checkpoint in ``work``. Raises KronyError if there is none."""
    last = get_last_checkpoint(str(work)) if work.is_dir() else None
    if last is None:
        raise KronyError(f"{work} holds no checkpoint: there is nothing to resume")
    return last
