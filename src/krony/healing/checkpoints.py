"""What a training leaves on its way: whole checkpoints, a plan to hold a resumed run to, logs; and a full disk."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from transformers import TrainerCallback
from transformers.integrations import TensorBoardCallback

from krony.errors import KronyError
from krony.runtime import distributed
from krony.storage.files import write_json

PRINTS = "fingerprints"  # in a plan: of what is too large to be kept there
LOGS = ("runs", "wandb")  # folders in the work folder: TensorBoard's log, and Weights & Biases'


def last_checkpoint(work: Path) -> str:
    """The folder of the last whole checkpoint in ``work``. Raises KronyError if there is none."""
    last = find_last(work)
    if last is None:
        raise KronyError(f"{work} holds no checkpoint: there is nothing to resume")
    return str(last)


def find_last(work: Path) -> Path | None:
    """The folder of the last checkpoint in ``work`` that was written to its end."""
    whole = [folder for folder in _checkpoints(work) if _is_whole(folder)]
    return max(whole, key=_step, default=None)


def keep_plan(work: Path, plan: dict[str, Any], *, resume: bool) -> None:
    """Notes what a run was started with, or holds a resumed one to it. Raises KronyError where they differ, or where
    a new run would find another's checkpoints.
    """
    file = work / "plan.json"
    if not resume:
        if last := find_last(work):
            raise KronyError(
                f"{work} holds {last.name} of an earlier run: resume goes on from it, or name a new folder"
            )
        if distributed.is_first():
            work.mkdir(parents=True, exist_ok=True)
            write_json(file, plan)
        return
    before = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else plan
    for key, value in plan[PRINTS].items():
        if before.get(PRINTS, {}).get(key) != value:
            raise KronyError(f"{work} is of a run with another {key}: resume with the same")
    for key, value in plan.items():
        if before.get(key) != value:
            raise KronyError(
                f"{work} is of a run with {key} {before.get(key)}, and now it is {value}: resume with the same options"
            )


@contextmanager
def room_needed(folder: Path) -> Iterator[None]:
    """Turns a full disk, and what else can go wrong in writing to ``folder``, into one sentence; half of a checkpoint
    is removed, and the last whole one stays.
    """
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        reason = _reason(error)
        if reason is None:
            raise
        for checkpoint in _checkpoints(folder):
            if not _is_whole(checkpoint) and distributed.is_first():
                shutil.rmtree(checkpoint, ignore_errors=True)
        last = find_last(folder)
        then = "" if last is None else f": make room, and resume goes on from {last.name}"
        raise KronyError(f"{folder} can't be written, {reason}{then}") from error


@contextmanager
def loggers(work: Path) -> Iterator[list[TrainerCallback]]:
    """TensorBoard always, Weights & Biases where it is installed and set up; both write to ``work`` alone.

    By default they would write to the working directory: the one when it logs before the training begins, the other
    always. A run of Weights & Biases that the caller has begun is used, and left open.
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
    """Whether it is installed, and somebody has logged in or said what to do without."""
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


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.rpartition("-")[2])


def _is_whole(checkpoint: Path) -> bool:
    """Whether Trainer came to its end: it writes its state last."""
    try:
        json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return True


def _reason(error: Exception) -> str | None:
    """Why something couldn't be written, or None where the error is about something else."""
    if isinstance(error, OSError):
        return error.strerror or str(error)
    text = str(error)
    if isinstance(error, SafetensorError):
        return text.rpartition("error: ")[2] if "I/O error" in text or "os error" in text else None
    # torch's words when a file can't grow; they don't say why
    writing = any(words in text for words in ("PytorchStreamWriter failed", "iostream error", "inline_container"))
    return "the disk is full or its quota is used up" if writing else None
