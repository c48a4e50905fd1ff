"""Several processes that ``torchrun`` or ``accelerate launch`` started: which one writes, and sums over all of them."""

from __future__ import annotations

import atexit
import os
import warnings
from collections.abc import Callable, Mapping
from datetime import timedelta
from typing import TypeVar

import torch
from torch import Tensor
from torch import distributed as dist

from krony.errors import KronyError, KronyWarning

Value = TypeVar("Value")
PATIENCE = timedelta(minutes=30)  # how long a process waits for the others, of which the first may load a large model
LAYER_PATIENCE = timedelta(hours=6)  # the same where another may compute the factors of a large layer meanwhile
LOST = "another process of this run has ended, or can't be reached: what it printed says why"
FSDP = "ACCELERATE_USE_FSDP"
_taken = False  # the launcher has asked for FSDP


def init(device: str = "cpu", *, shards: bool = False, patience: timedelta = PATIENCE) -> str:
    """Connects to the other processes, if there are any, and returns this process's own device.

    From then on no process waits longer than ``patience`` for the others.

    Args:
        device: where the process computes, as ``--device`` says it.
        shards: whether the work can be done on shards. Otherwise a warning says so where the launcher asks for them.
        patience: more than the processes' work differs between two moments at which they meet.

    Examples:
        >>> init("cpu")
        'cpu'
    """
    if launched() == 1:
        return device
    _take_request_for_shards()
    from accelerate import PartialState

    state = PartialState(cpu=device == "cpu", timeout=patience)
    atexit.register(_leave)
    if asks_for_shards() and not shards and is_first():
        warnings.warn(
            f"{FSDP} asks for shards, and krony heal alone works on them: here every process holds the whole model, as "
            "under torchrun",
            KronyWarning,
            stacklevel=2,
        )
    return device if device == "cpu" else str(state.device)


def _leave() -> None:
    """Disconnects at exit: the others may take a process that ends without this for a crashed one."""
    if dist.is_initialized():
        dist.destroy_process_group()


def is_first() -> bool:
    """Whether this is the process that writes files and prints."""
    return rank() == 0


def asks_for_shards() -> bool:
    """Whether the launcher asks for FSDP: ``ACCELERATE_USE_FSDP`` is, or was before ``init``, anything but off.

    accelerate itself takes ``true`` alone and only on accelerators, so that ``1`` would be ignored without a word.
    """
    word = os.environ.get(FSDP, "").strip().lower()
    return _taken or word not in ("", "0", "false", "no", "n", "off", "f")


def _take_request_for_shards() -> None:
    """Remembers that the launcher asks for FSDP, and hides it from accelerate and transformers.

    They would shard by a policy of their own, on accelerators only, and load weights in the first process alone.
    """
    global _taken
    if asks_for_shards():
        _taken = True
        os.environ[FSDP] = "false"


def from_first(value: Value) -> Value:
    """The value that the first process has. Every process has to call this."""
    return from_process(0, value)


def in_first(work: Callable[[], Value]) -> Value | None:
    """What ``work`` returns in the first process; None in the others, which wait. Every process has to call this.

    Raises KronyError in all of them where ``work`` raises it in the first.

    Examples:
        >>> in_first(lambda: 1 + 1)  # there is one process
        2
    """
    value: Value | None = None
    mistake: KronyError | None = None
    if is_first():
        try:
            value = work()
        except KronyError as error:
            mistake = error
    if mistake := from_first(mistake):
        raise mistake
    return value


def from_process(number: int, value: Value) -> Value:
    """The value that the process of this number has; it can be pickled. Every process has to call this."""
    values = [value]
    if dist.is_initialized():
        dist.broadcast_object_list(values, src=number, device=torch.device(device()))
    return values[0]


def does(task: int) -> bool:
    """Whether this process does the task of this number, where the processes take turns.

    Examples:
        >>> does(3)  # there is one process, which does them all
        True
    """
    return task % count() == rank()


def result_of(task: int, own: Mapping[int, Value]) -> Value:
    """The result of a task, from the process that did it. Every process has to call this.

    ``own``: the results of this process's tasks.
    """
    return from_process(task % count(), own.get(task))  # type: ignore[return-value]


def rank() -> int:
    """The number of this process, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def launched() -> int:
    """The number of processes that a launcher has started, also before ``init``."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def count() -> int:
    """The number of processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


def shard(rows: Tensor) -> Tensor:
    """This process's share of the rows, every ``count()``-th. Raises KronyError if there are fewer than processes.

    Examples:
        >>> shard(torch.arange(3))
        tensor([0, 1, 2])
    """
    if len(rows) < count():
        raise KronyError(f"{len(rows)} sequences are too few for {count()} processes: give more text")
    return rows[rank() :: count()]


def all_reduce_sum(sums: Tensor) -> Tensor:
    """The elementwise sum over all processes, with the shape, dtype and device of ``sums``."""
    if not dist.is_initialized():
        return sums
    there = sums.to(device())
    dist.all_reduce(there)
    return there.to(sums.device)


def is_lost_connection(error: RuntimeError) -> bool:
    """Whether ``error`` says that another process can't be reached; gloo has no class of its own for it."""
    return dist.is_initialized() and (isinstance(error, dist.DistError) or "gloo" in str(error).lower())


def all_agree(condition: bool) -> bool:
    """Whether the condition holds in every process."""
    return int(all_reduce_sum(torch.tensor(int(condition)))) == count()


def device() -> str:
    """The kind of device on which the processes' backend takes tensors."""
    return "cuda" if dist.get_backend() == "nccl" else "cpu"
