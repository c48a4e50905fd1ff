"""Long work reports its progress to a callback, so that the library itself prints nothing."""

from __future__ import annotations

from collections.abc import Callable

Progress = Callable[[int, int, str], None]  # finished parts, all parts, what is being done


def silent(done: int, total: int, what: str) -> None:
    """Ignores the progress."""
