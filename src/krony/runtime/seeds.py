"""Which numbers are seeds."""

from __future__ import annotations

from krony.errors import KronyError

SEEDS = 2**32  # what NumPy takes, and so transformers


def check_seed(seed: int) -> None:
    """Raises KronyError for a seed that a random generator does not take.

    Examples:
        >>> check_seed(-1)
        Traceback (most recent call last):
        krony.errors.KronyError: seed is -1: it takes a number from 0 to 4294967295
    """
    if not 0 <= seed < SEEDS:
        raise KronyError(f"seed is {seed}: it takes a number from 0 to {SEEDS - 1}")
