"""Processes that a test starts, forked from one that has imported torch and transformers: that takes seconds."""

from __future__ import annotations

import multiprocessing
import os
import runpy
import signal
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

LIMIT = 120  # seconds after which a process that waits for another is taken for hanging
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(
    [
        "pytest",
        "datasets",
        "transformers.trainer",
        "transformers.models.gpt2.modeling_gpt2",
        "transformers.models.llama.modeling_llama",
        "krony.cli.app",
        "krony.cli.compress_job",
        "krony.data.prepare",
        "krony.healing.heal",
    ]
)


class Process(CONTEXT.Process):
    """A process that runs ``work(*arguments, **options)``; ``work`` is a function of a module, in any file.

    What it prints goes to files in ``folder``. ``environment`` is set before the work begins.
    """

    def __init__(
        self, folder: Path, work: Callable[..., object], *arguments: Any, environment: dict[str, str] | None = None,
        **options: Any,
    ) -> None:  # fmt: skip
        super().__init__(daemon=True)
        self.folder, self.environment, self.arguments, self.options = folder, environment or {}, arguments, options
        self.work = work.__code__.co_filename, work.__name__  # pytest's modules can't be imported by name
        folder.mkdir(parents=True)
        self.start()

    def run(self) -> None:
        """What the new process does."""
        for number, name in ((1, "out"), (2, "err")):
            os.dup2(os.open(self.folder / name, os.O_WRONLY | os.O_CREAT), number)
        os.environ |= {"KRONY_CACHE": str(self.folder / "cache")} | self.environment
        torch.set_num_threads(1)
        file, name = self.work
        runpy.run_path(file)[name](*self.arguments, **self.options)
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()

    def printed(self, name: str = "out") -> str:
        """What it printed so far on stdout (``out``) or stderr (``err``)."""
        return (self.folder / name).read_text()

    def ended(self) -> tuple[int, str]:
        """Waits, and returns the exit code, as ``subprocess`` has it, and what it printed on stderr."""
        self.join(LIMIT)
        if self.is_alive():
            self.kill()
            raise AssertionError(f"still running after {LIMIT} s:\n{self.printed('err')[-2000:]}")
        return self.exitcode, self.printed("err")

    def send(self, number: signal.Signals) -> None:
        os.kill(self.pid, number)


def started(count: int, folder: Path, work: Callable[..., object], *arguments: Any, **options: Any) -> list[Process]:
    """``count`` processes that run ``work`` and know of each other, as torchrun starts them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    known = {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count)}
    known |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    processes = []
    for rank in range(count):
        environment = known | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        one = Process(folder / str(rank), work, *arguments, environment=environment if count > 1 else {}, **options)
        processes.append(one)
    return processes


def together(count: int, folder: Path, work: Callable[..., object], *arguments: Any, **options: Any) -> list[str]:
    """As ``started``, until all have ended well; what each printed."""
    processes = started(count, folder, work, *arguments, **options)
    ends = [process.ended() for process in processes]
    assert [code for code, _ in ends] == [0] * count, "\n".join(said[-2000:] for _, said in ends)
    return [process.printed() for process in processes]


def krony(*arguments: object) -> None:
    """``krony …``, as the command line starts it."""
    from krony.__main__ import start

    sys.argv = ["krony", *map(str, arguments)]
    start()
