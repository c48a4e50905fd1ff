"""Signals that ask a process to stop: Ctrl-C (SIGINT), SIGTERM and SIGHUP become one exception and one sentence.

A verb of the command line puts its work into ``interruptible``. A library function whose work must not stop just
anywhere puts it into ``deferred`` and asks at its safe points. Everything else needs nothing: ``Interrupt`` is a
``KeyboardInterrupt``, so ``finally`` and ``except KeyboardInterrupt`` mean all three signals.
"""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import FrameType
from typing import Any

SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))
SETTLING = 2.0  # seconds: a terminal, a launcher and a scheduler may each send a signal for one and the same stop


class Interrupt(KeyboardInterrupt):
    """A signal asked this process to stop. Raised in the main thread, inside ``interruptible`` and ``deferred``."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number


class Stopped(SystemExit):
    """The end of a command that was asked to stop.

    ``code`` is the exit code: 130 after Ctrl-C, 143 after SIGTERM, 129 after SIGHUP. ``sentence`` says what is left and
    how to resume; the command line prints it on stderr.

    Examples:
        >>> Stopped(signal.SIGTERM, "out.work holds what is done: the same command resumes there").code
        143
    """

    def __init__(self, number: int, sentence: str) -> None:
        super().__init__(128 + number)
        self.sentence = sentence


@dataclass(kw_only=True)
class _State:
    """What the handler knows. Only the main thread changes it, because only there do handlers run."""

    depth: int = 0  # blocks that are open
    deferring: int = 0  # of these, such that wait for a safe point
    first: int | None = None  # the signal that came
    since: float = 0.0  # when it came
    previous: dict[int, Any] = field(default_factory=dict)  # the handlers before ours


_state = _State()


class Pending:
    """Whether a signal waits for the next safe point."""

    def __bool__(self) -> bool:
        return threading.current_thread() is threading.main_thread() and _state.first is not None

    def check(self) -> None:
        """Raises ``Interrupt`` if a signal waits."""
        if self and _state.first is not None:
            raise Interrupt(_state.first)


@contextmanager
def interruptible(sentence: Callable[[], str]) -> Iterator[None]:
    """Inside the block SIGINT, SIGTERM and SIGHUP raise ``Interrupt``, and the block ends with ``Stopped``.

    Args:
        sentence: says what is left and how to resume. It is called after the block's own ``finally`` clauses, so it can
            look at what is on disk.

    A signal that is ignored (``nohup``) or has a handler of another program's stays so. Of blocks in each other the
    innermost says the sentence. In another thread than the main one, which gets no signals, the block is as without.

    Examples:
        >>> import os
        >>> try:
        ...     with interruptible(lambda: "nothing was written"):
        ...         os.kill(os.getpid(), signal.SIGTERM)
        ... except Stopped as stopped:
        ...     print(stopped.code, stopped.sentence)
        143 nothing was written
    """
    with _handlers():
        try:
            yield
        except KeyboardInterrupt as error:
            number = error.number if isinstance(error, Interrupt) else int(signal.SIGINT)
            raise Stopped(number, sentence()) from error


@contextmanager
def deferred() -> Iterator[Pending]:
    """Inside the block a signal waits: ask ``Pending`` at each safe point. What still waits at the end is raised there.

    A second Ctrl-C does not wait. Works with and without ``interruptible`` around it.

    Examples:
        >>> import os
        >>> steps = 0
        >>> try:
        ...     with deferred() as stop:
        ...         while not stop:
        ...             os.kill(os.getpid(), signal.SIGTERM)
        ...             steps += 1
        ...         print(f"saving a checkpoint after {steps} step")
        ... except Interrupt as interrupt:
        ...     print(interrupt)
        saving a checkpoint after 1 step
        SIGTERM
    """
    if threading.current_thread() is not threading.main_thread():
        yield Pending()
        return
    with _handlers():
        _state.deferring += 1
        try:
            yield Pending()
        finally:
            _state.deferring -= 1
        Pending().check()


@contextmanager
def _handlers() -> Iterator[None]:
    """Handles the signals inside the block; of blocks in each other the outermost puts the old handlers back."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    if _state.depth == 0:
        for number in SIGNALS:
            before = signal.getsignal(number)
            if before in (signal.SIG_DFL, signal.default_int_handler):
                _state.previous[number] = before
                signal.signal(number, _handle)
    _state.depth += 1
    try:
        yield
    finally:
        _state.depth -= 1
        if _state.depth == 0:
            for number, before in _state.previous.items():
                signal.signal(number, before)
            _state.previous.clear()
            _state.first = None


def _handle(number: int, frame: FrameType | None) -> None:
    """Raises ``Interrupt``, or notes the signal for the next safe point."""
    is_first = _state.first is None
    if is_first:
        _state.first, _state.since = number, time.monotonic()
    elif time.monotonic() - _state.since < SETTLING:
        return  # the same stop, by another sender: what tidies up is left alone
    if _state.deferring and (is_first or number != signal.SIGINT):
        return
    raise Interrupt(number)
