"""The list of initialisations. Each has one file and one record; only this module names them all."""

from __future__ import annotations

from krony.errors import KronyError
from krony.init.als import ALS
from krony.init.base import Initialisation
from krony.init.flap import FLAP
from krony.init.magnitude import MAGNITUDE
from krony.init.neurons import NEURONS
from krony.init.permuted import PERMUTED
from krony.init.prune import PRUNE
from krony.init.random import RANDOM
from krony.init.random_neurons import RANDOM_NEURONS
from krony.init.svd import SVD
from krony.init.van_loan import VAN_LOAN
from krony.init.wanda import WANDA

INITIALISATIONS: dict[str, Initialisation] = {
    init.name: init
    for init in (NEURONS, ALS, VAN_LOAN, PERMUTED, PRUNE, SVD, RANDOM, FLAP, WANDA, MAGNITUDE, RANDOM_NEURONS)
}


def find_initialisation(name: str) -> Initialisation:
    """The initialisation of this name. Raises KronyError for an unknown name.

    Examples:
        >>> find_initialisation("neurons").needs_text, find_initialisation("van-loan").needs_text
        (True, False)
    """
    try:
        return INITIALISATIONS[name]
    except (KeyError, TypeError):
        raise KronyError(f"init {name!r} is unknown: it is one of {', '.join(INITIALISATIONS)}") from None
