"""How to compress: the options of ``krony.compress`` and of ``krony compress``, checked where they are set."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import InitVar, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from krony.errors import KronyError
from krony.kronecker.layer_schemes import LayerSchemes, is_file
from krony.options import option
from krony.runtime.seeds import check_seed

if TYPE_CHECKING:
    from krony.init.base import Initialisation

ALLOCATIONS = ("uniform", "global")
TUNE_TEXT = 0.5  # of the loss
# Options that belong together, by how much time they take: minutes, and then a training on the calibration text.
EFFORTS: dict[str, dict[str, Any]] = {
    "start": {"allocation": "global"},
    "tuned": {"allocation": "global", "tune": 240, "tune_all": True},
    "best": {"allocation": "global", "tune": 720, "tune_all": True},
}


@dataclass(frozen=True)
class KronyConfig:
    """What to replace, by what, and how the factors start.

    Every attribute is an option of ``krony compress``; ``krony compress --help`` explains each in one sentence.

    Attributes:
        scheme: the size: ``81M``, ``1536x768``, ``1024x256:4``, ``keep=0.5`` (see ``krony.kronecker.schemes``). Or one
            per layer: a mapping of patterns of layer names to schemes, such as ``{"transformer.h.*.mlp": "keep=0.5",
            "transformer.h.0": "dense"}``, or a YAML file that holds one (see ``krony.kronecker.layer_schemes``). It
            says which layers are replaced, so ``modules`` and ``layers`` keep their defaults.
        init: how the factors get their first values, one of ``krony.init.registry.INITIALISATIONS``.
        allocation: ``uniform`` treats all layers the same (the paper); ``global`` shares one budget among the layers
            by what the loss needs.
        layers: ``all``, ``odd``, ``even``, or a zero-based inclusive range such as ``2-28``.
        modules: ``mlp``, or a regular expression searched in the names of linear layers.
        split_attention: split attention matrices that hold Q, K and V in one, as GPT-2's ``c_attn`` does, into three
            layers before anything is chosen; their names end in ``.q``, ``.k`` and ``.v``.
        rescale: adaptive normalisation (paper, 3.3.2) for ``van-loan`` and ``permuted``.
        scalars: a trainable scalar per factor; None adds them where there is more than one factor.
        scalar_init: value the scalars start at; the left factors are divided by it, so that the matrix stays the same.
        epsilon: entry of the right factor for dropped neurons; None is the initialisation's own value.
        token_weighting: weight calibration tokens by 1/‖hidden state after the layer‖².
        reinit: ``all`` draws every other weight, and every bias, at random too (paper, Appendix C).
        seed: seed of everything random.
        max_width: with ``global``, the most hidden neurons that a layer may keep.
        multiple_of: with ``global``, the number of neurons that a layer keeps is a multiple of it.
        reconstruct: steps of training each MLP separately on the calibration text; 0 for none.
        tune: steps, one sequence per step, of then training all new layers together towards the original's predictions
            on that text; 0 for none.
        tune_text: in this training, the share of the loss that is the cross-entropy with the text itself, from 0 to 1;
            the divergence from the original's predictions has the rest.
        tune_all: this training also changes the weights that are not replaced: attention, norms, everything but the
            embeddings and a head that is tied to them.
        embedding: columns of the right factor of the input embedding (KnGPT2: 2); None leaves it dense. A tied head
            then becomes a matrix of its own.

    Args:
        keep: the fraction of hidden neurons to keep, instead of a scheme: ``keep=0.5`` is ``scheme="keep=0.5"``.

    Raises:
        KronyError: an unknown value, or options that exclude each other.

    Examples:
        >>> KronyConfig(keep=0.5).scheme
        'keep=0.5'
        >>> KronyConfig("1536x768", init="van-loan").has_scalars(factors=1)
        False
    """

    scheme: str | Mapping[str, str] | LayerSchemes = option(
        "",
        "Size: 81M, 96M (GPT-2 124M only), 1536x768, 1024x256:4 or keep=0.5. krony schemes MODEL lists them. Or "
        "FILE.yaml, which says it per layer.",
        show_default=False,
        type=str,
    )
    init: str = option(
        "neurons",
        "How factors start: neurons, als, van-loan, permuted, prune, svd, random, flap, wanda, magnitude or "
        "random-neurons.",
    )
    allocation: str = option(
        "uniform", "uniform: the same size for every layer. global: one budget, shared by what the loss needs."
    )
    layers: str = option("all", "all, odd, even, or a zero-based inclusive range such as 2-28.")
    modules: str = option("mlp", "mlp, or a regular expression that matches names of linear layers.")
    split_attention: bool = option(
        False, "Split attention matrices that hold Q, K and V in one, such as GPT-2's c_attn: each has its own factors."
    )
    rescale: bool = option(True, "Adaptive normalisation; for van-loan and permuted.")
    scalars: bool | None = option(None, "One trainable scalar per factor.", show_default="if more than one factor")
    scalar_init: float | None = option(None, "Value the scalars start at; the matrix stays the same.")
    epsilon: float | None = option(
        None, "Entry of the right factor for dropped neurons.", show_default="0.1 for prune and als, 0 for neurons"
    )
    token_weighting: bool = option(True, "Weight tokens by 1/|hidden state|², so that a few huge ones don't dominate.")
    reinit: str | None = option(None, "all: draw every other weight and bias at random too.")
    seed: int = option(0, "Seed of everything random.")
    max_width: int | None = option(None, "With --allocation global: a layer keeps at most N neurons.", metavar="N")
    multiple_of: int | None = option(
        None, "With --allocation global: a layer keeps a multiple of N neurons, such as 64.", metavar="N"
    )
    reconstruct: int = option(
        0, "After the start, train each MLP separately on the calibration text for N steps.", metavar="N"
    )
    tune: int = option(
        0,
        "Then train all new layers together for N steps, one sequence per step, to predict as MODEL does.",
        metavar="N",
    )
    tune_text: float = option(TUNE_TEXT, "With --tune: the share of the loss on the text itself, from 0 to 1.")
    tune_all: bool = option(False, "With --tune: also train the other weights, but not the embeddings.")
    embedding: int | None = option(
        None, "Factorise the input embedding too, with a 1xN right factor (KnGPT2: 2).", metavar="N"
    )
    keep: InitVar[float | None] = None

    def __post_init__(self, keep: float | None) -> None:
        if keep is not None:
            if self.scheme:
                raise KronyError(f"scheme {self.scheme!r} and keep={keep} both set the size: give one of them")
            if isinstance(keep, bool) or not isinstance(keep, (int, float)):
                raise KronyError(f"keep is {keep!r}: it takes a share between 0 and 1, such as 0.5")
            object.__setattr__(self, "scheme", f"keep={keep:g}")
        object.__setattr__(self, "scheme", _parsed(self.scheme))
        _check_choice("allocation", self.allocation, ALLOCATIONS)
        _check_choice("reinit", self.reinit, (None, "all"))
        self._check_per_layer()
        if self.split_attention and self.modules == "mlp" and not isinstance(self.scheme, LayerSchemes):
            raise KronyError(
                "split_attention splits attention matrices, and modules mlp replaces none of them: choose them too, "
                "such as modules='mlp|c_attn'"
            )
        self._check_scalars()
        self._check_epsilon()
        self._check_widths()
        check_seed(self.seed)
        for name in ("reconstruct", "tune"):
            if getattr(self, name) < 0:
                raise KronyError(f"{name} is {getattr(self, name)}: it takes a number of steps, 0 for none")
        if not 0 <= self.tune_text <= 1:
            raise KronyError(f"tune_text is {self.tune_text}: it is a share, from 0 to 1")
        if self.tune_text != TUNE_TEXT and not self.tune:
            raise KronyError("tune_text says what tune trains towards, and tune is 0 steps: give it a number of steps")
        if self.tune_all and not self.tune:
            raise KronyError("tune_all says what tune trains, and tune is 0 steps: give it a number of steps")
        if self.tune and self.reinit:
            raise KronyError("tune trains towards the original, and reinit draws its weights at random: drop one")

    def _check_per_layer(self) -> None:
        if not isinstance(self.scheme, LayerSchemes):
            return
        if self.allocation == "global":
            raise KronyError(
                "allocation global shares one budget among the layers, and a scheme per layer says what each gets: "
                "use allocation uniform"
            )
        for name in ("modules", "layers"):
            if getattr(self, name) != {"modules": "mlp", "layers": "all"}[name]:
                raise KronyError(
                    f"{name} chooses what is replaced, and a scheme per layer does so too: leave {name} out"
                )

    def _check_scalars(self) -> None:
        if self.scalar_init is not None and self.scalars is False:
            raise KronyError("scalar_init sets the scalars, and scalars=False leaves them out: drop one of the two")
        if self.scalar_init is not None and not math.isfinite(self.scalar_init):
            raise KronyError(f"scalar_init is {self.scalar_init}: it takes a finite number")
        if self.scalar_init == 0:
            raise KronyError("scalar_init is 0: the left factors are divided by it, so it takes another number")

    def _check_epsilon(self) -> None:
        own = self.initialisation.default_epsilon  # looks the init up, which may be unknown
        if self.epsilon is not None and not math.isfinite(self.epsilon):
            raise KronyError(f"epsilon is {self.epsilon}: it takes a finite number")
        if self.epsilon is not None and own is None:
            from krony.init.registry import INITIALISATIONS

            takers = ", ".join(name for name, init in INITIALISATIONS.items() if init.default_epsilon is not None)
            raise KronyError(f"epsilon works with init {takers}, and the init is {self.init}: leave it out")

    def _check_widths(self) -> None:
        for name in ("max_width", "multiple_of"):
            value = getattr(self, name)
            if value is not None and self.allocation != "global":
                raise KronyError(f"{name} works with allocation global, and the allocation is {self.allocation}")
            if value is not None and value < 1:
                raise KronyError(f"{name} is {value}: it takes a number of neurons from 1")

    @property
    def initialisation(self) -> Initialisation:
        """The record of ``init``. Raises KronyError for an unknown name."""
        from krony.init.registry import find_initialisation  # torch is heavy, and ``krony --help`` needs none

        return find_initialisation(self.init)

    @property
    def needs_text_for(self) -> str | None:
        """Which option needs calibration text, in words; None if none does."""
        if self.initialisation.needs_text:
            return f"init {self.init}"
        return next((name for name in ("reconstruct", "tune") if getattr(self, name)), None)

    @property
    def needs_gradient(self) -> bool:
        """Whether a gradient of the loss weighs the errors of the layers (``Moments.sensitivity``)."""
        return self.allocation == "global" or self.reconstruct > 0

    @property
    def drops_neurons(self) -> bool:
        """Whether the neurons that are left out of an MLP add nothing, so that ``slim`` can leave out their weights."""
        return self.initialisation.whole_neurons and not self.epsilon

    def non_default_options(self) -> dict[str, Any]:
        """Scheme, init, seed, and every option that differs from its default: what it takes to repeat the work."""
        values = {field.name: (getattr(self, field.name), field.default) for field in fields(self)}
        always = ("scheme", "init", "seed")
        if isinstance(self.scheme, LayerSchemes):
            # pairs, because config.json is written with its keys sorted, and the last pattern that matches decides
            values["scheme"] = [list(pair) for pair in self.scheme.patterns.items()], None
        return {name: value for name, (value, default) in values.items() if name in always or value != default}

    def scheme_for(self, name: str) -> str:
        """The scheme of the layer of this name; with a scheme per layer ``dense`` for one that stays as it is."""
        return self.scheme.scheme_for(name) if isinstance(self.scheme, LayerSchemes) else str(self.scheme)

    def has_scalars(self, factors: int) -> bool:
        """Whether a sum of ``factors`` products carries scalars (the paper: where there is more than one)."""
        if self.scalars is not None:
            return self.scalars
        return factors > 1 if self.scalar_init is None else True


def options_of(effort: str) -> dict[str, Any]:
    """The options of a named effort. Raises KronyError for an unknown name.

    Examples:
        >>> KronyConfig(keep=0.5, **options_of("tuned")).tune
        240
    """
    _check_choice("effort", effort, tuple(EFFORTS))
    return EFFORTS[effort]


def _parsed(scheme: object) -> str | LayerSchemes:
    """The scheme, or those of all layers. Raises KronyError for what is neither."""
    if isinstance(scheme, Mapping):
        return LayerSchemes(dict(scheme))
    if isinstance(scheme, list) and all(isinstance(pair, (list, tuple)) and len(pair) == 2 for pair in scheme):
        return LayerSchemes(dict(scheme))  # as config.json records it
    if isinstance(scheme, (str, Path)) and is_file(scheme):
        from krony.data.scheme_file import read_scheme_file  # heavy

        return read_scheme_file(Path(scheme))
    if not isinstance(scheme, (str, LayerSchemes)):
        raise KronyError(f"scheme is {scheme!r}, not text: write '81M', '1536x768', 'keep=0.5' or a mapping per layer")
    return scheme


def _check_choice(name: str, value: str | None, known: tuple[str | None, ...]) -> None:
    if value not in known:
        raise KronyError(f"{name} {value!r} is unknown: it is one of {', '.join(str(k) for k in known)}")
