"""``krony.interpret``: what each factor of a compressed model does on a text."""

from __future__ import annotations

import time
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from krony.data.calibration_set import documents_in, pack
from krony.data.python_docs import PYTHON_DOCS
from krony.data.sets import TEST_SETS, load_texts
from krony.errors import KronyError
from krony.evaluation.interval import Interval, ratio_interval, sequence_losses
from krony.evaluation.perplexity import check_ids
from krony.interpretation.ablation import without
from krony.interpretation.energies import Energies
from krony.interpretation.subspaces import Subspace, effective_rank, leading, number_of, similarities, span
from krony.interpretation.views import Context, FactorView, GroupView, Interpretation, LayerFactors, Side
from krony.kronecker.embedding import KroneckerEmbedding
from krony.kronecker.linear import KroneckerLinear
from krony.models.loading import context_length
from krony.models.modes import evaluating
from krony.models.surgery import find_groups, kronecker_embeddings, kronecker_layers, original
from krony.runtime.progress import Progress, silent

TOKENS, ABLATION_TOKENS, LENGTH = 8_192, 4_096, 256
GROUPS = 2  # of each factor that are shown
BEFORE, AFTER = 12, 6  # tokens of context around a token

Layer = KroneckerLinear | KroneckerEmbedding


@torch.no_grad()
def interpret(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    text: str = PYTHON_DOCS,
    *,
    tokens: int = TOKENS,
    ablation_tokens: int = ABLATION_TOKENS,
    progress: Progress = silent,
) -> Interpretation:
    """Looks at every factor of a compressed model: B, the spectrum of A, energy on a text, contexts, and ablation.

    A sum of Kronecker products fixes the matrix, and the spans of its factors, but not each factor: other factors with
    the same spans make the same matrix. What is said of a single factor is true of the one that the model stores.

    Args:
        model: a causal LM with compressed layers; it is the same afterwards.
        tokenizer: the model's.
        text: a text or jsonl file, ``python-docs`` (its held-out part), a test set, or a data set on the hub.
        tokens: energies and contexts are of at most so many, in sequences of 256.
        ablation_tokens: each factor is left out on the first so many of them; 0 leaves no factor out.
        progress: called with what is done, all there is to do, and what it is.

    Raises:
        KronyError: nothing in the model is compressed, or the text can't be read or is shorter than a sequence.

    Examples:
        >>> import krony
        >>> model, tokenizer = krony.demo_model(), krony.load_tokenizer("demo")
        >>> _ = krony.compress(model, krony.KronyConfig("256x128:2", init="van-loan", layers="0"))
        >>> seen = krony.interpret(model, tokenizer, tokens=512, ablation_tokens=0)
        >>> len(seen.layers), round(sum(factor.share for factor in seen.layers[0].factors), 6)
        (2, 1.0)
    """
    start = time.monotonic()
    layers: dict[str, Layer] = {**kronecker_embeddings(model), **kronecker_layers(model)}
    if not layers:
        raise KronyError(
            "nothing in this model is compressed, so it has no factors: compress it first (krony compress)"
        )
    ids = read_rows(model, tokenizer, text, tokens, ablation_tokens)
    sides, dense = _sides(model)
    energies = _read_energies(model, {n: m for n, m in layers.items() if isinstance(m, KroneckerLinear)}, sides, ids)
    ablated = ids[: ablation_tokens // ids.shape[1]]
    losses = sequence_losses(model, ablated) if len(ablated) else None
    views, subspaces = [], []
    for done, (name, layer) in enumerate(layers.items()):
        progress(done, len(layers), "factors")
        ratios = _ablate(model, layer, ablated, losses)
        view, bases = _view(name, layer, energies.get(name), ratios, Words(tokenizer, ids))
        views.append(view)
        subspaces += bases
    spans = [
        Subspace(layer=name, label=number_of(name), basis=span(layer.right))
        for name, layer in layers.items()
        if isinstance(layer, KroneckerLinear)
    ]
    return Interpretation(
        text=text,
        tokens=ids.numel(),
        length=ids.shape[1],
        ablation_tokens=ablated.numel(),
        perplexity=None if losses is None else losses.mean().exp().item(),
        seconds=time.monotonic() - start,
        layers=views,
        similarities=similarities("left", subspaces) + similarities("right", spans),
        dense=[name for name in dense if name not in layers],
    )


def read_rows(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, text: str, tokens: int, ablation_tokens: int
) -> Tensor:
    """Token ids ``(sequences, length)`` of documents in random order, the same each time. Raises KronyError."""
    length = min(LENGTH, context_length(model))
    if tokens < length or (ablation_tokens and ablation_tokens < length):
        raise KronyError(f"{min(tokens, ablation_tokens or tokens)} tokens of text: at least {length} make a sequence")
    # of a set on the hub that isn't a test set the train split is read, as for --calibration
    documents = load_texts(text) if text in TEST_SETS else documents_in(text, tokens, "held-out")
    ids = pack(documents, tokenizer, tokens=tokens, length=length, what=f"text {Path(text).name}")
    check_ids(text, ids.flatten(), model)
    return ids


def _sides(model: PreTrainedModel) -> tuple[dict[str, str], list[str]]:
    """The role of each layer of an MLP by its name, and the names."""
    try:
        sites = [site for group in find_groups(original(model)) for site in group.sites]
    except KronyError:  # no MLP that krony knows
        sites = []
    return {site.name: site.role for site in sites}, [site.name for site in sites]


def _side(layer: KroneckerLinear, role: str) -> Side:
    """Which side's groups are shown: that of the hidden neurons, or the other where each group has one number."""
    first: Side = "inputs" if role == "down" else "outputs"
    sizes = {"outputs": layer.shape.m2, "inputs": layer.shape.n2}
    other: Side = "outputs" if first == "inputs" else "inputs"
    return other if sizes[first] == 1 < sizes[other] else first


def _read_energies(
    model: PreTrainedModel, layers: dict[str, KroneckerLinear], roles: dict[str, str], ids: Tensor
) -> dict[str, Energies]:
    found = {name: Energies(name, layer, _side(layer, roles.get(name, "other"))) for name, layer in layers.items()}
    try:
        with evaluating(model):
            for energies in found.values():
                energies.length = ids.shape[1]
            for row in ids:
                model(input_ids=row[None].to(model.device), use_cache=False)
    finally:
        for energies in found.values():
            energies.remove()
    return found


def _ablate(model: PreTrainedModel, layer: Layer, ids: Tensor, losses: Tensor | None) -> list[Interval | None]:
    """The ratio of perplexities without each factor, and its interval."""
    found: list[Interval | None] = []
    for factor in range(layer.shape.factors):
        if losses is None:
            found.append(None)
            continue
        with without(layer, factor):
            found.append(ratio_interval(sequence_losses(model, ids), losses))
    return found


class Words:
    """The text around a token."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, ids: Tensor) -> None:
        self.tokenizer, self.ids = tokenizer, ids

    def at(self, sequence: int, position: int) -> tuple[str, str, str]:
        """What is before a token, the token, and what follows it."""
        row = self.ids[sequence].tolist()
        places = (max(0, position - BEFORE), position), (position, position + 1), (position + 1, position + 1 + AFTER)
        before, token, after = (str(self.tokenizer.decode(row[start:end])) for start, end in places)
        return before, token, after


def _view(
    name: str, layer: Layer, energies: Energies | None, ratios: list[Interval | None], words: Words
) -> tuple[LayerFactors, list[Subspace]]:
    """A layer's factors, and the leading directions of each left factor on the side of the residual stream."""
    k = layer.shape.factors
    lefts, rights = layer.weight.double().view(k, *layer.shape.left), layer.right.double().view(k, *layer.shape.right)
    scalars = getattr(layer, "scalars", None)
    factors, bases = [], []
    for f in range(k):
        left = torch.linalg.svd(lefts[f], full_matrices=False)  # (m1, r), (r,), (r, n1)
        ratio = ratios[f] or (None, None, None)
        share, alone = _shares(energies, f)
        factors.append(
            FactorView(
                index=f,
                scalar=1.0 if scalars is None else scalars[f].item(),
                right=rights[f].tolist(),
                singular_values=left.S.tolist(),
                effective_rank=effective_rank(left.S),
                share=share,
                alone=alone,
                ratio=ratio[0],
                low=ratio[1],
                high=ratio[2],
                groups=[] if energies is None else _groups(energies, f, rights[f], words),
            )
        )
        if energies is not None:  # the residual stream is on the other side than an MLP's hidden neurons
            stream = left.U if energies.side == "inputs" else left.Vh.T
            bases.append(Subspace(layer=name, label=f"{number_of(name)}.{f}", basis=leading(stream)))
    return LayerFactors(
        name=name,
        left=layer.shape.left,
        right=layer.shape.right,
        side="tokens" if energies is None else energies.side,
        factors=factors,
    ), bases


def _shares(energies: Energies | None, factor: int) -> tuple[float, float]:
    """``share`` and ``alone`` of a factor; those of an embedding's only one are 1."""
    if energies is None:
        return 1.0, 1.0
    whole = energies.gram.sum().item()
    if whole <= 0:
        return 0.0, 0.0
    return energies.gram[factor].sum().item() / whole, energies.gram[factor, factor].item() / whole


def _groups(energies: Energies, factor: int, right: Tensor, words: Words) -> list[GroupView]:
    """The groups with most of a factor's energy; none for a factor that adds nothing."""
    energy, total = energies.energy[factor], energies.energy[factor].sum().item()
    if total == 0:
        return []
    of_members = right.square().sum(1 if energies.side == "outputs" else 0)  # (m2,) or (n2,)
    size = len(of_members)
    found = []
    for index in energy.topk(min(GROUPS, len(energy))).indices.tolist():
        mean = energy[index].item() / energies.tokens
        places = zip(
            *(values[factor, index].tolist() for values in (energies.best, energies.sequence, energies.position)),
            strict=True,
        )
        contexts = [
            Context(**dict(zip(("before", "token", "after"), words.at(s, p), strict=True)), energy=e / mean, sequence=s,
                    position=p)
            for e, s, p in places
            if e > 0 and mean > 0
        ]  # fmt: skip
        found.append(
            GroupView(
                index=index,
                members=list(range(index * size, (index + 1) * size)),
                weights=(of_members / of_members.sum()).tolist(),
                share=energy[index].item() / total,
                contexts=contexts,
            )
        )
    return found
