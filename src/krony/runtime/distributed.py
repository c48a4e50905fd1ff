"""Many processes, started by ``torchrun`` or ``accelerate launch``: who writes, and what is summed."""

from __future__ import annotations

import atexit
import os

import torch
from torch import Tensor
from torch import distributed as dist

from krony.errors import KronyError


def init(device: str = "cpu") -> str:
    """Joins the other processes, if this one was started with some, and returns the device that is this one's."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return device
    from accelerate import PartialState

    state = PartialState(cpu=device == "cpu")
    atexit.register(_leave)
    return device if device == "cpu" else str(state.device)


def _leave() -> None:
    """A process that ends without this may be taken for a crashed one."""
    if dist.is_initialized():
        dist.destroy_process_group()


def is_first() -> bool:
    """Whether this is the process that writes and prints."""
    return not dist.is_initialized() or dist.get_rank() == 0


def count() -> int:
    """How many processes there are."""
    return dist.get_world_size() if dist.is_initialized() else 1


def shard(rows: Tensor) -> Tensor:
    """This process' rows. Raises KronyError if there are fewer rows than processes."""
    if len(rows) < count():
        raise KronyError(f"{len(rows)} sequences are too few for {count()} processes: give more text")
    return rows[dist.get_rank() :: count()] if dist.is_initialized() else rows


def all_reduce_sum(sums: Tensor) -> Tensor:
    """The sum over all processes, on the device of ``sums``."""
    if not dist.is_initialized():
        return sums
    there = sums.to(_device())
    dist.all_reduce(there)
    return there.to(sums.device)


def all_agree(condition: bool) -> bool:
    """Whether the condition holds in every process."""
    return int(all_reduce_sum(torch.tensor(int(condition)))) == count()


def _device() -> str:
    """Where the processes' backend wants its tensors."""
    return "cuda" if dist.get_backend() == "nccl" else "cpu"
