"""How factors get their first values: one file a method, one signature (``krony.init.base.Init``)."""

from __future__ import annotations

from krony.init import als, neurons, permuted, prune, random, svd, van_loan
from krony.init.base import Factors, Init, Moments, Second, Target

__all__ = ["Factors", "Init", "Moments", "Second", "Target", "get_init"]

_INITS: dict[str, Init] = {
    "neurons": neurons.initialise,
    "van-loan": van_loan.initialise,
    "permuted": permuted.initialise,
    "als": als.initialise,
    "prune": prune.initialise,
    "svd": svd.initialise,
    "random": random.initialise,
}


def get_init(name: str) -> Init:
    """The initialisation of this name, one of ``krony.config.INITS``."""
    return _INITS[name]
