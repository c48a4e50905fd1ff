"""What a run writes to its work folder: checkpoints, its settings, logs; and what happens when the disk is full."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import PreTrainedModel, TrainerCallback
from transformers.integrations import TensorBoardCallback

from krony.errors import KronyError
from krony.runtime import distributed
from krony.storage.files import write_json
from krony.storage.tensor_files import read_json, save_beside

FINGERPRINTS = "fingerprints"  # in the settings: checksums of the model and the text
START = "start.safetensors"  # in the work folder: the parameters before training
LOGS = ("runs", "wandb")  # folders in the work folder: TensorBoard's log, and that of Weights & Biases


class LostProcessError(KronyError):
    """Another process of the same run has ended, so this one can't go on."""


def last_checkpoint(work: Path) -> str:
    """The folder of the last complete checkpoint in ``work``. Raises KronyError if there is none."""
    last = find_last(work)
    if last is None:
        raise KronyError(f"{work} holds no checkpoint: there is nothing to resume")
    return str(last)


def find_last(work: Path) -> Path | None:
    """The folder of the last complete checkpoint in ``work``, or None."""
    complete = [folder for folder in _checkpoints(work) if _is_complete(folder)]
    return max(complete, key=step_of, default=None)


def lacks_evaluation(checkpoint: Path) -> bool:
    """Whether a checkpoint was to be validated, and a signal came first."""
    state = read_json(checkpoint / "trainer_state.json")
    due = state.get("stateful_callbacks", {}).get("TrainerControl", {}).get("args", {}).get("should_evaluate", False)
    step = state["global_step"]
    return due and not any(entry["step"] == step and "eval_loss" in entry for entry in state["log_history"])


def hold_to_settings(work: Path, settings: dict[str, Any], *, resume: bool) -> None:
    """Writes down the settings of a new run, or checks that a resumed run has those it was started with.

    Raises KronyError where they differ, or where a new run would find the checkpoints of an earlier one.
    """
    file = work / "settings.json"
    if not resume:
        if last := find_last(work):
            raise KronyError(f"{work} holds {last.name} of an earlier run: resume it, or name a new folder")
        if distributed.is_first():
            work.mkdir(parents=True, exist_ok=True)
            write_json(file, settings)
        return
    before = read_json(file) if file.is_file() else settings
    for key, value in settings[FINGERPRINTS].items():
        if before.get(FINGERPRINTS, {}).get(key) != value:
            raise KronyError(f"{work} belongs to a run with another {key}: resume with the same")
    for key, value in settings.items():
        if before.get(key) != value:
            raise KronyError(
                f"{work} belongs to a run with {key} {_shown(before.get(key))}, and now it is {_shown(value)}: resume "
                "with the same options"
            )


def _shown(value: Any) -> Any:
    """A setting in a sentence: a list as its words."""
    return (", ".join(map(str, value)) or "none") if isinstance(value, list) else value


def save_start(model: PreTrainedModel, work: Path, *, all_parameters: bool = False) -> None:
    """Writes the parameters of ``model`` that train, or all, in its dtype, so that a run can give them back."""
    if distributed.is_first():
        chosen = ((name, p) for name, p in model.named_parameters() if all_parameters or p.requires_grad)
        state = {name: p.detach().contiguous() for name, p in chosen}
        save_beside(state, work / START, "the parameters before training")


def restore_start(model: PreTrainedModel, work: Path) -> None:
    """Gives the parameters of ``model`` the values that ``save_start`` wrote."""
    saved, parameters = load_file(work / START), dict(model.named_parameters())
    with torch.no_grad():
        for name, value in saved.items():
            parameters[name].copy_(value)


@contextmanager
def explain_write_errors(folder: Path) -> Iterator[None]:
    """Turns a full disk, and whatever else goes wrong in writing to ``folder``, into one sentence (KronyError).

    An incomplete checkpoint is removed, and the last complete one stays.
    """
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        reason = _why_not_written(error)
        if reason is None:
            raise
        for checkpoint in _checkpoints(folder):
            if not _is_complete(checkpoint) and distributed.is_first():
                shutil.rmtree(checkpoint, ignore_errors=True)
        last = find_last(folder)
        then = "" if last is None else f": make room, and resume from {last.name}"
        raise KronyError(f"{folder} can't be written, {reason}{then}") from error


@contextmanager
def explain_lost_processes(work: Path) -> Iterator[None]:
    """Turns the failure to reach another process of the run into one sentence (``LostProcessError``).

    The process that is gone may have been killed without a word, or have said itself what happened.
    """
    try:
        yield
    except RuntimeError as error:
        if not distributed.is_lost_connection(error):
            raise
        last = find_last(work)
        then = "there is no checkpoint yet" if last is None else f"resume from {last}, the last checkpoint"
        why = "another process of this run has, which may have said why"
        raise LostProcessError(f"process {distributed.rank()} ends because {why}; {then}") from error


@contextmanager
def loggers(work: Path) -> Iterator[list[TrainerCallback]]:
    """TensorBoard always, Weights & Biases where it is installed and set up; both write to ``work`` alone.

    By default Weights & Biases writes to the working directory, and so does TensorBoard when it logs before training
    begins. A run of Weights & Biases that the caller has started is used, and left open.
    """
    board = TensorBoardCallback()
    board.logging_dir = board.logging_dir or str(work / "runs")
    if not _wandb_is_set_up() or not distributed.is_first():
        yield [board]
        return
    import wandb
    from transformers.integrations import WandbCallback

    run = None
    if wandb.run is None:
        work.mkdir(parents=True, exist_ok=True)
        run = wandb.init(project=os.environ.get("WANDB_PROJECT", "krony"), dir=str(work))
    try:
        yield [board, WandbCallback()]
    finally:
        if run is not None:
            run.finish()


def _wandb_is_set_up() -> bool:
    """Whether it is installed, and somebody has logged in or set its mode."""
    from transformers.integrations import is_wandb_available

    if not is_wandb_available():
        return False
    import wandb

    return bool(wandb.api.api_key or os.environ.get("WANDB_MODE"))


def keep_logs(work: Path, folder: Path) -> None:
    """Copies the logs in ``work`` to ``folder``."""
    for log in LOGS:
        if (work / log).is_dir():
            shutil.copytree(work / log, folder / log, symlinks=True)  # W&B links its latest run


def _checkpoints(work: Path) -> list[Path]:
    return [path for path in work.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name)]


def step_of(checkpoint: Path) -> int:
    """The step after which a checkpoint was saved."""
    return int(checkpoint.name.rpartition("-")[2])


def _is_complete(checkpoint: Path) -> bool:
    """Whether everything was written: Trainer writes its state last."""
    try:
        json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return True


def _why_not_written(error: Exception) -> str | None:
    """Why something couldn't be written, or None where the error is about something else."""
    if isinstance(error, OSError):
        return error.strerror or str(error)
    text = str(error)
    if isinstance(error, SafetensorError):
        return text.rpartition("error: ")[2] if "I/O error" in text or "os error" in text else None
    # torch's messages when a file can't grow; they don't say why
    writing = any(words in text for words in ("PytorchStreamWriter failed", "iostream error", "inline_container"))
    return "the disk is full or its quota is used up" if writing else None
