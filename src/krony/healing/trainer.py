"""transformers' Trainer with krony's optimiser, loss and validation, and what it does between two steps."""

from __future__ import annotations

import math
import signal
import time
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import (
    EarlyStoppingCallback,
    PreTrainedModel,
    Trainer,
    TrainerCallback,
    default_data_collator,
)
from transformers.trainer_callback import ExportableState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, EvalLoopOutput

from krony.errors import KronyError
from krony.healing.checkpoints import find_last
from krony.healing.distillation import distil
from krony.healing.flops import peak, training_flops
from krony.healing.recipes import Recipe
from krony.healing.scalars import log_of
from krony.healing.trainable import adamw
from krony.healing.validation import validation_loss
from krony.models.comparison import Comparison, plain_heads
from krony.runtime import distributed
from krony.runtime.progress import Progress
from krony.runtime.signals import Interrupt, Pending


class HealingTrainer(Trainer):
    """transformers' Trainer with krony's optimiser, an exact validation loss, and a teacher if there is one."""

    def __init__(self, recipe: Recipe, teacher: PreTrainedModel | None, **options: Any) -> None:
        super().__init__(data_collator=default_data_collator, **options)
        self.recipe = recipe
        self.stop = Pending()
        self.unevaluated: str | None = None  # the checkpoint that a run resumes from, if it was to be evaluated first
        self.teacher = None if teacher is None else teacher.eval().to(self.args.device)
        self.comparison = None
        if self.teacher is not None:
            self.comparison = Comparison(plain_heads(self.model, self.teacher), self.half)
        # all rows have one length, so the mean over a step is the mean of its batches' means, for any loss
        self.model_accepts_loss_kwargs = False
        self.flops_per_token = training_flops(self.model, self.teacher, self.train_dataset.length)
        self.peak = peak(self.args.device, bf16=self.args.bf16)
        self.logged: tuple[float, int] | None = None  # when the last loss was logged, and at which step

    def log(self, logs: dict[str, float], *arguments: Any) -> None:
        """Adds to a loss every scalar, the FLOP/s since the last one, and as ``mfu`` their share of a known peak.

        Time in which the model is validated and saved counts too. Scalars are also logged before the first step.
        """
        if "loss" in logs or self.state.global_step == 0:
            logs |= log_of(self.model)
        if "loss" in logs and self.logged is not None:
            now, (before, step) = time.perf_counter(), self.logged
            steps, self.logged = self.state.global_step - step, (now, self.state.global_step)
            flops = steps * self.recipe.sequences * self.train_dataset.length * self.flops_per_token / (now - before)
            logs["flops_per_s"] = flops
            if self.peak is not None:
                logs["mfu"] = flops / (self.peak * distributed.count())
        super().log(logs, *arguments)

    @property
    def half(self) -> torch.dtype | None:
        """The dtype of matrix products, if it isn't that of the weights."""
        return torch.bfloat16 if self.args.bf16 else None

    def finish(self) -> None:
        """Leaves the best state in the model that the caller gave: here it is there already."""

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """AdamW with the recipe's learning rates and decay."""
        if self.optimizer is None:  # type: ignore[has-type]
            self.optimizer = adamw(model or self.model, self.recipe)
        return self.optimizer

    def get_batch_samples(self, *arguments: Any) -> Any:
        """None where the run is complete: one that is resumed from its last state takes no step."""
        if self.is_complete:
            control = self.control  # as the last checkpoint left it, which is not to be written again
            control.should_training_stop = True
            control.should_log = control.should_evaluate = control.should_save = False
            return [], None
        return super().get_batch_samples(*arguments)

    @property
    def is_complete(self) -> bool:
        """Whether all steps are made, or training stopped early."""
        stops = [each for each in self.callback_handler.callbacks if isinstance(each, EarlyStoppingCallback)]
        out_of_patience = any(each.early_stopping_patience_counter >= each.early_stopping_patience for each in stops)
        return out_of_patience or self.state.global_step >= self.state.max_steps

    @property
    def seconds(self) -> float:
        """How long the run has taken, with what it took before it was resumed."""
        return next(each.seconds for each in self.callback_handler.callbacks if isinstance(each, Clock))

    def compute_loss(self, model: nn.Module, inputs: dict[str, Tensor], **options: Any) -> Any:
        """The cross-entropy with the text, or in training the distance from the teacher."""
        if self.logged is None and model.training:  # a resumed run begins at another step than 0
            self.logged = (time.perf_counter(), self.state.global_step)
        if self.teacher is None or self.comparison is None or not model.training:
            return super().compute_loss(model, inputs, **options)
        asked = {"input_ids": inputs["input_ids"], "use_cache": False, "output_hidden_states": self.recipe.hidden > 0}
        with self.comparison.headless():
            with torch.no_grad(), self.accelerator.autocast():
                wanted = self.teacher(**asked)
            outputs = model(**asked)
        return distil(outputs, wanted, inputs["input_ids"], self.recipe, self.comparison)

    def evaluation_loop(
        self, dataloader: DataLoader[Any], description: str, *_: Any, metric_key_prefix: str = "eval", **__: Any
    ) -> EvalLoopOutput:
        """The validation loss. Trainer's own repeats rows until every process has a full batch, and counts them."""
        self.model.eval()
        rows = self.eval_dataset
        loss = validation_loss(self.model, rows, batch=self.args.per_device_eval_batch_size, check=self._check)
        return EvalLoopOutput(None, None, {f"{metric_key_prefix}_loss": loss}, len(rows))

    def _check(self) -> None:
        """Asked to stop while it validates, it saves what is trained without: there may be seconds left.

        A checkpoint that lacks its validation gets it when the run resumes, so nothing is saved before that is made up.
        """
        if distributed.all_agree(not self.stop):
            return
        if self.is_in_train and self.state.global_step and self.unevaluated is None:
            self._save_checkpoint(self.model, trial=None)
        end_all(self.stop)

    def evaluate(self, *args: Any, **options: Any) -> dict[str, float]:
        """Also finds out whether the checkpoint that a run resumes from is the best, if nothing could tell before."""
        metrics = super().evaluate(*args, **options)
        if self.unevaluated is not None:
            if self._determine_best_metric(metrics, trial=None):
                self.state.best_model_checkpoint = self.unevaluated
            self.unevaluated = None
        return metrics


