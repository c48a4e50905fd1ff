"""How factors get their first values: one file a method, one signature (``krony.init.base.Init``)."""

from __future__ import annotations

from krony.errors import KronyError
from krony.init import neurons, prune, random, van_loan
from krony.init.base import Factors, Init, Moments, Second, Target

__all__ = ["Factors", "Init", "Moments", "Second", "Target", "get_init"]

_INITS: dict[str, Init] = {
    "neurons": neurons.initialise,
    "van-loan": van_loan.initialise,
    "prune": prune.initialise,
    "random": random.initialise,
}


def get_init(name: str) -> Init:
    """The initialisation of this name. Raises KronyError for one that this version does not have yet."""
    if name not in _INITS:
        raise KronyError(f"init {name!r} comes with a later version: this one has {', '.join(_INITS)}")
    return _INITS[name]
