"""How to compress: the options of ``krony.compress`` and of ``krony compress``, checked where they are set."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Any

from krony.errors import KronyError

INITS = ("neurons", "als", "van-loan", "permuted", "prune", "svd", "random")
RESCALED = ("van-loan", "permuted")  # those with adaptive normalisation
CALIBRATED = ("neurons", "als", "svd")  # those that need calibration text
PRUNING = ("neurons", "prune", "als")  # those that drop neurons, als at its start: epsilon is of these
ALLOCATIONS = ("uniform", "global")


@dataclass(frozen=True)
class KronyConfig:
    """What to replace, by what, and how the factors start.

    Attributes:
        scheme: ``81M``, ``1536x768``, ``1024x256:4``, ``keep=0.5`` (see ``krony.schemes``).
        init: how the factors get their first values, one of ``INITS``.
        allocation: ``uniform`` treats every layer alike (the paper), ``global`` spends one budget where it tells.
        layers: ``all``, ``odd``, ``even``, or a zero-based inclusive range such as ``2-28``.
        modules: ``mlp``, or a regular expression searched in the names of linear layers.
        rescale: adaptive normalisation (paper, 3.3.2), of ``van-loan`` and ``permuted``.
        scalars: a trainable scalar a factor; None gives them where there is more than one factor.
        scalar_init: value the scalars start at, with the left factors divided so that the matrix stays the same.
        epsilon: entry of the right factor for what was dropped; None is the init's own (0.1 ``prune`` and the start of
            ``als``, 0 ``neurons``).
        token_weighting: weight calibration tokens by 1/‖hidden state after the layer‖².
        reinit: ``all`` draws every other weight anew too (paper, Appendix C).
        seed: of everything random.
        max_width: with ``global``, the most hidden neurons that a layer may keep.
        multiple_of: with ``global``, the neurons that a layer keeps are a multiple of it.
        reconstruct: steps of training each MLP by itself on the calibration text; 0 for none.
        tune: steps, of a sequence each, of then training all new layers together towards the original's predictions on
            that text; 0 for none.
        embedding: columns of the right factor of the input embedding (KnGPT2: 2); None leaves it whole. A tied head
            then becomes a matrix of its own.
    """

    scheme: str
    init: str = "neurons"
    allocation: str = "uniform"
    layers: str = "all"
    modules: str = "mlp"
    rescale: bool = True
    scalars: bool | None = None
    scalar_init: float | None = None
    epsilon: float | None = None
    token_weighting: bool = True
    reinit: str | None = None
    seed: int = 0
    max_width: int | None = None
    multiple_of: int | None = None
    reconstruct: int = 0
    tune: int = 0
    embedding: int | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.scheme, str):
            raise KronyError(f"scheme {self.scheme!r} is no text: write '81M', '1536x768' or 'keep=0.5'")
        _one_of("init", self.init, INITS)
        _one_of("allocation", self.allocation, ALLOCATIONS)
        _one_of("reinit", self.reinit, (None, "all"))
        if self.scalar_init is not None and self.scalars is False:
            raise KronyError("scalar_init sets the scalars, and scalars=False leaves them out: drop one of the two")
        for name in ("scalar_init", "epsilon"):
            value = getattr(self, name)
            if value is not None and not math.isfinite(value):
                raise KronyError(f"{name} is {value}: it takes a finite number")
        if self.epsilon is not None and self.init not in PRUNING:
            raise KronyError(f"epsilon is of init {', '.join(PRUNING)}, and the init is {self.init}: leave it out")
        for name in ("max_width", "multiple_of"):
            value = getattr(self, name)
            if value is not None and self.allocation != "global":
                raise KronyError(f"{name} is of allocation global, and the allocation is {self.allocation}")
            if value is not None and value < 1:
                raise KronyError(f"{name} is {value}: it takes a number of neurons from 1")
        for name in ("reconstruct", "tune"):
            if getattr(self, name) < 0:
                raise KronyError(f"{name} is {getattr(self, name)}: it takes a number of steps, 0 for none")
        if self.tune and self.reinit:
            raise KronyError("tune leads back to the original, which reinit leaves: drop one of the two")
        if self.scalar_init == 0:
            raise KronyError("scalar_init is 0: the left factors are divided by it, so it takes another number")

    @property
    def reader(self) -> str | None:
        """What of this needs calibration text, in words; None if nothing does."""
        if self.init in CALIBRATED:
            return f"init {self.init}"
        return next((name for name in ("reconstruct", "tune") if getattr(self, name)), None)

    def given(self) -> dict[str, Any]:
        """Scheme, init, seed, and every option that has not its default: what it takes to do it again."""
        values = {field.name: (getattr(self, field.name), field.default) for field in fields(self)}
        always = ("scheme", "init", "seed")
        return {name: value for name, (value, default) in values.items() if name in always or value != default}

    def has_scalars(self, factors: int) -> bool:
        """Whether a sum of ``factors`` products carries scalars (the paper: where there is more than one)."""
        if self.scalars is not None:
            return self.scalars
        return factors > 1 if self.scalar_init is None else True


def _one_of(option: str, value: str | None, known: tuple) -> None:
    if value not in known:
        raise KronyError(f"{option} {value!r} is unknown: it is one of {', '.join(str(k) for k in known)}")
