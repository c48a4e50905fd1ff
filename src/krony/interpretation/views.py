"""What ``krony.interpret`` returns."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

Side = Literal["outputs", "inputs", "tokens"]


@dataclass(frozen=True, kw_only=True)
class Context:
    """A place in the text where a factor acts strongly on a group.

    Attributes:
        before: the text before the token.
        token: the token that the layer reads there.
        after: the text that follows.
        energy: the factor's energy in the group at this token, divided by its mean over all tokens.
        sequence: the number of the sequence.
        position: the place of the token in it.
    """

    before: str
    token: str
    after: str
    energy: float
    sequence: int
    position: int


@dataclass(frozen=True, kw_only=True)
class GroupView:
    """Numbers that share a row (``outputs``) or a column (``inputs``) of a left factor.

    Attributes:
        index: which row or column of the left factor.
        members: the numbers of the layer's outputs or inputs that share it; in an MLP these are hidden neurons.
        weights: the share of ``‖B‖²`` in the row or column of the right factor that each member has.
        share: the group's share of the factor's energy.
        contexts: where the factor acts most strongly on it, at most one place in each sequence.
    """

    index: int
    members: list[int]
    weights: list[float]
    share: float
    contexts: list[Context]


@dataclass(frozen=True, kw_only=True)
class FactorView:
    """One factor of a layer, ``s A ⊗ B``.

    Attributes:
        index: zero-based.
        scalar: s; 1 for a layer without scalars.
        right: B, row by row.
        singular_values: of A, descending.
        effective_rank: of A: ``exp(-Σ p log p)`` with ``p = σ/Σσ`` (Roy & Vetterli 2007).
        share: ``Σ_t ⟨y_f, y⟩ / Σ_t ‖y‖²`` over the text's tokens, where ``y_f = (s A ⊗ B) x`` and ``y = Σ_f y_f``. The
            shares of a layer add up to 1; one is negative where a factor works against the others. Shares are the
            Shapley values of the energy ``‖Σ_{f∈S} y_f‖²``.
        alone: ``Σ_t ‖y_f‖² / Σ_t ‖y‖²``, which is ``share`` where factors are orthogonal on the text.
        ratio: perplexity without the factor divided by that of the model; None if it wasn't measured, as ``low`` and
            ``high``.
        low: the lower end of the 95 % interval of ``ratio`` (``krony.evaluation.interval``).
        high: the upper end; infinite for a single sequence.
        groups: those with most of the factor's energy.
    """

    index: int
    scalar: float
    right: list[list[float]]
    singular_values: list[float]
    effective_rank: float
    share: float
    alone: float
    ratio: float | None
    low: float | None
    high: float | None
    groups: list[GroupView]


@dataclass(frozen=True, kw_only=True)
class LayerFactors:
    """The factors of one layer.

    Attributes:
        name: the layer's name in the model.
        left: the shape of A.
        right: the shape of B.
        side: what the groups consist of; ``tokens`` for an embedding, which has none.
        factors: in the order in which the model stores them.
    """

    name: str
    left: tuple[int, int]
    right: tuple[int, int]
    side: Side
    factors: list[FactorView]


@dataclass(frozen=True, kw_only=True)
class Similarity:
    """How far subspaces coincide, by their principal angles θ (Björck & Golub 1973).

    Attributes:
        kind: which matrices are compared.
        of: ``left`` for the leading directions of left factors on the side of the residual stream, ``right`` for the
            spans of the right factors of whole layers.
        names: of the subspaces: ``layer.factor``, or the layer.
        directions: dimensions of each subspace.
        space: dimensions of the space that they lie in.
        chance: the mean of cos²θ that is expected of independent directions: ``directions / space``.
        mean_cos2: the mean of cos²θ for each pair (Hu et al. 2021, section 7.2), 1 for the same subspace.
        smallest: the smallest angle of each pair in degrees.
        across: the mean of ``mean_cos2`` over pairs of different layers.
    """

    kind: str
    of: Literal["left", "right"]
    names: list[str]
    directions: int
    space: int
    chance: float
    mean_cos2: list[list[float]]
    smallest: list[list[float]]
    across: float


@dataclass(frozen=True, kw_only=True)
class Interpretation:
    """What the factors of a model do on a text.

    Attributes:
        text: the name of the text.
        tokens: tokens that were read for energies and contexts.
        length: tokens in a sequence.
        ablation_tokens: tokens that ablations were measured on; 0 if there was none.
        perplexity: of the model on these tokens; None if there was no ablation.
        seconds: how long it took.
        layers: in the order of the model.
        similarities: one for each kind of matrix that occurs twice.
        dense: names of the linear layers of MLPs that aren't compressed.
    """

    text: str
    tokens: int
    length: int
    ablation_tokens: int
    perplexity: float | None
    seconds: float
    layers: list[LayerFactors]
    similarities: list[Similarity]
    dense: list[str]

    def to_json(self) -> dict[str, Any]:
        """The figures for ``--json``."""
        return asdict(self)
