"""Several processes of one run, forked from the test's: nothing is imported again, and each one can be stopped."""

import multiprocessing
import os
import socket
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

import torch

LIMIT = 60  # seconds after which a process that waits for another is taken for hanging


class Run:
    """``count`` processes that call ``work(*arguments)``; what each one prints is in ``folder``."""

    def __init__(self, folder: Path, count: int, work: Callable[..., None], *arguments) -> None:
        torch.set_num_threads(1)  # a forked process has none of the threads of its parent
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(count)}
        shared["OMP_NUM_THREADS"] = (
            "1"  # accelerate would ask for threads, which a fork of a process with threads can't start
        )
        self.files = [folder / f"printed-{rank}.txt" for rank in range(count)]
        fork = multiprocessing.get_context("fork")
        self.processes = [
            fork.Process(
                target=_run, args=(file, shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)}, work, arguments)
            )
            for rank, file in enumerate(self.files)
        ]
        for process in self.processes:
            process.start()

    def ended(self) -> list[int | None]:
        """The exit codes of all processes; -9 of one that was killed. Fails for a process that does not end."""
        for process in self.processes:
            process.join(LIMIT)
        codes = [process.exitcode for process in self.processes]
        for process in self.processes:
            process.kill()
        assert None not in codes, f"still running: {codes}\n{self.printed()}"
        return codes

    def printed(self) -> str:
        """What all of them printed."""
        return "\n".join(file.read_text() for file in self.files if file.exists())

    def check(self) -> None:
        """Fails unless all processes ended well."""
        assert set(self.ended()) == {0}, self.printed()[-4000:]


def _run(file: Path, variables: dict[str, str], work: Callable[..., None], arguments: tuple) -> None:
    from accelerate.state import AcceleratorState, GradientState, PartialState

    for state in (AcceleratorState, GradientState, PartialState):  # the parent's, which was alone
        state._reset_state()
    os.environ.update(variables)
    with file.open("w", buffering=1) as printed:
        sys.stdout = sys.stderr = printed
        code = 1
        try:
            work(*arguments)
            code = 0
        except SystemExit as end:
            code = end.code or 0
        except BaseException:
            traceback.print_exc()
        finally:
            printed.flush()
            os._exit(code)
