"""transformers' Trainer with krony's optimiser, loss and validation."""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import (
    EarlyStoppingCallback,
    PreTrainedModel,
    Trainer,
    default_data_collator,
)
from transformers.trainer_utils import EvalLoopOutput

from krony.healing.callbacks import Clock, end_all
from krony.healing.distillation import distil
from krony.healing.flops import peak, training_flops
from krony.healing.recipes import Recipe
from krony.healing.scalars import log_of
from krony.healing.trainable import adamw
from krony.healing.validation import validation_loss
from krony.models.comparison import Comparison, plain_heads
from krony.runtime import distributed
from krony.runtime.signals import Pending


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
        """No batch where the run is complete: one that is resumed from its last state takes no step."""
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