class ShowProgress(TrainerCallback):
    """Tells ``progress`` the step, the loss and the tokens per second."""

    def __init__(self, progress: Progress, tokens_per_step: int) -> None:
        self.progress, self.tokens_per_step = progress, tokens_per_step
        self.start, self.first_step, self.loss = time.perf_counter(), 0, ""

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.start, self.first_step = time.perf_counter(), state.global_step

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        tokens = (state.global_step - self.first_step) * self.tokens_per_step
        pace = tokens / (time.perf_counter() - self.start)
        self.progress(state.global_step, state.max_steps, f"{self.loss}{pace:,.0f} tokens/s")

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **_: Any) -> None:
        if logs and "loss" in logs:
            used = f" ({logs['mfu']:.0%} of the peak)" if "mfu" in logs else ""
            self.loss = f"loss {logs['loss']:.3f}, {logs['flops_per_s'] / 1e12:.3g} TFLOP/s{used}, "


class Clock(TrainerCallback, ExportableState):
    """Counts the seconds of a run; checkpoints keep them."""

    def __init__(self) -> None:
        self.start, self.before = time.perf_counter(), 0.0

    @property
    def seconds(self) -> float:
        """Those of this process, and before it was resumed."""
        return self.before + time.perf_counter() - self.start

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        # checkpoints of earlier versions lack it, and Trainer takes for granted that it is there
        state.stateful_callbacks.setdefault(type(self).__name__, self.state())

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {"args": {}, "attributes": {"before": self.seconds}}


class FindBest(TrainerCallback):
    """Lets a resumed run find its best checkpoint, also where the work folder was moved."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if not state.best_global_step:
            return
        best = Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.best_global_step}"
        if not best.is_dir():
            raise KronyError(f"{best} is missing, the best checkpoint of this run: train again, into another folder")
        state.best_model_checkpoint = str(best)


class StopAtBadLoss(TrainerCallback):
    """Raises KronyError when a loss is not a finite number."""

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **_: Any) -> None:
        for key, name in (("loss", "loss"), ("eval_loss", "validation loss")):
            value = (logs or {}).get(key)
            if value is None or math.isfinite(value):
                continue
            if state.global_step == 0:
                raise KronyError(f"the {name} is {value} before any training: this model is damaged")
            last = find_last(Path(args.output_dir))
            then = "there is no checkpoint yet"
            if last is not None:
                then = f"{last}, the last checkpoint, is a model to start from"
            raise KronyError(f"the {name} is {value} at step {state.global_step}: lower the learning rate; {then}")


class SaveAtSignal(TrainerCallback):
    """Saves a checkpoint after the step in which a signal came to any process, and ends the run in all of them."""

    def __init__(self, stop: Pending) -> None:
        self.stop, self.stopping = stop, False

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if not distributed.all_agree(not self.stop):
            self.stopping = control.should_save = control.should_log = True

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.stopping:
            end_all(self.stop)


def end_all(stop: Pending) -> NoReturn:
    """Raises Interrupt in all processes, after the first one has written."""
    distributed.all_agree(True)  # no process ends while the first one writes
    stop.check()
    raise Interrupt(signal.SIGTERM)  # the signal came to another process
