"""What a training does between two steps: it says how far it is, counts its time, and stops where it has to."""

from __future__ import annotations

import math
import signal
import time
from pathlib import Path
from typing import Any, NoReturn

from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from krony.errors import KronyError
from krony.healing.checkpoints import find_last
from krony.runtime import distributed
from krony.runtime.progress import Progress
from krony.runtime.signals import Interrupt, Pending


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
