"""How long work tells where it is: a callback, so that the library prints nothing by itself."""

from __future__ import annotations

from collections.abc import Callable

Progress = Callable[[int, int, str], None]  # done, of how many, what is being done


def silent(done: int, total: int, what: str) -> None:
    """The progress of work that nobody watches."""
